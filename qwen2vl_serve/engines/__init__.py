"""Several engines behind the one ``Engine``: which answers what, and what happens when one dies.

Nothing here knows vLLM. ``several_engines`` starts them and yields the ``Engines``.
"""

from qwen2vl_serve.engines.several import Engines, several_engines

__all__ = ["Engines", "several_engines"]
