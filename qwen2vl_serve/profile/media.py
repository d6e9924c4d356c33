"""The sections ``media`` and ``files`` of a profile: pictures, videos, uploads."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen2vl_serve.profile.sections import Port, Positive, Section, Text, contradiction

ImageFormat = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"]

# What IDNA takes for dots (RFC 3490, 3.1).
_DOTS = re.compile("[\u3002\uff0e\uff61]")
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)$)[a-z0-9_-]{1,63}")
"""A name in ASCII; one whose last label is a number is read as an address in old notations."""
_HOST = re.compile(
    r"\s*(?:(?:[\w+.-]*:)?//)?(?:[^/@]*@)?(?:\*\.)?([^/\\?#:\s]+)(?::\d+)?\s*(?:[/\\?#].*)?"
)
"""Finds the host in what looks like an address of a page, or has a wildcard before it."""


def _as_name(text: str) -> str:
    """Return a domain as hosts of URLs are compared: lower case, ASCII, without outer dots.

    Raises:
        ValueError: it is none.
    """
    name = _DOTS.sub(".", text).removeprefix(".").removesuffix(".")
    if not name.isascii():
        import idna  # noqa: PLC0415  # large tables, for few profiles

        # As yarl does with a URL's host: IDNA 2008, and 2003 for what that does not know.
        try:
            name = idna.encode(name, uts46=True).decode()
        except UnicodeError:
            name = name.encode("idna").decode()
    name = name.lower()
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ValueError("no domain name")
    return name


def _as_name_or_address(text: str) -> str:
    try:
        return _as_name(text)
    except ValueError:
        if "%" in text:  # an interface, which no URL may name
            raise
        return str(ip_address(text))


def _host_of(kind: str, parse: Callable[[str], str]) -> Callable[[str], str]:
    def parsed(text: str) -> str:
        with suppress(ValueError):
            return parse(text)
        example = "example.org"
        if found := _HOST.fullmatch(text):
            with suppress(ValueError):
                example = parse(found[1])
        raise PydanticCustomError(
            "no_domain",
            "must be {kind} alone, without scheme, port, path or *, as {example}",
            {"kind": kind, "example": example},
        )

    return parsed


Domain = Annotated[Text, AfterValidator(_host_of("a domain name", _as_name))]
Host = Annotated[Text, AfterValidator(_host_of("a domain name or address", _as_name_or_address))]


ENVIRONMENT = "environment"
"""The word for proxies that the variables of the environment name."""


def proxy_variable(scheme: str, names: Collection[str]) -> str:
    """Return which of an environment's ``names`` gives the proxy: small letters are heard first."""
    name = f"{scheme}_proxy"
    return name if name in names else next(n for n in names if n.lower() == name)


def proxy_address(text: str) -> str:
    """Return the address of an HTTP proxy as it is, perhaps with a user and a password.

    Raises:
        ValueError: it is none; the text completes a sentence and does not quote it.
    """
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("must be ASCII without blanks; write %20 and the like in a password")
    try:
        parsed = urlsplit(text)
        host, _ = parsed.hostname, parsed.port
    except ValueError:
        host = None
    whole = host and not parsed.path.strip("/") and not parsed.query and not parsed.fragment
    if not whole or parsed.scheme not in ("http", "https"):
        raise ValueError("must be the address of an HTTP proxy, as http://proxy.example.org:3128")
    return text


def _as_proxy(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value() != ENVIRONMENT:
        try:
            proxy_address(secret.get_secret_value())
        except ValueError as error:
            raise PydanticCustomError(
                "no_proxy", "{problem}; or the word environment", {"problem": str(error)}
            ) from None
    return secret


def _refuse_bad_bounds(bounds: MediaSection | VideoPixels, section: str) -> None:
    if bounds.min_pixels > bounds.max_pixels:
        raise contradiction(
            f"is {bounds.min_pixels}, above max_pixels {bounds.max_pixels}; lower one or raise "
            "the other",
            f"{section}.min_pixels",
        )
    if bounds.least_pixels > bounds.min_pixels:
        raise contradiction(
            f"is {bounds.least_pixels}, above min_pixels {bounds.min_pixels}; lower it",
            f"{section}.client_min_pixels",
        )
    if bounds.most_pixels < bounds.max_pixels:
        raise contradiction(
            f"is {bounds.most_pixels}, below max_pixels {bounds.max_pixels}; raise it",
            f"{section}.client_max_pixels",
        )


class MediaLimits(Section):
    """How many of each kind one request may hold; what is not named is refused."""

    image: Annotated[int, Field(ge=0, le=512)] = Field(
        default=0, description="Most pictures a request."
    )
    video: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Most videos a request."
    )


