"""Fetches checkpoints: only what serving needs, resumed where it stopped, checked by its hashes."""

from qwen2vl_serve.download.fetching import Downloaded, Progress, download
from qwen2vl_serve.download.first_use import have_model
from qwen2vl_serve.download.listing import SOURCES, Source

__all__ = ["SOURCES", "Downloaded", "Progress", "Source", "download", "have_model"]
