"""What a message holds: texts, pictures and videos, in every dialect that clients speak.

Each dialect is read into ``ImagePart``, ``VideoPart`` or ``FramesPart``, so that nothing below this
module knows more than those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """An object of a request: nothing is coerced, nothing unknown is taken, nothing changes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


TEXT_TYPES = {"input_text": "text", "output_text": "text"}
"""What OpenAI's Responses call a text, by who says it; vLLM takes them in chats as well."""


def _text_type(value: Any) -> Any:
    return TEXT_TYPES.get(value, value) if isinstance(value, str) else value


class TextPart(Strict):
    """``{"type": "text", "text": …}``, also by the types of OpenAI's Responses."""

    type: Annotated[
        Literal["text"],
        BeforeValidator(
            _text_type, json_schema_input_type=Literal["text", "input_text", "output_text"]
        ),
    ]
    text: str


MOST = 2**31 - 1
"""Of any whole number: beyond all that is served, within what floats and the engine can hold."""

Positive = Annotated[int, Field(ge=1, le=MOST)]


class PixelFields(Strict):
    """How large the model shall see a picture, in pixels; clamped to the profile's bounds."""

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    resized_height: Positive | None = None
    resized_width: Positive | None = None


Rate = Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)]
"""Frames a second."""

Frames = Annotated[int, Field(ge=2, le=MOST)]


class VideoFields(PixelFields):
    """Which frames of a video the model shall see, and how large; names of qwen_vl_utils.

    ``min_pixels`` and ``max_pixels`` bound one frame, ``total_pixels`` all of them together.
    """

    fps: Rate | None = None
    nframes: Frames | None = None
    min_frames: Positive | None = None
    max_frames: Frames | None = None
    total_pixels: Positive | None = None


UPLOAD = "upload:"
"""Scheme under which an uploaded file's id is an address like any other."""

NonEmpty = Annotated[str, Field(min_length=1)]
Detail = Literal["auto", "low", "high"]


class Addressed(Strict):
    """What is shown: by ``url`` (``http(s)``, base64 ``data:``, ``file:``) or by ``file_id``."""

    url: NonEmpty | None = None
    file_id: NonEmpty | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "url", "file_id")
        return self

    @property
    def address(self) -> str:
        """Where the bytes are: ``url``, or ``upload:`` and the file's id."""
        return self.url or f"{UPLOAD}{self.file_id}"


class ImageURL(PixelFields, Addressed):
    """A picture by its address.

    ``detail`` ``auto`` and ``high`` both mean the profile's default, ``low`` 448 × 448 pixels.
    """

    detail: Detail | None = None


class PictureFields(PixelFields):
    """What stands beside a picture; of a PDF, ``pages`` are shown: ``2``, ``1-3`` or ``4-``."""

    pages: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}(-([1-9][0-9]{0,4})?)?$")] | None = None


class ImagePart(PictureFields):
    """``{"type": "image_url", "image_url": {"url": …}}``, pixel fields beside it or inside."""

    type: Literal["image_url"]
    image_url: ImageURL
    detail: Detail | None = None

    _key: str = PrivateAttr("image_url")
    _of_video: VideoFields | None = PrivateAttr(None)
    _page: bytes | None = PrivateAttr(None)
    _further: bool = PrivateAttr(False)

    @property
    def key(self) -> str:
        """Under which key of the part the client put the picture."""
        return self._key

    @property
    def of_video(self) -> VideoFields | None:
        """What a ``file`` part says for the case that it is a video."""
        return self._of_video

    @property
    def page(self) -> bytes | None:
        """The picture itself, where it was drawn from a PDF."""
        return self._page

    @property
    def further(self) -> bool:
        """Whether it stands for one more page of the part before it, in the client's request."""
        return self._further

    def showing(self, pages: Sequence[bytes]) -> list[ImagePart]:
        """Return parts like this one, one for each drawn page."""
        parts: list[ImagePart] = []
        for page in pages:
            part = self.model_copy(update={"pages": None})
            part._page, part._further = page, bool(parts)
            parts.append(part)
        return parts


