"""What a server on the CPU takes of the memory beside weights and KV cache: its own processes.

Pure arithmetic over the demo profile's figures, measured on vLLM 0.32; pages that processes share
are counted once.
"""

from __future__ import annotations

from qwen2vl_serve.machine.hardware import GIB

_API_SERVER, _ENGINE_CORE, _WORKER = 0.64 * GIB, 0.47 * GIB, 0.53 * GIB
_COMPUTING_CORE = 0.59 * GIB
"""Of an engine core that is its own worker (``Profile.worker_in_core``)."""


def process_bytes(workers: int, engines: int, *, in_core: bool) -> float:
    """Return the bytes of the API server, ``engines`` engine cores and ``workers`` workers.

    ``in_core`` tells that each core is its own worker. Source: a measurement, of profile demo's
    processes on vLLM 0.32's CPU build, once with a worker apart and once without; what a process
    takes is taken to be the same for each of several.
    """
    if in_core:
        return _API_SERVER + _COMPUTING_CORE * engines
    return _API_SERVER + _ENGINE_CORE * engines + _WORKER * workers


def shares_bytes(share: float, workers: int, engines: int, *, in_core: bool) -> float:
    """Return the bytes that have to be free where each worker takes ``share`` of the memory.

    A share holds its worker's process. Before it is taken, that much has to be free beside all
    processes. Source: ``CPUWorker`` in ``v1/worker/cpu_worker.py``.
    """
    apart = _API_SERVER if in_core else process_bytes(0, engines, in_core=False)
    return max(
        share * workers + apart,
        share + process_bytes(workers, engines, in_core=in_core),
    )
