"""Through which proxy something is fetched, if through any."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Of every system; ``proxy_bypass`` of macOS and Windows asks their settings, and nothing else.
from urllib.request import (  # type: ignore[attr-defined]
    getproxies_environment,
    proxy_bypass_environment,
)

from yarl import URL

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.profile.media import ENVIRONMENT, proxy_address, proxy_variable


class Proxies:
    """A proxy for each scheme of URLs, by the profile's word, as it is when the server starts.

    The word is None for none at all, an address for all URLs, or ``environment`` for what
    ``http_proxy``, ``https_proxy`` and ``no_proxy`` say.
    """

    def __init__(self, word: str | None) -> None:
        """Raise ``ProfileError`` if a variable of the environment is of no use."""
        self._variables: Mapping[str, str] = {}
        found: Mapping[str, str] = {}
        if word == ENVIRONMENT:
            self._variables = getproxies_environment()
            found = {s: self._variables[s] for s in ("http", "https") if s in self._variables}
        elif word is not None:
            found = dict.fromkeys(("http", "https"), word)
        self._by_scheme = {scheme: _parsed(scheme, address) for scheme, address in found.items()}

    def of(self, url: URL) -> URL | None:
        """Return the proxy for a URL with a host, None where it is fetched directly."""
        proxy = self._by_scheme.get(url.scheme)
        if proxy is None or not self._variables:
            return proxy
        place = f"{(url.raw_host or '').rstrip('.')}:{url.port}"
        return None if proxy_bypass_environment(place, self._variables) else proxy


def _parsed(scheme: str, address: str) -> URL:
    try:
        return URL(proxy_address(address if "://" in address else f"http://{address}"))
    except ValueError as error:
        raise ProfileError(
            f"media.proxy is {ENVIRONMENT}, and the variable "
            f"{proxy_variable(scheme, os.environ)} {error}; mend it "
            "or unset media.proxy"
        ) from None
