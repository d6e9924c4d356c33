"""Pages of a PDF as pictures, drawn in a process of their own.

PDFium is C++ that reads strangers' files: over there, under limits of its own, a document can
neither crash nor stall the server. ``python -m qwen2vl_serve.media.pdf`` is that process.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import resource
import subprocess
import sys
from typing import Any, NoReturn

from qwen2vl_serve.errors import InvalidImage, InvalidValue, TooManyItems

SECONDS = 20
"""Most time for one document, start of the process included."""

MEMORY_BYTES = 2 * 1024**3

_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")


def draw_pages(
    data: bytes, pages: str | None, *, max_pages: int, max_pixels: int, param: str
) -> list[bytes]:
    """Return each page as a PNG of about ``max_pixels``, in their order.

    ``pages`` is one page or a range, counted from 1: ``2``, ``1-3``, ``4-``; None means all.

    Raises:
        InvalidImage: damaged, locked, too slow, or PDFs cannot be drawn here.
        InvalidValue: ``pages`` names pages that the document does not have.
        TooManyItems: more than ``max_pages`` pages.
    """
    if importlib.util.find_spec("pypdfium2") is None:
        raise InvalidImage(
            f"{param} holds a PDF, which this server cannot draw: it lacks the extra pdf. Send "
            "the pages as pictures.",
            param=param,
        )
    wish = {"pages": pages, "max_pages": max_pages, "max_pixels": max_pixels}
    command = [sys.executable, "-m", "qwen2vl_serve.media.pdf", json.dumps(wish)]
    try:
        done = subprocess.run(  # noqa: S603  (our own module; the wish was validated)
            command,
            input=data,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            # Keys and tokens of the server are none of a document's business.
            env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        )
        head, _, body = done.stdout.partition(b"\n")
        report = json.loads(head)
    except (subprocess.TimeoutExpired, ValueError):
        # A crash, a limit or the time: all of them are the document's fault.
        report, body = {"fault": "damaged"}, b""
    if fault := report.get("fault"):
        _refuse(fault, report, wish, param)
    source = io.BytesIO(body)
    return [source.read(size) for size in report["sizes"]]


def _refuse(fault: str, report: dict[str, Any], wish: dict[str, Any], param: str) -> NoReturn:
    if fault == "range":
        raise InvalidValue(
            f"{param}: pages is {wish['pages']!r}, but the document has {report['pages']} pages.",
            param=param,
        )
    if fault == "count":
        raise TooManyItems(
            f"{param} asks for {report['asked']} pages of a PDF; at most {wish['max_pages']} are "
            'drawn: name some with pages, as "1-3".',
            param=param,
        )
    words = "is locked with a password" if fault == "locked" else "cannot be drawn"
    raise InvalidImage(
        f"{param} holds a PDF that {words}; send its pages as pictures.", param=param
    )


def _main(wish: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return a report, and the pages as PNG; runs in the process of its own."""
    import pypdfium2 as pdfium  # noqa: PLC0415  (an extra)

    try:
        document = pdfium.PdfDocument(data)
        document.init_forms()
        count = len(document)
    except pdfium.PdfiumError as error:
        locked = getattr(error, "err_code", None) == pdfium.raw.FPDF_ERR_PASSWORD
        return {"fault": "locked" if locked else "damaged"}, []
    first, last = _range(wish["pages"], count)
    if not 1 <= first <= last <= count:
        return {"fault": "range", "pages": count}, []
    if last - first + 1 > wish["max_pages"]:
        return {"fault": "count", "asked": last - first + 1}, []
    drawn = [_drawn(document[index], wish["max_pixels"]) for index in range(first - 1, last)]
    return {"sizes": [len(one) for one in drawn]}, drawn


def _range(pages: str | None, count: int) -> tuple[int, int]:
    if pages is None:
        return 1, count
    first, dash, last = pages.partition("-")
    if not dash:
        return int(first), int(first)
    return int(first), int(last) if last else count


def _drawn(page: Any, max_pixels: int) -> bytes:
    width, height = page.get_size()
    scale = math.sqrt(max_pixels / (width * height))
    target = io.BytesIO()
    page.render(scale=scale).to_pil().convert("RGB").save(target, "PNG", compress_level=1)
    return target.getvalue()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    report, drawn = _main(json.loads(sys.argv[1]), sys.stdin.buffer.read())
    sys.stdout.buffer.write(json.dumps(report).encode() + b"\n" + b"".join(drawn))
