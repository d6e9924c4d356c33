"""Where the requests of a batch come from: lists, generators, JSONL, CSV, folders."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.media import file_id
from qwen2vl_client.request import SYSTEM_PROMPT, has_system
from qwen2vl_client.tasks.task import Task, as_reply

UTF_8 = "utf-8-sig"
"""UTF-8, with the mark at its beginning that Excel writes, or without."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
)
_LISTED = ("image", "images", "video", "videos")
_OWN = frozenset({"id", "custom_id", "text", "system", "messages", *_LISTED})
_COLUMNS = ("id", "text", "image", "video", "system")
_ASKING = frozenset({"text", "image", "video"})
_ENVELOPE = frozenset({"method", "url"})  # of a line of OpenAI's batch API, beside its body


@dataclass(frozen=True)
class Request:
    """A question with a name of its own; ``index`` is its place in the batch."""

    index: int
    id: str
    task: Task[Any]

    @cached_property
    def fingerprint(self) -> str:
        """Return what tells this request from another after a restart (SHA-256, shortened).

        Files count by name and uploaded ones by id; bytes, pixels and files without a name by
        content.
        """
        task = self.task
        said = {
            "text": task.text,
            "media": [_token(one) for one in (*task.images, *task.videos)],
            "video": dict(task.video_fields),
            "system": task.system,
            "messages": task.messages,
            "fields": {**task.defaults, **task.fields},
        }
        raw = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def with_fields(self, fields: Mapping[str, Any]) -> Request:
        """Return the request with fields of the API, where it does not give them itself.

        ``system`` among them is for requests without a system message of their own.
        """
        given = {**fields, **self.task.fields}
        if _has_system(self.task) and "system" not in self.task.fields:
            given.pop("system", None)
        return replace(self, task=replace(self.task, fields=given))


def numbered(items: Iterable[Any]) -> Iterator[Request]:
    """Yield the requests, read one at a time.

    An item is a question (a string), a ``Task``, a ``Request``, a pair of id and ``Task``, or a
    mapping as of a JSONL line. Without an id the place is the id.
    """
    for index, item in enumerate(items):
        yield as_request(item, index)


def as_request(item: Any, index: int) -> Request:
    """Return an item as a request; ``InvalidArgumentError`` names its place where it is none."""
    if isinstance(item, Request):
        return Request(index, item.id, item.task)
    if isinstance(item, Task):
        return Request(index, str(index), item)
    if isinstance(item, str):
        return Request(index, str(index), Task(item, as_reply))
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Task):
        return Request(index, str(item[0]), item[1])
    if isinstance(item, Mapping):
        return _from_mapping(item, index)
    raise InvalidArgumentError(
        f"request {index} is a {type(item).__name__}: give a text, a Task (ocr.task(…)), a pair of "
        "id and Task, or a mapping with text, image, …"
    )