class FileReference(Strict):
    """OpenAI's object of an uploaded file, or of one that is sent along as a ``data:`` URL."""

    file_id: NonEmpty | None = None
    file_data: NonEmpty | None = None
    filename: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "file_id", "file_data")
        return self


class FilePart(VideoFields, PictureFields):
    """OpenAI's ``{"type": "file", "file": {"file_id": …}}``; it becomes an ``ImagePart``.

    What the file is, is known when it is read: the video fields are for the case that it is one.
    """

    type: Literal["file"]
    file: FileReference


class InputImagePart(PictureFields):
    """``input_image`` of OpenAI's Responses; it becomes an ``ImagePart``."""

    type: Literal["input_image"]
    image_url: NonEmpty | None = None
    file_id: NonEmpty | None = None
    detail: Detail | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "image_url", "file_id")
        return self


def _need_one_of(model: BaseModel, first: str, second: str) -> None:
    if (getattr(model, first) is None) == (getattr(model, second) is None):
        raise PydanticCustomError("one_of", "give one", {"names": (first, second)})


def _from_file(value: object) -> ImagePart:
    given = FilePart.model_validate(value)
    part = _image_part(given, "file", file_id=given.file.file_id, url=given.file.file_data)
    part._of_video = VideoFields(**given.model_dump(include=set(VideoFields.model_fields)))
    return part


def _from_input_image(value: object) -> ImagePart:
    part = InputImagePart.model_validate(value)
    key = "file_id" if part.image_url is None else "image_url"
    return _image_part(part, key, url=part.image_url, file_id=part.file_id, detail=part.detail)


def _image_part(given: PictureFields, key: str, **inside: Any) -> ImagePart:
    beside = given.model_dump(include=set(PictureFields.model_fields))
    part = ImagePart(type="image_url", image_url=ImageURL(**inside), **beside)
    part._key = key
    return part


class VideoURL(VideoFields, Addressed):
    """A video by its address.

    The ``url`` may hold its frames as ``data:video/jpeg;base64,<f1>,<f2>…``.
    """


class VideoPart(VideoFields):
    """``{"type": "video_url", "video_url": {"url": …}}``, video fields beside it or inside."""

    type: Literal["video_url"]
    video_url: VideoURL

    _key: str = PrivateAttr("video_url")

    @property
    def key(self) -> str:
        """Under which key of the part the client put the video."""
        return self._key

    @classmethod
    def of_file(cls, part: ImagePart) -> VideoPart:
        """Return the video that a ``file`` part turned out to be, with its fields."""
        beside = {} if part.of_video is None else part.of_video.model_dump()
        video = cls(type="video_url", video_url=VideoURL(url=part.image_url.address), **beside)
        video._key = part.key
        return video


def text_or_parts(value: object) -> str:
    """Return the tag of a union of a text and something else."""
    return "@text" if isinstance(value, str) else "@parts"


class FramesPart(VideoFields):
    """``{"type": "video", "video": [url, …]}``: a video as its frames, in their order.

    Of frames ``fps`` is the rate at which they were taken. One address is a video's.
    """

    type: Literal["video"]
    video: Annotated[
        Annotated[NonEmpty, Tag("@text")]
        | Annotated[list[NonEmpty], Field(min_length=1), Tag("@parts")],
        Discriminator(text_or_parts),
    ]


def _part_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"@{_text_type(kind)}" if isinstance(kind, str) else None


# Tags begin with "@" so that an error's location can drop them again.
UserPart = Annotated[
    Annotated[TextPart, Tag("@text")]
    | Annotated[ImagePart, Tag("@image_url")]
    | Annotated[
        ImagePart, BeforeValidator(_from_file, json_schema_input_type=FilePart), Tag("@file")
    ]
    | Annotated[
        ImagePart,
        BeforeValidator(_from_input_image, json_schema_input_type=InputImagePart),
        Tag("@input_image"),
    ]
    | Annotated[VideoPart, Tag("@video_url")]
    | Annotated[FramesPart, Tag("@video")],
    Discriminator(_part_kind),
]
UserContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[UserPart], Field(min_length=1), Tag("@parts")],
    Discriminator(text_or_parts),
]
TextContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextPart], Field(min_length=1), Tag("@parts")],
    Discriminator(text_or_parts),
]
