"""A changed profile in a running server: what is taken, what waits, what is refused."""

from __future__ import annotations

from collections.abc import Callable

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.launch.reload import Reload
from qwen2vl_serve.profile import Profile, load_profile


class Reloading:
    def __init__(self) -> None:
        self.overrides: list[str] = []
        self.lines: list[str] = []
        self.limits: list[Profile] = []
        start = load_profile("demo").at_port(4711)
        self.reload = Reload(start, lambda: load_profile("demo", self.overrides), self.lines.append)
        self.reload.register(self.limits.append, "limits")

    def __call__(self, *overrides: str) -> str:
        self.overrides = list(overrides)
        self.reload()
        return self.lines[-1]


def test_fields_that_somebody_takes_are_named_first() -> None:
    """One line: what was taken, and what needs a restart."""
    again = Reloading()
    told = again("limits.max_n=2", "engine.seed=3", "media.videos_kwargs.max_pixels=19000")
    assert told == (
        "reload  limits.max_n; needs a restart: engine.seed, media.videos_kwargs.max_pixels"
    )
    assert again.limits[-1].limits.max_n == 2


def test_what_waits_is_told_until_it_is_done() -> None:
    """A field that waits is named again; one that was taken is not."""
    again = Reloading()
    again("limits.max_n=2", "engine.seed=3")
    assert again("limits.max_n=2", "engine.seed=3").endswith("; needs a restart: engine.seed")
    assert not again("limits.max_n=2", "engine.seed=3").startswith("reload  limits")
    assert again().startswith("reload  limits.max_n")
    assert "restart" not in again()


def test_the_port_that_was_found_is_no_change() -> None:
    """Port 0 has become another in the running server."""
    assert "restart" not in Reloading()()


def test_a_part_of_a_section_can_be_taken() -> None:
    """Keys register the fields that they come from."""
    again = Reloading()
    again.reload.register(lambda _: None, "server.api_key")
    told = again("server.api_keys=[one]", "server.host=0.0.0.0")
    assert told == "reload  server.api_keys; needs a restart: server.host"
    assert "one" not in told


def test_a_profile_that_cannot_be_read_changes_nothing() -> None:
    """The error is told in one line."""
    again = Reloading()
    assert again("limits.max_n=zero").startswith("reload  kept as it was: ")
    assert again.limits == []


def test_a_taker_may_refuse() -> None:
    """A key file that has become unreadable keeps the server as it is."""

    def refuse(_: Profile) -> None:
        raise ProfileError("server.api_key_file keys: cannot be read")

    again = Reloading()
    again.reload.register(refuse, "server")
    assert again() == "reload  kept as it was: server.api_key_file keys: cannot be read"


def test_without_a_profile_to_read_it_says_so() -> None:
    """A server that was started from Python."""
    lines: list[str] = []
    read: Callable[[], Profile] | None = None
    Reload(load_profile("demo"), read, lines.append)()
    assert lines == ["reload  there is no profile to read again"]
