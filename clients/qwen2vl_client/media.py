"""Pictures and videos as content parts of a chat message.

What a file is, its first bytes tell, not its name: a PNG saved as ``.jpg`` is sent as PNG.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from qwen2vl_client import pixels
from qwen2vl_client.errors import MediaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from qwen2vl_client.answer import StoredFile

ContentPart: TypeAlias = dict[str, Any]
#: A path, an ``http(s)://`` or ``data:`` URL, the bytes of a file, a file opened for reading
#: bytes, a Pillow image, a numpy array (uint8, [height, width] or [height, width, 3 or 4], RGB),
#: or an uploaded file: its id ("file-…") or what ``client.files`` returned.
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image"
    " | NDArray[np.uint8] | StoredFile"
)
#: A path, a URL, the bytes of a file, an uploaded file, or the frames in order: a list of
#: pictures, or one array [frames, height, width, 3].
VideoSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
    " | NDArray[np.uint8] | StoredFile | Sequence[ImageSource]"
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters and more: C:\ is a path
_SENT_AS_IS = ("http", "https")
_FILE_ID = re.compile(r"file-[A-Za-z0-9]{16,}")
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_SEE_THROUGH = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}


def image_part(source: ImageSource) -> ContentPart:
    """Return the ``image_url`` part for one picture; the server fetches http(s) URLs.

    Raises ``MediaError`` for a file that cannot be read and for bytes that are no picture.
    """
    uploaded = file_id(source)
    if uploaded is not None:
        return {"type": "image_url", "image_url": {"file_id": uploaded}}
    url = _given_url(source)
    if url is None:
        url = _data_url(*_picture(source))
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(source: VideoSource) -> ContentPart:
    """Return the ``video_url`` part for one video file or one list of frames.

    Frames travel as ``data:video/jpeg;base64,<frame 1>,<frame 2>,…``; each may be of any
    picture format, all must be of one size. Raises ``MediaError`` as ``image_part`` does.
    """
    uploaded = file_id(source)
    if uploaded is not None:
        return {"type": "video_url", "video_url": {"file_id": uploaded}}
    frames: list[Any] | None = None
    if isinstance(source, list | tuple) or pixels.is_array(source):
        if pixels.is_array(source) and cast("Any", source).ndim != 4:
            raise MediaError(
                f"an array {list(cast('Any', source).shape)} is no video: give [frames, height, "
                "width, 3], or a list of pictures"
            )
        frames = list(cast("Sequence[Any]", source))
    if frames is not None:
        if not frames:
            raise MediaError("a video given as frames needs at least one frame: the list is empty")
        joined = ",".join(base64.b64encode(_frame(frame)).decode("ascii") for frame in frames)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{joined}"}}
    url = _given_url(source)
    if url is None:
        data, name = _file_bytes(source, "video")
        mime = media_type(data)
        if mime is None or not mime.startswith("video/"):
            raise MediaError(
                f"{name} is {_described(data, mime)}, not a video (MP4, MOV, WebM, Matroska or "
                "AVI); pictures that are the frames of one video go into a list of their own: "
                "videos=[[frame1, frame2]]"
            )
        url = _data_url(data, mime)
    return {"type": "video_url", "video_url": {"url": url}}


def sources(given: Any) -> list[Any]:
    """Return a list of sources, also where a single one was given without a list."""
    if given is None:
        return []
    single = isinstance(given, str | os.PathLike | bytes | bytearray | memoryview)
    if single or _is_pixels(given) or hasattr(given, "read") or file_id(given):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise MediaError(f"{_kind(given)} is no picture: {_ACCEPTED}")
    return list(given)


def media_type(data: bytes) -> str | None:
    """Return the MIME type that the first bytes of a file prove, or None."""
    head = bytes(data[:32])
    for magic, mime in _MAGIC:
        if head.startswith(magic):
            return mime
    if head[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "video/mp4")
    return None


_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"BM", "image/bmp"),
    (b"\x1aE\xdf\xa3", "video/webm"),  # Matroska has the same magic and the same readers
)
# ISO base media files: the major brand after "ftyp"; what is not a picture is MP4 to readers.
_BRANDS = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heif",
    b"qt  ": "video/quicktime",
}
_ACCEPTED = (
    "give a path, a URL, the bytes of a file, an open file, a Pillow image, a numpy array or the "
    "id of an uploaded file"
)


def file_content(source: object) -> tuple[bytes, str]:
    """Return the bytes of anything that can be uploaded, and a name for them."""
    if _is_pixels(source):
        return _picture(source)[0], "picture.png"
    if file_id(source) or _given_url(source) is not None:
        raise MediaError(
            f"{_short(str(source))} is a URL or an uploaded file; give the file itself: a path, "
            "its bytes, an open file, a Pillow image or a numpy array"
        )
    data, _ = _file_bytes(source, "file")
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    named = isinstance(path, str | os.PathLike)
    return data, Path(os.fsdecode(path)).name if named and path else "file"


def file_id(source: object) -> str | None:
    """Return the id of an uploaded file; a local file of such a name is given as ``Path``."""
    if isinstance(source, str):
        return source if _FILE_ID.fullmatch(source) else None
    stored = getattr(source, "id", None)
    return stored if isinstance(stored, str) and _FILE_ID.fullmatch(stored) else None


def _given_url(source: object) -> str | None:
    if not isinstance(source, str):
        return None
    if source[:5].lower() == "data:":
        return source
    match = _SCHEME.match(source)
    if match is None:
        return None
    if match[1].lower() in _SENT_AS_IS:
        return source
    raise MediaError(
        f"{_short(source)}: URLs with {match[1]}:// cannot be sent, only http://, https:// and "
        "data:; give a local file as its path"
    )


def _picture(source: object) -> tuple[bytes, str]:
    if _is_pillow(source):
        return _encode_pillow(source), "image/png"
    if pixels.is_array(source):
        return pixels.png(source), "image/png"
    data, name = _file_bytes(source, "picture")
    mime = media_type(data)
    if mime is None or not mime.startswith("image/"):
        raise MediaError(
            f"{name} is {_described(data, mime)}, not a picture "
            "(JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC)"
        )
    return data, mime


def _frame(source: ImageSource) -> bytes:
    if file_id(source) or _given_url(source) is not None:
        raise MediaError(
            f"frame {_short(str(source))} is a URL or an uploaded file; frames are sent inline: "
            "give paths, bytes, Pillow images or arrays"
        )
    return _picture(source)[0]


def _file_bytes(source: object, what: str) -> tuple[bytes, str]:
    """Return the bytes and what to call them in an error."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), f"the {what} given as bytes"
    if hasattr(source, "read"):
        return _content(cast("IO[bytes]", source), what), f"the {what} read from an open file"
    if not isinstance(source, str | os.PathLike):
        raise MediaError(f"{_kind(source)} is no {what}: {_ACCEPTED}")
    if source == "":
        raise MediaError(f"an empty string names no {what}: {_ACCEPTED}")
    path = Path(os.fsdecode(source))
    name = _short(str(path))
    file = what if what == "file" else f"{what} file"
    try:
        # pathlib's own raises where it does not know the user, and "~x" may be a file.
        path = Path(os.path.expanduser(path))  # noqa: PTH111  (see above)
        if path.exists() and not path.is_file():
            raise MediaError(f"{name} is a folder or a device, not a {file}")
        return path.read_bytes(), name
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise MediaError(f"there is no {file} {name}{where}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"cannot read the {what} {name}: {reason}") from error


def _content(file: IO[bytes], what: str) -> bytes:
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)  # it may have been read for an earlier question, or just been written
        content = file.read()
    except (OSError, ValueError) as error:  # a closed one, or one that is open for writing
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"cannot read the {what} from its file ({reason}); give one that is open with mode 'rb'"
        ) from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise MediaError(
            f"the {what}'s file gave {type(content).__name__} and no bytes; open it with mode 'rb'"
        )
    return bytes(content)


