"""Counters in an SQLite file, for the library ``limits``: shared by processes without a server."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from limits.storage import Storage

WAIT_SECONDS = 2.0
"""How long others may keep the file; they need microseconds."""


class SQLiteStorage(Storage):
    """``sqlite:////absolute/path``; counting belongs into a ``turn``, and is then atomic."""

    STORAGE_SCHEME = ["sqlite"]  # noqa: RUF012  # as the base class declares it

    def __init__(self, uri: str, wrap_exceptions: bool = False, **_: float | str | bool) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        path = Path(unquote(urlsplit(uri).path)[1:])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One connection, whichever thread counts; the lock makes their turns.
        self._lock = threading.RLock()
        self._counters = sqlite3.connect(
            path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Counts of a minute may be lost with the machine's power; waiting for the disk would cost
        # every request a millisecond or more.
        self._counters.execute("PRAGMA journal_mode = WAL")
        self._counters.execute("PRAGMA synchronous = OFF")
        self._counters.execute(
            "CREATE TABLE IF NOT EXISTS counters"
            " (key TEXT PRIMARY KEY, count INTEGER NOT NULL, expires REAL NOT NULL) WITHOUT ROWID"
        )
        # From here on ``turn`` waits, so that it can also not wait.
        self._counters.execute("PRAGMA busy_timeout = 0")
        self._swept = 0.0

    @contextlib.contextmanager
    def turn(self, seconds: float = WAIT_SECONDS) -> Iterator[None]:
        """Keep everybody else out: what is counted within is counted at once, or not at all.

        Raises ``TimeoutError`` when others are at it for longer than ``seconds``.
        """
        end = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError("another thread is counting")
        try:
            self._begin(end)
            try:
                yield
            except BaseException:
                self._counters.execute("ROLLBACK")
                raise
            self._counters.execute("COMMIT")
        finally:
            self._lock.release()

    def _begin(self, end: float) -> None:
        while True:
            try:
                self._counters.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if time.monotonic() >= end:
                    raise TimeoutError(str(error)) from None
                time.sleep(0.001)
            else:
                return

    @property
    def base_exceptions(self) -> type[Exception]:
        """What the file raises when it cannot be used."""
        return sqlite3.Error

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add to a counter, which is new again once it expired; return its count."""
        now = time.time()
        with self._lock:
            self._sweep(now)
            (count,) = self._counters.execute(
                "INSERT INTO counters VALUES (:key, :amount, :expires) ON CONFLICT (key) DO UPDATE"
                " SET count = iif(expires <= :now, 0, count) + :amount,"
                " expires = iif(expires <= :now, :expires, expires) RETURNING count",
                {"key": key, "amount": amount, "expires": now + expiry, "now": now},
            ).fetchone()
        return int(count)

    def get(self, key: str) -> int:
        """Return a counter's count; 0 once it expired."""
        count, expires = self._row(key)
        return int(count) if expires > time.time() else 0

    def get_expiry(self, key: str) -> float:
        """Return when a counter expires, in seconds since the epoch; now for none."""
        return self._row(key)[1] or time.time()

    def check(self) -> bool:
        """Tell whether the file can be read."""
        with self._lock:
            self._counters.execute("SELECT 1 FROM counters").fetchone()
        return True

    def reset(self) -> int:
        """Forget all counters; return how many there were."""
        with self._lock:
            return self._counters.execute("DELETE FROM counters").rowcount

    def clear(self, key: str) -> None:
        """Forget one counter."""
        with self._lock:
            self._counters.execute("DELETE FROM counters WHERE key = ?", (key,))

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._counters.close()

    def _row(self, key: str) -> tuple[int, float]:
        with self._lock:
            row = self._counters.execute(
                "SELECT count, expires FROM counters WHERE key = ?", (key,)
            ).fetchone()
        return row or (0, 0.0)

    def _sweep(self, now: float) -> None:
        if now - self._swept > 60:
            self._swept = now
            self._counters.execute("DELETE FROM counters WHERE expires <= ?", (now,))
