"""Many questions: asked several at a time, answers in order, resumable after a kill.

::

    from qwen2vl_client import Client
    from qwen2vl_client.batch import batch
    from qwen2vl_client.tasks import ocr

    report = batch(Client(), "scans/", each=ocr.task, output="texts.jsonl", progress=True)
    print(report)
"""

from qwen2vl_client.batch.outcome import Outcome, Report
from qwen2vl_client.batch.run import batch
from qwen2vl_client.batch.sources import Request, from_csv, from_folder, from_jsonl

__all__ = ["Outcome", "Report", "Request", "batch", "from_csv", "from_folder", "from_jsonl"]
