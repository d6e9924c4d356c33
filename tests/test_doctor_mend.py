"""`doctor --fix`: rotary settings that every version reads, on a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.doctor import examine
from qwen2vl_serve.doctor.mend import mended_config, mended_copy
from qwen2vl_serve.errors import PreflightError, SetupError
from tests.worlds import Lab

RELEASED = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "rope_theta": 1000000.0,
}
MENDED = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    return Lab(monkeypatch, tmp_path)


def released(rope: Any) -> dict[str, Any]:
    return {**RELEASED, "rope_scaling": rope}


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "mrope", "mrope_section": [16, 24, 24]},
        {"rope_type": "longrope", "mrope_section": [16, 24, 24]},
        {"rope_type": "yarn", "type": "mrope", "mrope_section": [16, 24, 24]},
        {"type": "mrope"},
        {"rope_type": "default", "mrope_section": [16, 24]},
        {"rope_type": "default", "mrope_section": "16, 24, 24"},
        None,
        "mrope",
    ],
)
def test_settings_of_any_version_become_those_of_every_version(rope):
    """Both names of the type, and the released sections for heads of 128."""
    mended = mended_config(released(rope))
    assert mended == {**RELEASED, "rope_scaling": MENDED}
    checkpoint.check_config(mended, Path("config.json"))


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        {"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]},
    ],
)
def test_usable_settings_are_left_alone(rope):
    """A window that was stretched on purpose stays so."""
    assert mended_config(released(rope)) == released(rope)


@pytest.mark.parametrize("older", ["mrope", "default", "su"])
def test_a_stretched_window_loses_only_the_type_that_contradicts_it(older):
    """YaRN and its factor say what was meant; plain positions would end at the old window."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}
    assert mended_config(released({**yarn, "type": older})) == released(yarn)
    inside = {"model_type": "qwen2_vl", "text_config": released({**yarn, "type": older})}
    assert mended_config(inside)["text_config"] == released(yarn)


@given(st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "mrope_section"]), st.none()
       | st.sampled_from(["mrope", "default", "yarn", "su"]) | st.integers()
       | st.lists(st.integers(0, 64), max_size=4)))  # fmt: skip
def test_whatever_stood_there_the_mended_settings_load(rope):
    """No combination of keys leaves a config.json that is refused afterwards."""
    try:
        checkpoint.check_config(mended_config(released(rope)), Path("config.json"))
    except SetupError as error:
        pytest.fail(str(error))


def test_unknown_sections_of_other_heads_are_not_made_up():
    """Heads of another width have sections that only their maker knows."""
    config = released({"type": "mrope"}) | {"hidden_size": 1792}
    with pytest.raises(PreflightError, match="heads 64 wide"):
        mended_config(config)


def test_the_copy_links_to_everything_but_the_config(lab):
    """The original keeps its bytes, the copy takes no room, and passes every check."""
    rope = {"rope_type": "su", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    lab.text_config(rope_parameters=rope)
    before = {path.name: path.read_bytes() for path in lab.model.iterdir()}
    place = mended_copy(lab.world())
    assert place is not None
    assert {path.name: path.read_bytes() for path in lab.model.iterdir()} == before
    assert {path.name for path in place.iterdir() if not path.is_symlink()} == {"config.json"}
    assert {path.name for path in place.iterdir()} == before.keys()
    text = json.loads((place / "config.json").read_text())["text_config"]
    assert text["rope_parameters"] == {
        "rope_theta": 10000.0, "type": "mrope", "rope_type": "default", "mrope_section": [8, 4, 4],
    }  # fmt: skip
    assert all(f.level == "ok" for f in examine(lab.world(f"model={place}")))
    assert mended_copy(lab.world()) == place, "a second run finds the first one's copy"
    assert list(place.parent.iterdir()) == [place]


def test_nothing_is_written_where_nothing_is_to_be_mended(lab):
    """The demo's settings are those of every version."""
    assert mended_copy(lab.world()) is None
    assert not (lab.folder / "state").exists()


def test_what_cannot_be_mended_is_one_line(lab):
    """No folder, no config.json, no place for the copy."""
    with pytest.raises(PreflightError, match="download it first"):
        mended_copy(lab.world("model=owner/name"))
    lab.text_config(rope_parameters={"type": "su", "mrope_section": [8, 4, 4]})
    (lab.folder / "file").write_text("")
    lab.monkeypatch.setenv("XDG_STATE_HOME", str(lab.folder / "file"))
    with pytest.raises(PreflightError, match="cannot be written"):
        mended_copy(lab.world())
    (lab.model / "config.json").unlink()
    with pytest.raises(PreflightError, match="is missing"):
        mended_copy(lab.world())
