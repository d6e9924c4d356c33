"""A progress bar with rate and time left; needs the extra ``progress`` (rich)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from qwen2vl_client.errors import InvalidArgumentError

#: Called with what an earlier run has answered, what this one has, and what has failed.
Tell = Callable[[int, int, int], None]


class Pace:
    """How fast this run is, and how long the rest takes.

    The clock starts where this run has its first work: what an earlier one answered takes no time,
    and tells nothing of how long a request takes.
    """

    def __init__(self, total: int | None, now: float) -> None:
        self._total, self._began = total, now

    def told(self, kept: int, answered: int, failed: int, now: float) -> tuple[str, str]:
        """Return the rate and the time left as they are shown; empty where nobody knows."""
        if not (answered or failed):
            self._began = now
        seconds = now - self._began
        if seconds <= 0:
            return "", ""
        rate = f"{answered / seconds:.2f}/s"
        if self._total is None:
            return rate, ""
        done = answered + failed
        rest = max(self._total - kept - done, 0) * seconds / done
        return rate, f"{timedelta(seconds=round(rest))} left"


@contextlib.contextmanager
def progress_bar(total: int | None) -> Iterator[Tell]:
    """Show a bar on standard error while the block runs; ``total`` None: of unknown length."""
    try:
        from rich import progress as bars  # noqa: PLC0415  (an extra, for those who ask for it)
        from rich.console import Console  # noqa: PLC0415
    except ImportError:
        raise InvalidArgumentError("progress=True needs rich: pip install rich") from None
    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[left]}"),
        bars.TextColumn("{task.fields[failed]}"),
    )
    pace = Pace(total, time.monotonic())
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        number = shown.add_task("", total=total, rate="", left="", failed="")

        def tell(kept: int, answered: int, failed: int) -> None:
            rate, left = pace.told(kept, answered, failed, time.monotonic())
            lost = f"{failed} failed" if failed else ""
            done = kept + answered
            shown.update(number, completed=done, rate=rate, left=left, failed=lost)

        yield tell


@contextlib.contextmanager
def no_bar() -> Iterator[Tell]:
    """Show nothing."""
    yield lambda kept, answered, failed: None  # noqa: ARG005  (the shape of Tell)
