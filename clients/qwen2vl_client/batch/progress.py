"""A progress bar with rate and time left; needs the extra ``progress`` (rich)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from qwen2vl_client.errors import InvalidArgumentError

#: Called with what is done, and with what of it has failed.
Tell = Callable[[int, int], None]


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
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[failed]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        number = shown.add_task("", total=total, rate="", failed="")

        def tell(done: int, failed: int) -> None:
            seconds = shown.tasks[0].elapsed or 0.0
            rate = f"{done / seconds:.2f}/s" if seconds else ""
            lost = f"{failed} failed" if failed else ""
            shown.update(number, completed=done, rate=rate, failed=lost)

        yield tell


@contextlib.contextmanager
def no_bar() -> Iterator[Tell]:
    """Show nothing."""
    yield lambda done, failed: None  # noqa: ARG005  (the shape of Tell)
