"""What a server on the CPU takes of the memory beside weights and KV cache: its own processes.

Pure arithmetic over the demo profile's figures, measured on vLLM 0.32; pages that processes share
are counted once.
"""

from __future__ import annotations

from qwen2vl_serve.hardware import GIB

_API_SERVER, _ENGINE_CORE, _WORKER = 0.64 * GIB, 0.47 * GIB, 0.53 * GIB


def process_bytes(workers: int, engines: int) -> float:
    """Return the bytes of the API server, ``engines`` engine cores and ``workers`` workers."""
    return _API_SERVER + _ENGINE_CORE * engines + _WORKER * workers


def shares_bytes(share: float, workers: int, engines: int) -> float:
    """Return the bytes that have to be free where each worker takes ``share`` of the memory.

    A share holds its worker's process. Before it is taken, that much has to be free beside all
    processes. Source: ``CPUWorker`` in ``v1/worker/cpu_worker.py``.
    """
    return max(
        share * workers + process_bytes(0, engines),
        share + process_bytes(workers, engines),
    )
