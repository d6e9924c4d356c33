"""Where the server's and its engine's words go: the log file, and the operator's eyes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen2vl_serve.errors import PreflightError

Report = Callable[[str], None]
"""Takes one line for the operator's eyes."""


@contextlib.contextmanager
def fresh_log(path: Path) -> Iterator[Path]:
    """Empty the log file, or make it, for its owner alone; no other server has it meanwhile.

    So two servers of one user do not load a model for the same port: until one of them listens,
    minutes later, the system lets both bind it.

    Raises:
        PreflightError: it cannot be written, or another server writes it.
    """
    with contextlib.ExitStack() as opened:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without waiting, as a pipe would.
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o600)
            opened.callback(os.close, log)
            if stat.S_ISREG(os.fstat(log).st_mode):
                _lock(log)
                # vLLM's words may quote what clients sent: for its owner's eyes.
                os.fchmod(log, 0o600)
                os.ftruncate(log, 0)
            elif str(path) != os.devnull:  # whoever reads it back might never come to its end
                raise PreflightError(
                    f"server.log_file: {path} is not a file; name one, or {os.devnull} for none."
                )
        except BlockingIOError:
            raise PreflightError(
                f"server.log_file: another server writes {path}, as it starts or runs on this port;"
                " stop it, or choose another port with --port, or another server.log_file."
            ) from None
        except OSError as error:
            raise PreflightError(
                f"server.log_file: cannot write {path} ({error.strerror}); name another place."
            ) from None
        yield path


def _lock(file: int) -> None:
    """Keep a file until it is closed; raises ``BlockingIOError`` where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # its file system has no locks


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
