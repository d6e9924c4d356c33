"""``SECURITY.md`` and its Chinese twin name tests and fields that exist, and their defaults."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest

from qwen2vl_serve.errors import ProfileError, UnsupportedParameter
from qwen2vl_serve.profile import Profile, load_profile, profile_names, section_of
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from tests.markdown import ROOT, Document

NOTES = [Document("SECURITY.md"), Document("SECURITY.zh-CN.md")]
SECTIONS = tuple(name for name in Profile.model_fields if name != "description")
FIELD = re.compile(rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+")

# What vLLM 0.32 would trust a client, a checkpoint or a network with.
DANGEROUS = (
    "trust_remote_code", "trust_request_chat_template", "trust_request_mm_kwargs",
    "enable_prompt_embeds", "enable_mm_embeds", "allowed_local_media_path",
    "kv_transfer_config", "ec_transfer_config", "enable_log_requests",
)  # fmt: skip

notes = pytest.mark.parametrize("document", NOTES, ids=str)


def default_of(name: str) -> Any:
    value: Any = Profile.model_validate({"model": {"model": "demo"}}).model_dump()
    for part in name.split("."):
        value = value[part]
    return value


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@notes
def test_every_test_that_is_named_exists(document: Document) -> None:
    """Each advisory's row ends with tests, and each is a function of the file it stands by."""
    table = next(t for t in document.tables if any("::" in code for code in t[0][-1].codes))
    for row in table:
        assert row[-1].codes, row[0].text
    for code in {code for row in table for code in row[-1].codes}:
        name, _, function = code.partition("::")
        tree = ast.parse((ROOT / name).read_text("utf-8"))
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert function in functions, code


@notes
def test_every_field_that_is_named_exists(document: Document) -> None:
    """In the tables and beside them."""
    named = {found.group() for code in document.codes if (found := FIELD.match(code))}
    assert len(named) > 50
    for name in named:
        section, field, *_ = name.split(".")
        assert section_of(field) == section, name
        default_of(name)


@notes
def test_defaults_are_the_profiles(document: Document) -> None:
    """A row's second cell has the default of each of its fields that has one, in their order."""
    table = next(t for t in document.tables if t[0][-1].codes == ("server.host",))
    for what, default, _, fields in table:
        known = [default_of(name) for name in fields.codes]
        assert default.codes == tuple(written(v) for v in known if v not in (None, ())), what.text


def test_the_tables_of_both_languages_are_the_same() -> None:
    """Row by row the same names in code marks, and the same advisories."""
    advisory = re.compile(r"CVE-[\d-]+|GHSA(?:-\w{4}){3}|PYSEC-[\d-]+|vllm#\d+")

    def cells(document: Document) -> list[list[list[tuple[str, ...]]]]:
        return [
            [[(*sorted(c.codes), *advisory.findall(c.text)) for c in row] for row in table]
            for table in document.tables
        ]

    english, chinese = NOTES
    assert cells(english) == cells(chinese)


@pytest.mark.parametrize("name", DANGEROUS)
def test_no_profile_turns_a_dangerous_switch_of_vllm_on(name: str) -> None:
    """None that ships sets it, and none can: it is no field."""
    for shipped in profile_names():
        assert name not in load_profile(shipped).engine_args()
    for section in SECTIONS:
        with pytest.raises(ProfileError, match="unknown key"):
            load_profile("demo", [f"{section}.{name}=true"])


@pytest.mark.parametrize("key", ["code_revision", "trust_remote_code", "num_crops", "size"])
def test_no_other_key_reaches_the_processor(key: str) -> None:
    """``mm_processor_kwargs`` of a request is a list of bounds, not a way to the constructor."""
    limits = RequestLimits(max_messages=1, max_n=1, max_tokens=None, images=0, videos=0)
    body = {"messages": [{"role": "user", "content": "x"}], "mm_processor_kwargs": {key: 1}}
    with pytest.raises(UnsupportedParameter, match=key):
        parse_chat(json.dumps(body).encode(), limits)
