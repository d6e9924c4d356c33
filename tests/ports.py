"""Ports for what listens later than it is told of."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# Processes that were started one after another have a hundred each.
_next = itertools.count(20_000 + os.getpid() % 100 * 100)


def quiet_port() -> int:
    """Return a port that nobody has, nor is given: it is below those of connections (32768 and up).

    No two are the same.
    """
    for port in itertools.takewhile(lambda port: port < 32_000, _next):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("all ports are taken")
