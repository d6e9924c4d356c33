"""Who may use the server: keys checked before anything of a request is read."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile, NamedKey, digest_of
from qwen2vl_serve.errors import InvalidAPIKey, ProfileError

logger = logging.getLogger("qwen2vl_serve.requests")

LOOK_SECONDS = 1.0
"""How often, at most, the keys file is looked at while requests come."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request comes from.

    ``name`` is the key's, for logs, and empty for a key without one and for an open server;
    uploads belong to it. ``quota`` stands for the key where uses are counted.
    """

    name: str = ""
    quota: str = ""
    limits: KeyLimits | None = None
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        """Tell whether the key is for this model."""
        return self.models is None or model in self.models


ANYONE = Caller()
"""The caller of an open server, and of keys without a name."""


class Keys:
    """The keys of a server: plain ones without limits, and named ones of a file.

    None at all, and no file, leave the server open. The file is read again when it has changed;
    a server that has seen it never opens again, whatever becomes of the file. Raises
    ``ProfileError`` for a file that cannot be read, and for one that is not there although a
    profile has named it.
    """

    def __init__(self, keys: Iterable[str] = (), file: KeysFile | None = None) -> None:
        self._plain = tuple((digest_of(key), ANYONE, None) for key in keys)
        self._held: tuple[tuple[bytes, Caller, NamedKey | None], ...] = self._plain
        self._file = file
        self._state: object = None
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._closed = bool(self._plain)
        if file is not None and file.in_use:
            self._state = file.state()
            self._take(file.read())

    def __bool__(self) -> bool:
        return self._closed

    @property
    def limited(self) -> bool:
        """Whether uses of any key are counted."""
        return any(caller.limits for _, caller, _ in self._held)

    def check(self, authorization: str | None) -> Caller:
        """Return whom the header ``Authorization`` speaks for; anyone where there are no keys.

        Raises:
            InvalidAPIKey: no ``Bearer`` key, none of these, or one whose time is over.
        """
        if self._file is not None and time.monotonic() - self._looked >= LOOK_SECONDS:
            self.reload()
        if not self._closed:
            return ANYONE
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise InvalidAPIKey("No API key was given; send the header Authorization: Bearer KEY.")
        given = digest_of(secret.strip())
        # Every key is compared: the time must not tell which one was near. Digests have one
        # length, so that it tells nothing about the key's either.
        matches = [one for one in self._held if hmac.compare_digest(given, one[0])]
        if not matches:
            # OpenAI's first words: LiteLLM knows the error by them, not by its status.
            raise InvalidAPIKey("Incorrect API key provided: it is not one of this server's.")
        _, caller, named = matches[0]
        if named is not None and named.expired(time.time()):
            raise InvalidAPIKey("The API key has expired; ask the server's operator for another.")
        return caller

    def named(self, name: str) -> Caller | None:
        """Return the caller that a key of this name stands for, None where there is none (more).

        Without a name it is anyone.
        """
        if not name:
            return ANYONE
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self.reload()
        for _, caller, named in self._held:
            if caller.name == name and named is not None and not named.expired(time.time()):
                return caller
        return None

    def reload(self) -> None:
        """Read the file if it has changed; one that cannot be read leaves the keys as they are."""
        if self._file is None:
            return
        with self._lock:
            self._looked = time.monotonic()
            state = self._file.state()
            if state == self._state:
                return
            self._state = state
            try:
                keys = self._file.read()
            except ProfileError as error:
                logger.warning("keys as before: %s", error)
                return
            self._take(keys)
            logger.info("keys read again: %d named", len(keys))

    def _take(self, keys: Iterable[NamedKey]) -> None:
        named = tuple((bytes.fromhex(key.sha256), _caller(key), key) for key in keys)
        self._held = self._plain + named
        self._closed = True


def _caller(key: NamedKey) -> Caller:
    models = None if key.models is None else frozenset(key.models)
    # Two files may hold the same name; counts follow the secret.
    return Caller(key.name, key.sha256[:16], key.limits or None, models)
