"""``qwen2vl-serve download``: fetch a checkpoint, with progress, and say where it is."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from qwen2vl_serve.cli.options import Commands
from qwen2vl_serve.download import SOURCES, Downloaded, Progress, download
from qwen2vl_serve.download.meter import Meter


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "download", help="fetch a model's files, checked and resumable", allow_abbrev=False
    )
    parser.description = (
        "Fetch what serving needs of a checkpoint. Mirrors, tokens and offline mode are set by "
        "HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, VLLM_USE_MODELSCOPE and MODELSCOPE_ENDPOINT."
    )
    parser.add_argument("model", metavar="MODEL", help="its name, as Qwen/Qwen2-VL-7B-Instruct")
    parser.add_argument(
        "--source", choices=SOURCES, default="auto", help="the hub; default: %(default)s"
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder for the files; default: the hub's own cache"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fetch, then print the folder and the commit."""
    to = None if arguments.to is None else arguments.to.expanduser().absolute()

    def fetch(progress: Progress) -> Downloaded:
        return download(
            arguments.model,
            source=arguments.source,
            to=to,
            revision=arguments.revision,
            progress=progress,
        )

    if sys.stderr.isatty():
        with _Bar() as bar:
            found = fetch(bar)
    else:
        found = fetch(Meter(lambda line: print(line, file=sys.stderr, flush=True)))
    print(found.folder)
    told = [f"{found.files} files, {found.size / 1e9:.2f} GB, every hash as the hub says"]
    if found.commit is not None:
        told.append(f"pin it with --set model.revision={found.commit}")
    print("; ".join(told), file=sys.stderr)
    return 0


class _Bar:
    """A ``Progress`` on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 -- of no use to a pipe
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._display = Progress(
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._display.add_task("", total=None)
        self._lock = threading.Lock()

    def __enter__(self) -> _Bar:
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def begin(self, total: int) -> None:
        """Take note of the bytes that the checkpoint has in all."""
        self._display.update(self._task, total=total)

    def advance(self, count: int, *, fetched: bool = True) -> None:
        """Take note of bytes that are here."""
        if fetched:
            self._display.advance(self._task, count)
        else:  # the rate is measured anew
            with self._lock:
                here = self._display.tasks[self._task].completed + count
                self._display.reset(self._task, completed=int(here))

    def say(self, line: str) -> None:
        """Tell a line above the bar."""
        self._display.console.print(line)
