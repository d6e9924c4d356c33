"""When to try again, and after how long.

Why not urllib3's ``Retry``: it raises ``InvalidHeader`` on a ``Retry-After`` it cannot read,
waits up to six hours where a server says so, cannot tell an answer that is slow (repeating it
doubles the load) from a connection that broke, and does not see a body that broke off.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from qwen2vl_client.errors import APIConnectionError, APIStatusError
from qwen2vl_client.steps import Call, Flow, Wait

RETRIED_STATUSES = frozenset({408, 409, 429})
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True)
class RetryPolicy:
    """Up to ``max_retries`` further attempts.

    Without a word of the server the wait doubles from ``first_wait`` to ``longest_wait``
    seconds, of which a random half is taken off so that clients that failed together do not
    come back together. With ``Retry-After`` it is at least that long; where it is longer than
    ``longest_retry_after`` the error is raised at once and carries it.
    """

    max_retries: int = 2
    first_wait: float = 0.5
    longest_wait: float = 8.0
    longest_retry_after: float = 60.0

    def attempts(self, call: Call) -> Flow[Any]:
        """Ask until it succeeds, fails for good, or the attempts are used up."""
        retries = 0
        while True:
            try:
                return (yield call)
            except (APIConnectionError, APIStatusError) as error:
                wait = self.wait(error, retries)
                if wait is None:
                    raise
            yield Wait(wait)
            retries += 1

    def wait(self, error: APIConnectionError | APIStatusError, retries: int) -> float | None:
        """Return the seconds to wait before retry number ``retries`` (from 0); None: give up."""
        if retries >= self.max_retries or not is_retryable(error):
            return None
        asked = error.retry_after if isinstance(error, APIStatusError) else None
        if asked is not None:
            if asked > self.longest_retry_after:
                return None
            return asked + random.uniform(0, 0.1 * asked)  # noqa: S311  (not for secrets)
        longest = min(self.first_wait * 2**retries, self.longest_wait)
        return random.uniform(longest / 2, longest)  # noqa: S311  (not for secrets)


def is_retryable(error: APIConnectionError | APIStatusError) -> bool:
    """Tell whether the same request may succeed shortly: 408, 409, 429, 5xx, no connection."""
    if isinstance(error, APIStatusError):
        return error.status in RETRIED_STATUSES or error.status >= 500
    return error.retryable


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait; None where it asks for none.

    ``retry-after-ms``, which OpenAI's servers and Azure's send, is finer and goes first.
    """
    milliseconds = headers.get("retry-after-ms", "").strip()
    if _SECONDS.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    return parse_retry_after(headers.get("retry-after"), headers.get("date"))


def parse_retry_after(value: str | None, date: str | None = None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, never negative.

    ``value`` holds seconds or an HTTP date (RFC 9110, section 10.2.3); a fraction of a second,
    which the RFC does not know and servers send, is taken at its word. ``date`` is the
    answer's own ``Date`` header, which makes the result independent of this machine's clock.
    None where the header is absent or cannot be read.
    """
    if value is None:
        return None
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    until = _timestamp(value)
    if until is None:
        return None
    now = _timestamp(date) if date else None
    return max(0.0, until - (time.time() if now is None else now))


def _timestamp(http_date: str) -> float | None:
    try:
        told = parsedate_to_datetime(http_date)
        # The asctime form and "-0000" name no zone: UTC, and not this machine's own.
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