class VideoIO(Section):
    """How frames are taken from a video."""

    fps: Annotated[float, Field(gt=0, le=30)] | None = Field(
        default=None,
        description="Frames taken a second, where a request says nothing. Unset: 2.",
    )
    num_frames: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Most frames that the model sees of one video. Unset: 768, as qwen-vl-utils.",
    )


class MediaIO(Section):
    """How media are decoded, by kind."""

    video: VideoIO = Field(default=VideoIO(), description="Sampling of frames.")


class VideoPixels(Section):
    """Bounds of one frame; the defaults are those of qwen-vl-utils."""

    min_pixels: Positive = Field(
        default=128 * 28 * 28,
        description="Smaller frames are enlarged to about this many pixels.",
    )
    max_pixels: Positive = Field(
        default=768 * 28 * 28,
        description="Larger frames are reduced to at most this many pixels; two frames of "
        "28 × 28 pixels become one token.",
    )
    client_min_pixels: Positive | None = Field(
        default=None,
        description="Least that a request's own fields may ask of a frame. Unset: `min_pixels`.",
    )
    client_max_pixels: Positive | None = Field(
        default=None,
        description="Most that a request's own fields may ask of a frame. Unset: `max_pixels`.",
    )
    total_pixels: Positive = Field(
        default=int(128_000 * 28 * 28 * 0.9),
        description="Most pixels that all frames of one video share; many frames are reduced so "
        "far, but not below 1.05 × `min_pixels` each.",
    )

    @property
    def least_pixels(self) -> int:
        """Lower bound of a frame's pixels, whatever a request asks for."""
        return self.min_pixels if self.client_min_pixels is None else self.client_min_pixels

    @property
    def most_pixels(self) -> int:
        """Upper bound of a frame's pixels, whatever a request asks for."""
        return self.max_pixels if self.client_max_pixels is None else self.client_max_pixels

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        _refuse_bad_bounds(self, "media.videos_kwargs")
        return self


