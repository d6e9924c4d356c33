"""Where the server's and its engine's words go: the log file, and the operator's eyes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen2vl_serve.errors import PreflightError

Report = Callable[[str], None]
"""Takes one line for the operator's eyes."""


def fresh_log(path: Path) -> Path:
    """Empty the log file, or make it, for its owner alone.

    Raises:
        PreflightError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # vLLM's words may quote what clients sent: for its owner's eyes, also where it was there.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise PreflightError(
            f"server.log_file: cannot write {path} ({error.strerror}); name another place."
        ) from None
    return path


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2, which child processes inherit, to ``path``."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    except BaseException:
        # What went wrong is told to the operator; after a good end nothing more is, and what
        # vLLM still says while the interpreter ends belongs into the log.
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        raise
    finally:
        for descriptor in kept:
            os.close(descriptor)


def log_to(report: Report, formatter: logging.Formatter) -> None:
    """Report the server's own log lines (one a request); what went wrong is kept in the file."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report(self.format(record))

    requests = logging.getLogger("qwen2vl_serve.requests")
    requests.setLevel(logging.INFO)
    requests.propagate = False
    others = logging.getLogger("qwen2vl_serve")
    for logger, handler in ((requests, Handler()), (others, logging.StreamHandler())):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
