"""Uses: one function each, which takes the client first.

::

    from qwen2vl_client import Client
    from qwen2vl_client.tasks import locate, ocr

    client = Client()
    print(ocr(client, "receipt.jpg"))
    for box in locate(client, "street.jpg", "the red car").boxes:
        print(box.label, box.pixels)

With an asynchronous client the same calls are awaited. ``ocr.task(…)`` is the question without
the asking, for ``qwen2vl_client.batch``. Every use takes ``prompts=`` (``"en"``, ``"zh"`` or a
``Prompts``) and any field of the API (``max_tokens``, ``model``, ``timeout`` …) by name.
"""

from qwen2vl_client.tasks.compare import compare
from qwen2vl_client.tasks.fields import extract_fields
from qwen2vl_client.tasks.html import Page, to_html
from qwen2vl_client.tasks.locate import Located, locate
from qwen2vl_client.tasks.moderate import CATEGORIES, Judgement, moderate
from qwen2vl_client.tasks.product import ask_product
from qwen2vl_client.tasks.reading import ocr
from qwen2vl_client.tasks.solve import Solution, solve
from qwen2vl_client.tasks.table import Table, extract_table
from qwen2vl_client.tasks.task import Reply, Task, Use
from qwen2vl_client.tasks.translate import translate
from qwen2vl_client.tasks.video import describe_video

__all__ = [
    "CATEGORIES",
    "Judgement",
    "Located",
    "Page",
    "Reply",
    "Solution",
    "Table",
    "Task",
    "Use",
    "ask_product",
    "compare",
    "describe_video",
    "extract_fields",
    "extract_table",
    "locate",
    "moderate",
    "ocr",
    "solve",
    "to_html",
    "translate",
]
