"""Counters in an SQLite file, for the library ``limits``: shared by processes without a server."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from limits.storage import Storage


class SQLiteStorage(Storage):
    """``sqlite:////absolute/path``; each method is one statement, so atomic over processes."""

    STORAGE_SCHEME = ["sqlite"]  # noqa: RUF012  # as the base class declares it

    def __init__(self, uri: str, wrap_exceptions: bool = False, **_: float | str | bool) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        path = Path(unquote(urlsplit(uri).path)[1:])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One connection, whichever thread counts; the lock makes their turns.
        self._lock = threading.Lock()
        self._counters = sqlite3.connect(
            path, timeout=2, isolation_level=None, check_same_thread=False
        )
        # Counts of a minute may be lost with the machine's power; waiting for the disk would cost
        # every request a millisecond or more.
        self._counters.execute("PRAGMA journal_mode = WAL")
        self._counters.execute("PRAGMA synchronous = OFF")
        self._counters.execute(
            "CREATE TABLE IF NOT EXISTS counters"
            " (key TEXT PRIMARY KEY, count INTEGER NOT NULL, expires REAL NOT NULL) WITHOUT ROWID"
        )
        self._swept = 0.0

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
