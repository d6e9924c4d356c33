"""`docs/profiles.md` and its Chinese twin hold every field of a profile, as it is."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from qwen2vl_serve import cli
from qwen2vl_serve.profile import Profile, load_profile, profile_names
from qwen2vl_serve.profile.sections import Section

DOCS = Path(__file__).parents[1] / "docs"
ENGLISH, CHINESE = DOCS / "profiles.md", DOCS / "profiles.zh-CN.md"
WORDS = {
    ENGLISH: {"unset": "unset", "required": "required"},
    CHINESE: {"unset": "未设", "required": "必填"},
}
KINDS = {
    bool: ("true or false", "true 或 false"),
    int: ("integer", "整数"),
    float: ("number", "数"),
    str: ("text", "文本"),
    SecretStr: ("text", "文本"),
    dict: ("mapping", "映射"),
}
LISTS = {str: ("list of text", "文本列表"), int: ("list of integers", "整数列表")}


def fields(section: type[Section] = Profile, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field that holds a value, with its dotted name; top level first."""
    nested = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            nested.append((name, inner))
        else:
            yield prefix + name, field
    for name, inner in nested:
        yield from fields(inner, f"{prefix}{name}.")


def written_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "unset"
    if default in ((), {}):
        return "none" if default == () else "`{}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def written_values(field: FieldInfo, *, zh: bool = False) -> str:
    """Say what a field takes: its choices, or its kind and bounds."""
    annotation, metadata = unwrap(field.annotation, list(field.metadata))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    kind = get_origin(annotation) or annotation
    if kind is tuple:
        element, more = unwrap(get_args(annotation)[0], [])
        words, metadata = [LISTS.get(element, LISTS[str])[zh]], metadata + more
    else:
        words = [KINDS[kind][zh]]
    for sign, name in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
        words += [f"{sign} {getattr(m, name)}" for m in metadata if hasattr(m, name)]
    return " ".join(words)


def unwrap(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """Strip ``Annotated`` and ``| None``, gathering the bounds they carry."""
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        for one in more:
            metadata += one.metadata if isinstance(one, FieldInfo) else [one]
        return unwrap(annotation, metadata)
    if isinstance(annotation, types.UnionType) or str(annotation).startswith("typing.Optional"):
        (annotation,) = [one for one in get_args(annotation) if one is not type(None)]
        return unwrap(annotation, metadata)
    return annotation, metadata


def rows(document: Path) -> dict[str, list[str]]:
    """Read the rows of the field tables: name → values, default, meaning."""
    found = {}
    for line in document.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.fullmatch(r"`([a-z0-9_.]+)`", cells[0]) if len(cells) == 4 else None
        if name:
            assert name[1] not in found
            found[name[1]] = [cell.replace("\\|", "|") for cell in cells[1:]]
    return found


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_every_field_is_documented_and_no_other(document):
    """In both languages, once each, in the order in which the profile has them."""
    assert list(rows(document)) == [name for name, _ in fields()]


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_values_and_defaults_are_the_models(document):
    """Kinds, choices, bounds and defaults are as the profile checks them; no meaning is empty."""
    documented = rows(document)
    for name, field in fields():
        values, default, meaning = documented[name]
        words = written_default(field)
        assert default == WORDS[document].get(words, words), name
        assert values == written_values(field, zh=document == CHINESE), name
        assert meaning


def test_meaning_is_the_fields_description():
    """The English page and the ``description`` in the code agree to the letter."""
    documented = rows(ENGLISH)
    for name, field in fields():
        assert documented[name][2] == field.description, name


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_every_profile_that_ships_is_named(document):
    """In backquotes, as it is typed behind ``--profile``, on the page of either language."""
    text = document.read_text("utf-8")
    for name in profile_names():
        assert f"`{name}`" in text


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_yaml_examples_load(document, tmp_path):
    """Each, saved as a file, is a whole profile: it loads without a refusal and names a model."""
    examples = re.findall(r"```yaml\n(.*?)```", document.read_text("utf-8"), re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example, "utf-8")
        assert load_profile(str(path)).engine_args()["model"]


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_shown_refusals_are_what_is_printed(document, tmp_path, monkeypatch, capsys):
    """Each `serve: …` line in the text is what the example file or command before it gives."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        "model:\n  model: demo\nengine:\n  max_model_length: 4096\n", "utf-8"
    )
    text = document.read_text("utf-8")
    shown = re.findall(r"^\$ serve (.+)\n(serve: .+)$", text, re.MULTILINE)
    assert shown
    for words, line in shown:
        assert cli.serve_main(words.split()) == 2
        assert capsys.readouterr().err.strip() == line
