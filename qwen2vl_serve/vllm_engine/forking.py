"""Processes of an engine on CPUs begin with what this one has imported, and import nothing again.

vLLM spawns its engine's core, and on CPUs its workers: each imports vLLM and torch anew, which
takes longer than all else of a small model's start. Here a process forks once it has imported
them, while nothing is computed in it, and the copy forks the cores: Python's own fork server, but
that it is forked itself. Cores fork their workers, as vLLM does where nothing forbids it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import connection, context, forkserver, process, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from vllm.platforms import current_platform
from vllm.utils.system_utils import set_process_title
from vllm.v1.engine import utils as engine_utils

TITLE = "Forks"
KEYED = (3, 14)


def share_imports() -> None:
    """Have the cores of engines forked, from now on, from a copy of this process as it is now.

    On cards nothing changes: there the import is a small part of a start. Nor does it from Python
    3.14 on, whose fork server shares a key with those that ask. To be called once, by a process
    with no thread that computes or speaks to others.
    """
    if not current_platform.is_cpu() or sys.version_info >= KEYED:
        return
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        Path(address).chmod(0o600)
        listener.listen()
        alive, kept = os.pipe()
        pid = os.fork()
        if not pid:
            _fork_as_asked(listener.fileno(), alive)
        os.close(alive)
    # What ``forkserver.ensure_running`` sets where it has spawned one.
    server: Any = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd = address, kept
    server._forkserver_pid = pid
    engine_utils.get_mp_context = _Context


class _Process(context.ForkServerProcess):
    """Takes along the environment that there is when it is started, as a spawned one does.

    It ends when the process that started it has ended, whatever ended that; a core that vLLM has
    spawned stays behind its killed server, with its memory.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self._environment)
        if parent := multiprocessing.parent_process():
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        super().run()


def _end_with(parent: process.BaseProcess) -> NoReturn:
    parent.join()
    os._exit(1)


class _Context(context.ForkServerContext):
    Process = _Process


def _fork_as_asked(listener: int, alive: int) -> NoReturn:
    """Fork for whoever asks by the listening socket; end with the last that may ask."""
    status = 1
    try:
        # A signal to the whole group is for those that serve; without this process they would
        # seem lost while they finish what is under way.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _leave_files({listener, alive, resource_tracker.getfd()})
        set_process_title(TITLE)
        _import_more()
        forkserver.main(listener, alive, [])
    except SystemExit:
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _leave_files(own: set[int | None]) -> None:
    """Let go of all files and sockets but the standard ones and its ``own``.

    A port would stay taken when its server has died, and a client's connection open. What holds
    one here, and closes it when it is collected, finds its number taken as before: by then another
    file would have a number that was free.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # names, no paths
        number = int(name)
        if number > 2 and number not in own | {nothing}:
            with suppress(OSError):  # that with which the folder was read is closed again
                os.fstat(number)
                os.dup2(nothing, number, inheritable=False)


def _import_more() -> None:
    """What cores and workers need beside what an API process does."""
    from vllm.triton_utils import dispatcher  # noqa: PLC0415  # in the copy, beside the original's work
    from vllm.v1.engine import core  # noqa: F401, PLC0415
    from vllm.v1.executor import multiproc_executor  # noqa: PLC0415
    from vllm.v1.worker import cpu_worker  # noqa: F401, PLC0415

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    dispatcher._rebind_kernels = partial(_but_for_llvmlite, dispatcher._rebind_kernels)


def _but_for_llvmlite(rebind: Callable[[Any], None], overrides: Any) -> None:
    """Look for vLLM's kernels in all modules but those that a spawned core does not have.

    vLLM looks into ``__dict__`` of whatever a module holds; functions of llvmlite (of numba, which
    resizes pictures) answer to that name with another of themselves.
    """
    names = [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]
    hidden = {name: sys.modules.pop(name) for name in names}
    try:
        rebind(overrides)
    finally:
        sys.modules.update(hidden)
