"""Measurements beside stock vLLM; not part of the distribution."""
