"""The special tokens: complete, and the ids that config.json gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, warning
from qwen2vl_serve.doctor.world import World

# Of the released vocabularies; a smaller one of somebody's own may number them otherwise.
RELEASED = {
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
RELEASED_VOCABULARY = 151_936
NEEDED = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
FIELDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
MEND = "download tokenizer.json, tokenizer_config.json and config.json again, from one revision"


def tokens(world: World) -> Finding:
    """Compare the tokenizer's special tokens with what config.json and the server count on."""
    if world.config is None or world.folder is None:
        return ok("not looked at: there is no usable config.json here")
    name = world.profile.model.tokenizer
    folder = world.folder if name is None else Path(name).expanduser()
    found = _special(folder)
    if found is None:
        return ok(f"not looked at: {folder} has no list of special tokens")
    size = checkpoint.text_config(world.config).get("vocab_size") or RELEASED_VOCABULARY
    if missing := [token for token in NEEDED if token not in found]:
        return fatal(
            f"{folder}: the tokenizer lacks {', '.join(missing)}",
            "messages and pictures have no beginning and no end in the prompt",
            MEND,
        )
    made_up = world.profile.model.load_format == "dummy"  # weights that know no token
    if odd := _mismatch(found, size, world.config, released=not made_up):
        why = "pictures would not be found in the prompt, or indices be out of range"
        return fatal(f"{folder}: {odd}", why, MEND)
    if lacking := [token for token in RELEASED if token not in found]:
        return warning(
            f"{folder}: the tokenizer lacks {', '.join(lacking)}",
            "boxes and references to objects cannot be read from answers",
            MEND,
        )
    return ok(f"all {len(RELEASED)}")


def _mismatch(
    found: dict[str, int], size: int, config: dict[str, Any], *, released: bool
) -> str | None:
    """Say which token's id is not what the weights or config.json count on."""
    for token, number in found.items():
        if token in RELEASED and number >= size:
            return f"{token} has id {number}, vocab_size is {size}"
        wanted = RELEASED.get(token, number)
        if released and size >= RELEASED_VOCABULARY and number != wanted:
            return f"{token} has id {number}, the released weights know it as {wanted}"
    for field, token in FIELDS.items():
        wanted = config.get(field, RELEASED[token])
        if wanted != found[token]:
            return f"{field} is {wanted}, the tokenizer's {token} is {found[token]}"
    return None


def _special(folder: Path) -> dict[str, int] | None:
    """Gather added tokens and their ids from any of the files that may list them.

    Without a tokenizer.json that can be read, an empty list is None: nothing is known.
    """
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    tokenizer = _read(folder / "tokenizer.json")
    try:
        found = (
            {token: int(number) for token, number in _read(folder / "added_tokens.json").items()}
            | {entry["content"]: int(number) for number, entry in decoder.items()}
            | {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # a list of another shape says nothing
    return found if found or tokenizer else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # the check ``processor`` says so
    return value if isinstance(value, dict) else {}
