"""The seam: the one place that knows vLLM (0.32).

``start_engine`` boots the engine of a profile, or several behind one, each a ``VLLMEngine``. It
lets vLLM's own serving classes do the work and translates at the border: our request to vLLM's,
vLLM's errors to ours. ``share_imports`` makes starts on CPUs shorter.
"""

from qwen2vl_serve.vllm_engine.engine import VLLMEngine
from qwen2vl_serve.vllm_engine.forking import share_imports
from qwen2vl_serve.vllm_engine.start import start_engine

__all__ = ["VLLMEngine", "share_imports", "start_engine"]
