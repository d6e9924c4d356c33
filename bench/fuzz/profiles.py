"""Profiles that nobody would write: each must load, or be refused in one line."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bench.fuzz.bodies import JUNK, NUMBERS, TEXTS, written
from bench.fuzz.drawn import drawn
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.profile import Profile, load_profile
from qwen2vl_serve.profile.sections import Section

BATCH = 200
LONGEST_LINE = 2000

SECTIONS: Mapping[str, type[Section]] = {
    name: field.annotation
    for name, field in Profile.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

_OWN = st.sampled_from(
    ["auto", "demo", "cpu", "cuda", "::", "127.0.0.1/32", "2080", "0|1", "", "a" * 300,
     "/nowhere", "~", "Qwen/Qwen2-VL-7B-Instruct", "half", "awq", "json", 0, -1, 1, 2, 8, 4096,
     0.5, 1e300, 2**70, True, None, [], {}, [""], ["demo", "demo"], {"image": -1}, {"image": 3}]
)  # fmt: skip
"""Values that some field or other takes, and their like."""


def _fields(section: type[Section]) -> dict[str, SearchStrategy[Any]]:
    """Return for each field of a section its default, what others take, and what none does."""
    made = {}
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        plain = st.just(default) if isinstance(default, int | float | str | None) else _OWN
        made[name] = st.one_of(plain, _OWN, NUMBERS, TEXTS, JUNK)
    return made


@st.composite
def profiles(draw: st.DrawFn) -> str:
    """Draw the text of a profile: sections and fields that there are, and some that are not."""
    if draw(st.integers(0, 30)) == 7:
        return draw(st.one_of(st.text(max_size=40), JUNK.map(written)))
    values: dict[str, Any] = {"model": {"model": "demo"}}
    for name in draw(st.lists(st.sampled_from(sorted(SECTIONS)), max_size=3)):
        fields = _fields(SECTIONS[name])
        names = draw(st.lists(st.sampled_from([*fields, "unknown"]), max_size=4, unique=True))
        chosen = {one: draw(fields.get(one, JUNK)) for one in names}
        values[name] = {**values.get(name, {}), **chosen}
    if draw(st.integers(0, 9)) == 7:
        odd = st.one_of(st.sampled_from([*SECTIONS, "modle"]), st.text(max_size=8))
        values[draw(odd)] = draw(JUNK)
    return written(values, ascii_only=draw(st.booleans()))


def drawn_profiles(count: int, number: int) -> Sequence[str]:
    """Return about ``count`` profiles; equal numbers give equal profiles."""
    return drawn(profiles(), count, number)


def fault(text: str, folder: Path) -> str | None:
    """Return what is wrong with how a profile is taken; None where it loads or is refused well.

    A profile that loads must also be able to say what vLLM is started with.
    """
    path = folder / "drawn.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        profile = load_profile(str(path))
        profile.vllm_command()
        profile.environment()
    except SetupError as error:
        line = str(error)
        if "\n" in line or not line or len(line) > LONGEST_LINE:
            return f"the refusal is not one line: {line[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def fuzz(seconds: float, number: int) -> tuple[int, list[tuple[str, str]]]:
    """Load profiles for so long; return how many, and (what is wrong, its text) of the faults."""
    end = time.monotonic() + seconds
    count = 0
    faults: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="profiles-") as folder:
        while time.monotonic() < end and not faults:
            for text in drawn_profiles(BATCH, number):
                count += 1
                if (wrong := fault(text, Path(folder))) is not None:
                    faults.append((wrong, text))
            number += 1
    return count, faults