class MediaSection(Section):
    """Pictures and videos."""

    limit_mm_per_prompt: MediaLimits = Field(
        default=MediaLimits(image=1),
        description="Most media a request; a kind that is not named is limited to 0.",
    )
    min_pixels: Positive = Field(
        default=4 * 28 * 28,
        description="Smaller pictures are enlarged to about this many pixels.",
    )
    max_pixels: Positive = Field(
        default=1280 * 28 * 28,
        description="Larger pictures are reduced to at most this many pixels; "
        "28 × 28 pixels become one token.",
    )
    client_min_pixels: Positive | None = Field(
        default=None,
        description="Least that a request's own pixel fields may ask for. Unset: `min_pixels`.",
    )
    client_max_pixels: Positive | None = Field(
        default=None,
        description="Most that a request's own pixel fields may ask for; vLLM reserves memory for "
        "it. Unset: `max_pixels`.",
    )
    max_image_pixels: Annotated[int, Field(ge=1, le=2**30)] = Field(
        default=100_000_000,
        description="Largest picture that is decoded, in pixels of the file.",
    )
    max_video_bytes: Positive = Field(
        default=64 * 1024 * 1024,
        description="Largest video in bytes, from wherever it comes; of a list, its frames' sum.",
    )
    max_video_frames: Positive = Field(
        default=18_000, description="Longest video that is decoded, in frames of the file."
    )
    max_video_pixels: Positive = Field(
        default=4096 * 2304,
        description="Largest video that is decoded, in pixels of one frame of the file.",
    )
    video_decode_seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="Time for one video from its header to its last frame; waiting is not counted.",
    )
    max_decoding_bytes: Positive = Field(
        default=2 * 1024**3,
        description="Memory that decoding takes at once over all requests, in bytes, counted by "
        "what a pixel of each format was measured to take: from 8 bytes to 24, and 192 "
        "in one frame of a video. What comes then waits; one that takes more by itself is decoded "
        "alone.",
    )
    max_held_bytes: Positive = Field(
        default=2 * 1024**3,
        description="Bytes of files that all requests hold at once, from their arrival to the "
        "first token; further ones wait. A single request holds at most `limits.max_media_bytes`.",
    )
    fast_decode: bool = Field(
        default=False,
        description="Decode JPEGs at the nearest of 1/2, 1/4 and 1/8 of their size that is not "
        "below the model's: faster, but no longer the reference's pixels to the bit.",
    )
    max_download_bytes: Positive = Field(
        default=32 * 1024 * 1024, description="Largest file that is fetched by URL, in bytes."
    )
    download_seconds: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="Time for fetching one file, redirects and all."
    )
    proxy: Annotated[SecretStr, AfterValidator(_as_proxy)] | None = Field(
        default=None,
        description="HTTP proxy that media are fetched through, as `http://user:password@host:3128`,"
        " or `environment`: those of `HTTP_PROXY` and `HTTPS_PROXY`, but for what `NO_PROXY` "
        "names. It is told addresses that were judged here, not names. Unset: none, whatever the "
        "environment says.",
    )
    allowed_ports: Annotated[tuple[Port, ...], Field(strict=False)] = Field(
        default=(80, 443), description="Ports that URLs may name."
    )
    allowed_domains: Annotated[tuple[Host, ...], Field(strict=False)] = Field(
        default=(),
        description="Domains, with their subdomains, and addresses that media may be fetched "
        "from, as `example.org`; no scheme, port or `*`. Empty: all.",
    )
    denied_domains: Annotated[tuple[Domain, ...], Field(strict=False)] = Field(
        default=(),
        description="Domains, with their subdomains, that nothing is fetched from, as "
        "`example.org`; no scheme, port or `*`. By their addresses they can still be reached.",
    )
    allowed_networks: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Networks in CIDR notation that may be fetched from though they are not "
        "public, as `10.0.0.0/8`; without it no URL reaches this machine or its network. Of a "
        "name, every address has to be in them or public.",
    )
    allowed_local_paths: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Folders on the server that `file:///…` addresses may lead into. Empty: none.",
    )
    formats: Annotated[tuple[ImageFormat, ...], Field(strict=False, min_length=1)] = Field(
        default=("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"),
        description="Formats of pictures that are taken, as far as the installed Pillow decodes "
        "them; HEIC needs the extra `heif`.",
    )
    max_pdf_pages: Annotated[int, Field(ge=0, le=512)] = Field(
        default=16,
        description="Most pages that one PDF may be shown by, each of them a picture; needs the "
        "extra `pdf`. 0 refuses PDFs.",
    )
    pdf_cache_bytes: Annotated[int, Field(ge=0)] = Field(
        default=64 * 1024 * 1024,
        description="Memory for drawn pages of PDFs, which are shown again without drawing them "
        "anew.",
    )
    videos_kwargs: VideoPixels = Field(
        default=VideoPixels(), description="Bounds of a video's frames, where videos are allowed."
    )
    media_io_kwargs: MediaIO = Field(default=MediaIO(), description="Decoding of videos.")

    @property
    def least_pixels(self) -> int:
        """Lower bound of a picture's pixels, whatever a request asks for."""
        return self.min_pixels if self.client_min_pixels is None else self.client_min_pixels

    @property
    def most_pixels(self) -> int:
        """Upper bound of a picture's pixels, whatever a request asks for."""
        return self.max_pixels if self.client_max_pixels is None else self.client_max_pixels

    @property
    def proxy_is_secret(self) -> bool:
        """Whether ``proxy`` has a user or a password in it."""
        return self.proxy is not None and "@" in self.proxy.get_secret_value()

    @field_serializer("proxy", when_used="json-unless-none")
    def _without_password(self, proxy: SecretStr) -> str:
        _, at, place = proxy.get_secret_value().rpartition("@")
        return f"…@{place}" if at else place

    @field_validator("allowed_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ip_network(network)
            except ValueError as error:
                raise PydanticCustomError(
                    "no_network",
                    "must be networks in CIDR notation, as 10.0.0.0/8 ({problem})",
                    {"problem": str(error)},
                ) from None
        return networks

    @field_validator("allowed_local_paths")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not Path(path).expanduser().is_absolute():
                raise PydanticCustomError(
                    "not_absolute", "must name folders from the root, as /srv/pictures"
                )
        return paths

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        _refuse_bad_bounds(self, "media")
        return self


class FilesSection(Section):
    """Uploads: `POST /v1/files`."""

    max_files: Annotated[int, Field(ge=0)] = Field(
        default=1000,
        description="Most files that are kept; what was unused the longest makes room for new "
        "ones. 0 turns uploads off.",
    )
    max_bytes: Positive = Field(
        default=1024**3, description="Most bytes that all files take together."
    )
    max_file_bytes: Positive = Field(
        default=32 * 1024 * 1024, description="Largest file that is taken, in bytes."
    )
    ttl_seconds: Annotated[float, Field(gt=0)] = Field(
        default=86400.0, description="How long a file is kept, from its last upload."
    )
    folder: Text | None = Field(
        default=None,
        description="Folder that keeps the files from one run of the server to the next; no two "
        "servers may share it. Unset: a temporary folder, removed when the server stops.",
    )

    @model_validator(mode="after")
    def _quota(self) -> Self:
        if self.max_file_bytes > self.max_bytes:
            raise contradiction(
                f"is {self.max_file_bytes}, above max_bytes {self.max_bytes}; lower it",
                "files.max_file_bytes",
            )
        return self
