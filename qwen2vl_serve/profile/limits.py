"""The sections ``limits``, ``overflow`` and ``batches``: what requests may ask for."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen2vl_serve.profile.sections import Positive, Section, Text, contradiction

Overflow = Literal["error", "shrink", "drop_oldest_images", "drop_oldest_turns", "summarise"]
"""What to do with a request that does not fit into the context window."""


class LimitsSection(Section):
    """What one request may ask for, and all of them together."""

    max_body_bytes: Positive = Field(
        default=64 * 1024 * 1024,
        description="Largest request body in bytes; pictures come as base64.",
    )
    max_media_bytes: Positive = Field(
        default=128 * 1024 * 1024,
        description="Most bytes of all pictures and videos of a request, fetched ones as well.",
    )
    max_media_pixels: Positive = Field(
        default=200_000_000,
        description="Most pixels of all pictures and taken frames of a request, at their own size.",
    )
    max_media_frames: Positive = Field(
        default=1536, description="Most frames taken from all videos of a request."
    )
    max_header_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=32 * 1024, description="Most bytes of a request line and its headers."
    )
    header_seconds: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="Seconds within which a request's headers have to come."
    )
    body_seconds: Annotated[float, Field(gt=0)] = Field(
        default=120.0, description="Seconds within which a request's body has to come."
    )
    reader_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="Seconds that a client may leave its answer unread before it is cut off.",
    )
    max_messages: Positive = Field(default=1000, description="Most messages in one request.")
    overflow: Overflow = Field(
        default="error",
        description="What to do with a request that does not fit into `max_model_len`, unless it "
        "says so itself: refuse it, shrink its pictures, drop pictures of earlier turns or those "
        "turns, or have the model summarise them.",
    )
    reserved_tokens: Literal["refuse", "escape"] = Field(
        default="refuse",
        description="What to do with the model's control tokens in texts: refuse the request, or "
        "let the model read them as ordinary characters.",
    )
    max_n: Positive = Field(default=8, description="Most answers (`n`) to one request.")
    max_tokens: Positive | None = Field(
        default=None, description="Most tokens of one answer. Unset: what `max_model_len` leaves."
    )
    max_in_flight: Positive = Field(
        default=256,
        description="Most answers that are worked on at once, from the first download to the last "
        "token; `n` answers count as so many. Further requests wait.",
    )
    max_starting: Positive | None = Field(
        default=None,
        description="Most of the streamed answers among them that have no token yet; further ones "
        "wait. Each one's first token waits for the pictures and prompts of the others: a small "
        "number keeps it early under load. Unset: as many as `max_in_flight`.",
    )
    max_visual_tokens: Positive = Field(
        default=131072,
        description="Most visual tokens of all requests that are worked on; known from the "
        "headers of pictures and videos, before they are decoded.",
    )
    max_queued: Annotated[int, Field(ge=0)] = Field(
        default=256,
        description="Most requests that wait, each key's in its turn. Further ones are refused.",
    )
    queue_seconds: Annotated[float, Field(ge=0)] = Field(
        default=2.0,
        description="Longest that a request waits. One that would wait longer, as fast as places "
        "become free at present, is refused at once.",
    )
    max_held_body_bytes: Positive = Field(
        default=1024**3,
        description="Most bytes of request bodies that are held at once; what exceeds them is "
        "refused.",
    )


class OverflowSection(Section):
    """What requests may ask for where they do not fit, and how summaries are made."""

    allowed: Annotated[tuple[Overflow, ...], Field(strict=False)] = Field(
        default=("error", "shrink", "drop_oldest_images", "drop_oldest_turns", "summarise"),
        description="Values that a request may give as `overflow`; `summarise` costs a further "
        "answer of the model.",
    )
    summary_max_tokens: Positive = Field(
        default=256,
        description="Most tokens of a summary; never more than a quarter of `max_model_len`.",
    )
    summary_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="What the model is asked for a summary with. Unset: a prompt of this "
        "package, in English or Chinese as the conversation is.",
    )


class BatchesSection(Section):
    """Batches: `POST /v1/batches`, worked on while nobody waits."""

    enabled: bool = Field(
        default=False, description="Take batches, and files of the purpose `batch`."
    )
    folder: Text | None = Field(
        default=None,
        description="Folder that keeps batches, their inputs and their results from one run of "
        "the server to the next; no two servers may share it. Unset: `batches-PORT` in "
        "`$XDG_STATE_HOME/qwen2vl-serve`.",
    )
    concurrency: Positive = Field(
        default=8,
        description="Most requests of batches that are worked on at once. They take places that "
        "`limits.max_in_flight` leaves free, while nobody waits, and never the last one.",
    )
    max_lines: Positive = Field(default=50_000, description="Most requests in one batch.")
    max_file_bytes: Positive = Field(
        default=100 * 1024 * 1024, description="Largest input file of a batch, in bytes."
    )
    max_bytes: Positive = Field(
        default=4 * 1024**3,
        description="Most bytes that the files of all batches take together; what was unused the "
        "longest makes room for new ones.",
    )
    max_unfinished: Positive = Field(
        default=100, description="Most batches that are not yet finished; further ones are refused."
    )
    ttl_seconds: Annotated[float, Field(gt=0)] = Field(
        default=7 * 86400.0,
        description="How long a finished batch is listed, and its files are kept.",
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_file_bytes > self.max_bytes:
            raise contradiction(
                f"is {self.max_file_bytes}, above max_bytes {self.max_bytes}; lower it",
                "batches.max_file_bytes",
            )
        return self
