"""Bodies: bounded over all requests, and over those of one key."""

from __future__ import annotations

import pytest

from qwen2vl_serve.errors import RateLimited
from qwen2vl_serve.http.body import Bodies
from qwen2vl_serve.line import Refused


def test_bodies_are_bounded_together() -> None:
    """What does not fit is refused, and counts nothing."""
    bodies = Bodies(10, 10)
    bodies.take("", 7)
    with pytest.raises(Refused):
        bodies.take("", 4)
    bodies.take("", 3)
    bodies.give_back("", 10)
    assert bodies.held == 0


def test_bodies_of_one_key_leave_room_for_others() -> None:
    """A named key holds its share; those that have no name are not told from each other."""
    bodies = Bodies(10, 5)
    bodies.take("greedy", 5)
    with pytest.raises(RateLimited, match="5 bytes already"):
        bodies.take("greedy", 1)
    bodies.take("modest", 2)
    bodies.take("", 3)
    bodies.give_back("greedy", 5)
    bodies.take("greedy", 4)
    for key, size in (("greedy", 4), ("modest", 2), ("", 3)):
        bodies.give_back(key, size)
    assert bodies.held == 0
    bodies.take("", 9)
