"""Which replica answers: the one that has seen the conversation, unless it is too busy.

Pure: bytes, names and numbers. The order of replicas for a key is rendezvous hashing's (Thaler and
Ravishankar, 1998): a replica that joins or leaves moves its own keys and no others. The bound on
loads is that of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from blake3 import blake3

from qwen2vl_serve.errors import InvalidJSON
from qwen2vl_serve.protocol.validation import parse_json

SLACK = 1.25
"""How much above the mean a replica's load may be before its keys go elsewhere."""

AT_EASE = 4
"""So many requests at once are never too many: an engine answers them together."""

_ADDRESSES = ("url", "file_id", "file_data")


def content_key(body: bytes, names: Collection[str] = ()) -> str:
    """Return what of a chat request's body replicas cache; empty where nothing is to be found.

    It is the model (an adapter has caches of its own; ``names`` are the model's, all one to its
    cache) with the first picture or video of the first user message, or, where that shows nothing,
    with all messages up to it. So a conversation keeps its key while it grows, and a picture has
    the same one whatever is asked about it. A body that is no chat request has none, and whoever
    gets it answers with the error.
    """
    try:
        request = parse_json(body)
    except InvalidJSON:
        return ""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return ""
    model = _text(_adapter(request.get("model"), names))
    seen = blake3(model)
    for message in messages:
        if not isinstance(message, dict):
            return ""
        user = message.get("role") == "user"
        if user and (shown := _first_medium(message.get("content"))) is not None:
            return blake3(model + b"\0" + shown.encode(errors="replace")).hexdigest()
        seen.update(_text(message.get("role")) + _text(message.get("content")))
        if user:
            return seen.hexdigest()
    return ""


def _adapter(model: Any, names: Collection[str]) -> Any:
    """Return what a request names beside the model itself, which a request without a name means."""
    return None if isinstance(model, str) and model in names else model


def _text(value: Any) -> bytes:
    """Return bytes that differ where values do; the length in front keeps them apart."""
    text = value if isinstance(value, str) else repr(value)
    data = text.encode(errors="replace")
    return b"%d:%b" % (len(data), data)


def _first_medium(content: Any) -> str | None:
    """Return the address, or the bytes as base64, of the first part that is not text."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind == "text":
            continue
        inner = part.get(kind, part.get("image_url"))
        if isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, str):
            return inner
        for holder in (inner, part):
            for name in _ADDRESSES:
                if isinstance(holder, dict) and isinstance(holder.get(name), str):
                    return str(holder[name])
    return None


def ranked(key: str, replicas: Collection[str]) -> list[str]:
    """Return the replicas in the order in which a key prefers them."""
    prefix = blake3(key.encode())

    def weight(replica: str) -> tuple[bytes, str]:
        hasher = prefix.copy()
        return hasher.update(replica.encode()).digest(8), replica

    return sorted(replicas, key=weight, reverse=True)


def bound(total: int, replicas: int, slack: float = SLACK, at_ease: int = AT_EASE) -> int:
    """Return how many requests, a new one included, a replica may have at once.

    ``total`` are those that all replicas have without it.
    """
    return max(at_ease, math.ceil(slack * (total + 1) / max(replicas, 1)))


def order(
    key: str, loads: Mapping[str, int], slack: float = SLACK, at_ease: int = AT_EASE
) -> Sequence[str]:
    """Return the replicas in the order in which they are to be tried.

    First those below the bound as the key prefers them, then the others. ``loads`` are the
    requests that each replica works on. Without a key the least busy one is first.
    """
    preferred = ranked(key, loads)
    if not key:
        return sorted(loads, key=lambda replica: (loads[replica], replica))
    most = bound(sum(loads.values()), len(loads), slack, at_ease)
    free = [replica for replica in preferred if loads[replica] < most]
    busy = [replica for replica in preferred if loads[replica] >= most]
    return free + sorted(busy, key=loads.__getitem__)
