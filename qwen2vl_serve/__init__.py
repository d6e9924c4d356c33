"""OpenAI-compatible serving of the Qwen2-VL family on vLLM."""

__version__ = "0.1.0"
