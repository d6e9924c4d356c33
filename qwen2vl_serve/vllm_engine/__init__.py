"""The seam: the one place that knows vLLM (0.32).

``start_engine`` boots the engine of a profile, or several behind one, each a ``VLLMEngine``. It
lets vLLM's own serving classes do the work and translates at the border: our request to vLLM's,
vLLM's errors to ours.
"""

from qwen2vl_serve.vllm_engine.engine import VLLMEngine
from qwen2vl_serve.vllm_engine.start import start_engine

__all__ = ["VLLMEngine", "start_engine"]