def _is_pixels(source: object) -> bool:
    return _is_pillow(source) or pixels.is_array(source)


def _is_pillow(source: object) -> bool:
    # Whoever holds a Pillow image has imported Pillow; nobody else pays for the import.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(source, module.Image)


def _encode_pillow(source: Any) -> bytes:
    """Encode without loss, upright: PNG would drop the EXIF orientation of an opened photo."""
    from PIL import ImageOps  # noqa: PLC0415  (an option of the caller, not a dependency)

    try:
        upright = _writable(ImageOps.exif_transpose(source))
        buffer = io.BytesIO()
        upright.save(buffer, format="PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"the Pillow image cannot be encoded as PNG: {error}") from error
    return buffer.getvalue()


def _writable(picture: Any) -> Any:
    """Return a Pillow image in a mode that PNG holds; ``MediaError`` where its range is unknown."""
    if picture.mode in _PNG_MODES:
        return picture
    if picture.mode in _SEE_THROUGH:
        return picture.convert(_SEE_THROUGH[picture.mode])
    if picture.mode in ("I", "F"):
        # Pillow would cut the numbers to 0 to 255, which leaves a white or a black picture.
        raise MediaError(
            f"a Pillow image of mode {picture.mode} is no picture: its numbers may be of any "
            'range; scale them to 0 to 255 and give image.convert("L"), or where they are 16 bits '
            'of grey (0 to 65535) image.convert("I").convert("I;16")'
        )
    if picture.mode.startswith("I;16"):  # another order of its bytes
        return picture.convert("I").convert("I;16")
    return picture.convert("RGB")


def _data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _described(data: bytes, mime: str | None) -> str:
    if not data:
        return "empty"
    if mime is not None:
        return mime
    if data.startswith(b"%PDF"):
        return "a PDF"
    if b"<svg" in data[:1024]:
        return "an SVG"
    return f"of no known kind (it begins with {bytes(data[:8])!r})"


def _short(name: str) -> str:
    return repr(name) if len(name) <= 200 else f"{name[:60]!r}… ({len(name)} characters)"


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"
