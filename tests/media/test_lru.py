"""A cache within its bytes: what was unused the longest goes, and everything is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.media.lru import LRU, CacheFigures

steps = st.lists(
    st.tuples(st.sampled_from(["get", "put"]), st.sampled_from("abcdef"), st.integers(0, 12)),
    max_size=60,
)


@given(steps)
def test_it_is_a_dictionary_that_forgets_the_longest_unused(
    work: list[tuple[str, str, int]],
) -> None:
    """Beside a plain list of what was used last: the same contents, sizes and counts."""
    cache: LRU[int] = LRU(10)
    model: list[tuple[str, int]] = []  # the longest unused first
    hits = misses = evictions = 0
    for step, key, size in work:
        known = dict(model)
        if step == "get":
            found = cache.get(key)
            assert found == known.get(key)
            hits, misses = hits + (key in known), misses + (key not in known)
            if key in known:
                model = [one for one in model if one[0] != key] + [(key, known[key])]
        else:
            cache.put(key, size, size)
            model = [one for one in model if one[0] != key]
            if size <= 10:
                model.append((key, size))
            while sum(one[1] for one in model) > 10:
                model.pop(0)
                evictions += 1
        held = sum(one[1] for one in model)
        assert cache.figures() == CacheFigures(hits, misses, evictions, len(model), held)
        assert all((key in cache) == (key in dict(model)) for key in "abcdef")


def test_without_room_nothing_is_kept() -> None:
    """Zero bytes turn a cache off."""
    cache: LRU[str] = LRU(0)
    cache.put("a", "value", 5)
    assert cache.get("a") is None
