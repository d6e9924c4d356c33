"""API keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.errors import InvalidAPIKey

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(st.sets(printable, min_size=1, max_size=4))
def test_each_key_opens(keys: set[str]) -> None:
    """Every key of the set is taken, whatever the case of the scheme."""
    held = Keys(keys)
    for key in keys:
        held.check(f"Bearer {key}")
        held.check(f"bearer {key}")


@given(printable, st.text(max_size=40))
def test_no_other_text_opens(key: str, other: str) -> None:
    """Only the key itself is taken; any other header, non-ASCII too, is refused."""
    held = Keys([key])
    if other.strip() != key:
        with pytest.raises(InvalidAPIKey):
            held.check(f"Bearer {other}")
    with pytest.raises(InvalidAPIKey):
        held.check(None)


def test_a_wrong_key_is_told_in_the_words_that_other_clients_know_it_by() -> None:
    """LiteLLM tells an error of the key by OpenAI's words, whatever the status is."""
    with pytest.raises(InvalidAPIKey, match="Incorrect API key provided"):
        Keys(["one"]).check("Bearer other")


def test_no_keys_are_false() -> None:
    """A server without keys is open."""
    assert not Keys([])
    assert Keys(["a"])