def from_jsonl(
    path: str | os.PathLike[str],
    *,
    each: Callable[[dict[str, Any]], Task[Any]] | None = None,
    encoding: str = UTF_8,
) -> Iterator[Request]:
    """Yield the requests of a JSONL file, a JSON object a line.

    ``{"id": …, "text": …, "image": … or "images": […], "system": …}`` with any field of the API
    beside, or a line of OpenAI's batch API. Relative paths of pictures start at the file's folder.
    Or ``each`` makes a task of an object, with relative paths left as they are.
    """
    index = 0
    for number, line in enumerate(_lines(path, encoding), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = str(error)
            if isinstance(error, json.JSONDecodeError):  # the line is ours to count
                told = f"{error.msg} at column {error.pos + 1}"
            raise InvalidArgumentError(f"{path}, line {number} is no JSON: {told}") from error
        if not isinstance(value, dict):
            raise InvalidArgumentError(f"{path}, line {number} is no JSON object")
        if each is not None:
            yield Request(index, _id_of(value, index), each(value))
        else:
            yield _from_mapping(value, index, Path(path).parent)
        index += 1


def from_csv(
    path: str | os.PathLike[str],
    *,
    each: Callable[[dict[str, str]], Task[Any]] | None = None,
    encoding: str = UTF_8,
) -> Iterator[Request]:
    """Yield a request for each row of a CSV file with headings; a row of empty cells is none.

    The columns ``id``, ``text``, ``image``, ``video`` and ``system`` mean what they say, others
    nothing; or ``each`` makes a task of a row, with relative paths left as they are. Excel in
    Chinese writes ``encoding="gb18030"``.
    """
    for index, row in enumerate(_rows(path, encoding)):
        if each is not None:
            yield Request(index, row.get("id") or str(index), each(row))
            continue
        if not row.keys() & _ASKING:
            found = ", ".join(repr(key) for key in row if key is not None)
            raise InvalidArgumentError(
                f"{path} has the headings {found}, and none of them is text, image or video: its "
                "first line must name the columns, parted by commas"
            )
        known = {key: row[key] for key in _COLUMNS if row.get(key)}
        yield _from_mapping(known, index, Path(path).parent)


def from_folder(
    folder: str | os.PathLike[str], each: Callable[[Path], Task[Any]]
) -> Iterator[Request]:
    """Yield a request for each picture of a folder, by name; the name is the id.

    Hidden files are none: macOS leaves a ``._photo.jpg`` that is no picture beside each.
    """
    for index, picture in enumerate(sorted(_pictures(folder))):
        yield Request(index, picture.name, each(picture))


def opened(
    given: Any, each: Callable[[Any], Task[Any]] | None = None, encoding: str = UTF_8
) -> tuple[Iterator[Request], int | None]:
    """Return the requests that a batch was given, and how many, where that is known."""
    if not isinstance(given, str | os.PathLike):
        items = given if each is None else (each(item) for item in given)
        return numbered(items), len(given) if hasattr(given, "__len__") else None
    path = Path(given)
    if path.is_dir():
        if each is None:
            raise InvalidArgumentError(
                f"{path} is a folder: say what to ask of each picture, as each=ocr.task"
            )
        return from_folder(path, each), len(_pictures(path))
    if not path.is_file():
        raise InvalidArgumentError(f"there is no file or folder {path} (a question goes in a list)")
    if path.suffix.lower() == ".csv":
        count = sum(1 for _ in _rows(path, encoding))
        return from_csv(path, each=each, encoding=encoding), count
    with path.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    return from_jsonl(path, each=each, encoding=encoding), count


def _pictures(folder: str | os.PathLike[str]) -> list[Path]:
    return [
        one
        for one in Path(folder).iterdir()
        if one.suffix.lower() in SUFFIXES and not one.name.startswith(".")
    ]


def _lines(
    path: str | os.PathLike[str], encoding: str, newline: str | None = None
) -> Iterator[str]:
    """Yield the lines of a text file; ``InvalidArgumentError`` where they cannot be read."""
    try:
        if codecs.lookup(encoding).name == "utf-8":
            encoding = UTF_8
        with Path(path).open(encoding=encoding, newline=newline) as lines:
            yield from lines
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror or error}") from error
    except (LookupError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read as {encoding}: {error}; say which encoding it has (Excel in "
            "Chinese: gb18030)"
        ) from error


def _rows(path: str | os.PathLike[str], encoding: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file by its headings; ``InvalidArgumentError`` names a bad line.

    Excel writes rows of nothing but commas where something stood once.
    """
    rows = csv.DictReader(_lines(path, encoding, newline=""))
    try:
        for row in rows:
            if any(row[heading] for heading in rows.fieldnames or ()):
                yield row
    except csv.Error as error:
        raise InvalidArgumentError(
            f"{path}, line {rows.line_num + 1}: {error}; is a quote left open? Longer texts go in "
            "a .jsonl file"
        ) from error


def _from_mapping(item: Mapping[str, Any], index: int, folder: Path | None = None) -> Request:
    named = _id_of(item, index)
    body = item["body"] if isinstance(item.get("body"), Mapping) else item
    images = [_placed(one, folder) for key in ("image", "images") for one in _many(body.get(key))]
    videos = [_placed(one, folder) for key in ("video", "videos") for one in _many(body.get(key))]
    messages = body.get("messages") or ()
    if not (body.get("text") or messages or images or videos):
        raise InvalidArgumentError(
            f"request {named} asks nothing: it needs text, image, video or messages"
        )
    fields = {key: value for key, value in body.items() if key not in _OWN | _ENVELOPE}
    # A whole conversation is sent as it is; a question gets the usual system prompt.
    system = body.get("system", None if messages else SYSTEM_PROMPT)
    task = Task(
        body.get("text"),
        as_reply,
        tuple(images),
        tuple(videos),
        system=system,
        messages=messages,
        fields=fields,
    )
    return Request(index, named, task)


def _id_of(item: Mapping[str, Any], index: int) -> str:
    name = item.get("id", item.get("custom_id"))
    return str(index if name is None else name)


def _has_system(task: Task[Any]) -> bool:
    """Tell whether a system message was given, or that there is to be none."""
    if task.messages and task.system is None:
        return has_system(task.messages)
    return task.system != SYSTEM_PROMPT


def _many(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _placed(source: Any, folder: Path | None) -> Any:
    """Return a relative path as seen from ``folder``; addresses and all else as they are.

    The id of an uploaded file is one, unless a file of that name stands there.
    """
    if isinstance(source, list):
        return [_placed(one, folder) for one in source]
    if folder is None or not isinstance(source, str) or "://" in source or source[:5] == "data:":
        return source
    path = folder / source
    # pathlib's own raises for a name that is too long to be one.
    return source if file_id(source) and not os.path.isfile(path) else path  # noqa: PTH113


def _token(source: Any) -> str:
    """Return what stands for a picture or video: a name, or a digest of what has none."""
    name = source if isinstance(source, str | os.PathLike) else file_id(source)
    if name is None:
        name = getattr(source, "name", None)
    if isinstance(name, str | os.PathLike):
        return os.fsdecode(name)
    if isinstance(source, list | tuple):
        return json.dumps([_token(one) for one in source])
    content, shape = _content(source)
    if content is None:
        return type(source).__name__
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return f"{shape}{hashlib.sha256(raw).hexdigest()}"


def _content(source: Any) -> tuple[Any, str]:
    """Return what is hashed, and the shape that pixels have; None for what cannot be read twice."""
    if isinstance(source, bytes | bytearray | memoryview):
        return source, ""
    if hasattr(source, "dtype"):  # numpy's arrays
        return source.tobytes(), f"{source.shape} {source.dtype} "
    if hasattr(source, "tobytes"):  # Pillow's images
        return source.tobytes(), f"{(source.size, source.mode)} "
    if hasattr(source, "getvalue"):  # a file in memory
        return source.getvalue(), ""
    if hasattr(source, "seekable") and source.seekable():  # a temporary file
        source.seek(0)
        return source.read(), ""
    return None, ""
