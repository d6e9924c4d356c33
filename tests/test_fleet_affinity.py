"""What decides which replica answers: keys of requests, the order of replicas, their bound."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwen2vl_serve.fleet.affinity import AT_EASE, bound, content_key, order, ranked

NAMES = st.sets(st.text("abcdef0123456789", min_size=4, max_size=12), min_size=1, max_size=20)
KEYS = st.text(max_size=20)
TEXTS = st.text(max_size=30)
LOADS = st.dictionaries(
    st.text("abcdef", min_size=3, max_size=6), st.integers(0, 300), min_size=1, max_size=20
)
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}


def body(messages: list[dict[str, Any]], **fields: Any) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=5), st.booleans())
def test_a_conversation_keeps_its_key_while_it_grows(
    system: str, first: str, later: list[str], shown: bool
) -> None:
    """Also when a later turn shows another picture."""
    content = [text(first), PICTURE] if shown else first
    begun = [{"role": "system", "content": system}, user(content)]
    grown = list(begun)
    for words in later:
        grown.append({"role": "assistant", "content": words})
        grown.append(user([{"type": "image_url", "image_url": {"url": words or "x"}}]))
    assert content_key(body(begun)) == content_key(body(grown)) != ""


@given(TEXTS, TEXTS)
def test_a_picture_has_one_key_whatever_is_asked(one: str, other: str) -> None:
    """The question before or behind it, another system prompt, other sampling."""
    keys = {
        content_key(body([user([text(one), PICTURE])])),
        content_key(body([user([PICTURE, text(other)])], temperature=0.5)),
        content_key(body([{"role": "system", "content": one}, user([PICTURE])])),
    }
    assert len(keys) == 1


@given(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
def test_other_beginnings_have_other_keys(two: list[str]) -> None:
    """Texts, pictures, adapters, and where one message ends and the next begins."""
    for make in (
        lambda one: body([user(one)]),
        lambda one: body([user([{"type": "image_url", "image_url": {"url": one}}])]),
        lambda one: body([user("Hello")], model=one),
        lambda one: body([user([PICTURE])], model=one),
        lambda one: body([{"role": "system", "content": one}, user(two[0] + two[1])]),
    ):
        assert content_key(make(two[0])) != content_key(make(two[1]))


@pytest.mark.parametrize("content", ["Hello", [PICTURE]])
def test_the_names_of_one_model_share_a_key(content: Any) -> None:
    """And so does a request that names none, for it means that model; an adapter's name does not,
    nor does what is no name at all."""
    names = ("Qwen2-VL-7B", "gpt-4o")
    unnamed, first, second, adapter, odd, null = (
        content_key(body([user(content)], **fields), names)
        for fields in (
            {}, {"model": names[0]}, {"model": names[1]},
            {"model": "ocr"}, {"model": ["gpt-4o"]}, {"model": None},
        )
    )  # fmt: skip
    assert unnamed == first == second == null
    assert len({first, adapter, odd}) == 3


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "A"}},
        {"type": "image_url", "image_url": {"file_id": "A"}},
        {"type": "file", "file": {"file_id": "A"}},
        {"type": "file", "file": {"file_data": "A", "filename": "a.pdf"}},
        {"type": "input_image", "image_url": "A"},
        {"type": "input_image", "file_id": "A"},
        {"type": "video_url", "video_url": {"url": "A"}},
        {"type": "video", "video": "A"},
        {"type": "video", "video": ["A", "B"]},
    ],
)
def test_every_dialect_of_a_picture_is_understood(part: dict[str, Any]) -> None:
    """The same address has the same key in each of them, and another address another."""
    plain = {"type": "image_url", "image_url": {"url": "A"}}
    assert content_key(body([user([part])])) == content_key(body([user([plain])]))
    changed = json.loads(json.dumps(part).replace('"A"', '"Z"'))
    assert content_key(body([user([changed])])) != content_key(body([user([part])]))


def test_a_body_of_too_many_values_is_not_read() -> None:
    """Nor has it a key: the replica refuses it, and would have to be asked for that only."""
    crowd = body([user("x")], ignored=[0] * 500_000)
    assert content_key(crowd) == ""
    assert content_key(crowd.replace(b"0, ", b"", 1000)) != ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "type", "image_url", "url", "user"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_sent_is_no_error(data: bytes) -> None:
    """It is the replica that answers with the error; here it only has no key."""
    assert isinstance(content_key(data), str)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"messages":[]}', b'{"messages":[1]}'])
def test_what_is_no_chat_request_has_no_key(data: bytes) -> None:
    """No bytes, broken JSON, no message that is an object: an empty key, and no error."""
    assert content_key(data) == ""


@given(KEYS, NAMES, st.data())
def test_a_replica_that_leaves_moves_only_its_own_keys(
    key: str, names: set[str], data: st.DataObject
) -> None:
    """The others keep their order; so it is the other way round when one joins."""
    gone = data.draw(st.sampled_from(sorted(names)))
    assert [one for one in ranked(key, names) if one != gone] == ranked(key, names - {gone})


@given(KEYS, NAMES)
def test_the_order_depends_on_nothing_but_names(key: str, names: set[str]) -> None:
    """Every gateway comes to the same, in whatever order it learnt of the replicas."""
    assert ranked(key, sorted(names)) == ranked(key, sorted(names, reverse=True))
    assert sorted(ranked(key, names)) == sorted(names)


def test_keys_spread_evenly() -> None:
    """10,000 keys over 10 replicas: each within 4 standard deviations of a thousand."""
    names = [f"replica-{number}" for number in range(10)]
    found = Counter(ranked(str(number), names)[0] for number in range(10_000))
    assert all(abs(found[name] - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5 for name in names)


@given(KEYS, LOADS, st.floats(1.0, 3.0), st.integers(1, 8))
def test_the_first_replica_is_below_the_bound(
    key: str, loads: dict[str, int], slack: float, at_ease: int
) -> None:
    """There is always one, as the bound is never below the mean."""
    chosen = order(key, loads, slack, at_ease)
    assert loads[chosen[0]] < bound(sum(loads.values()), len(loads), slack, at_ease)
    assert sorted(chosen) == sorted(loads)


@given(KEYS.filter(bool), LOADS)
def test_the_preferred_replica_is_taken_unless_it_is_busy(key: str, loads: dict[str, int]) -> None:
    """And then the next that is not."""
    most = bound(sum(loads.values()), len(loads))
    free = [name for name in ranked(key, loads) if loads[name] < most]
    assume(free)
    assert order(key, loads)[0] == free[0]


@given(LOADS)
def test_without_a_key_the_least_busy_is_first(loads: dict[str, int]) -> None:
    """So are requests spread that no cache helps."""
    chosen = order("", loads)
    assert [loads[name] for name in chosen] == sorted(loads.values())


@given(st.integers(1, 50), st.integers(1, 2000), st.floats(1.0, 2.0))
def test_one_hot_key_does_not_overload_a_replica(
    replicas: int, requests: int, slack: float
) -> None:
    """However many ask about one picture at once, none has more than the bound allows."""
    loads = {f"r{number}": 0 for number in range(replicas)}
    for _ in range(min(requests, 300)):
        most = bound(sum(loads.values()), replicas, slack)
        first = order("hot", loads, slack)[0]
        loads[first] += 1
        assert loads[first] <= max(most, AT_EASE)
