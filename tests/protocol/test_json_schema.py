"""What a schema may cost, and that what costs more is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol import json_schema


def check(schema: dict[str, Any]) -> None:
    json_schema.check({"here": schema})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def fields(count: int, **inner: Any) -> dict[str, Any]:
    names = [f"field_{number}" for number in range(count)]
    properties = {name: {"type": "string", **inner} for name in names}
    return {"type": "object", "properties": properties, "required": names}


TOO_DEAR: dict[str, dict[str, Any]] = {
    "characters counted by lengths, patterns and formats": fields(40, format="email"),
    "levels": nested(33),
    "keys and values": fields(2000),
    "characters of text": {"description": "x" * 70_000},
    "values of enum": {"enum": [f"v{number}" for number in range(1001)]},
    "optional properties of one object": {"properties": {f"p{n}": {} for n in range(51)}},
    "optional properties": {
        f"p{m}": {"properties": {f"p{n}": {} for n in range(41)}} for m in range(5)
    },
    "characters counted by lengths": {"type": "string", "maxLength": 10**9},
    "maxItems": {"type": "array", "items": {}, "maxItems": 10**9},
    "minProperties": {"type": "object", "minProperties": 10**9},
    "characters of pattern": {"type": "string", "pattern": "a" * 501},
    "characters counted by lengths, patterns": {"pattern": "^((a{100}){100}){100}$"},
}


@pytest.mark.parametrize("what", TOO_DEAR)
def test_what_costs_too_much_is_refused_by_name(what: str) -> None:
    """The message says where, what, how much and how much at most."""
    with pytest.raises(
        InvalidValue, match=rf"here has at least \d+ {what}[a-z, ]*; at most \d+ are"
    ) as caught:
        check({"type": "object", "properties": {"a": TOO_DEAR[what]}, "required": ["a"]})
    assert caught.value.param == "here"


def test_costs_add_up_over_all_schemas() -> None:
    """A hundred tools are not a hundred allowances."""
    one = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 60}}}
    json_schema.check({"first": one})
    two = {"type": "object", "properties": {"b": {"type": "string", "maxLength": 41}}}
    with pytest.raises(InvalidValue, match="second has at least 101 characters"):
        json_schema.check({"first": one, "second": two})


def test_equal_lengths_are_counted_once() -> None:
    """They share their states in the grammar."""
    check(fields(40, maxLength=90))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("^abc$", 0),
        ("[0-9]{4}-[0-9]{2}", 6),
        ("(a{2}b{4}){2}", 12),
        ("(?:ab){3,9}", 9),
        (r"\{5}", 0),
        (r"\\{5}", 5),
        (r"[]{9}]{2}", 2),
        ("(a{2}|b{3})+", 5),
        ("x{7,}", 7),
        ("a)b{2}", 2),
        ("((a{10}){10}){10}", 1000),
    ],
)
def test_the_counts_of_a_pattern(pattern: str, count: int) -> None:
    """In a row they add up, within each other they multiply; a bracket holds no count."""
    assert json_schema.repeats(pattern) == count


def test_a_count_far_too_long_to_read_is_refused() -> None:
    """Python itself refuses to read a number of 5,000 digits."""
    with pytest.raises(InvalidValue, match="counted"):
        check({"type": "string", "pattern": "a{" + "9" * 300 + "}"})


def test_nothing_is_fetched() -> None:
    """A reference leads within the schema, or nowhere."""
    check({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}})
    with pytest.raises(InvalidValue, match="refers to 'http"):
        check({"$ref": "http://169.254.169.254/"})


def test_what_people_ask_for_is_taken() -> None:
    """A form of thirty fields, an invoice with its lines, a list of choices."""
    check(fields(30))
    line = fields(4) | {"additionalProperties": False}
    check({"type": "object", "properties": {"lines": {"type": "array", "items": line}}})
    check({"type": "string", "enum": [f"country {number}" for number in range(250)]})
    check({"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})
    check({"type": "string", "maxLength": 64})


keys = st.sampled_from(
    [
        "$ref", "$defs", "additionalProperties", "allOf", "anyOf", "const", "enum", "format",
        "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
        "minProperties", "minimum", "oneOf", "pattern", "patternProperties", "prefixItems",
        "properties", "required", "type",
    ]
) | st.text(max_size=9)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@given(st.dictionaries(keys, values))
def test_any_object_is_taken_or_refused(schema: dict[str, Any]) -> None:
    """Whatever stands where a schema is due raises nothing but ``InvalidValue``."""
    try:
        check(schema)
    except InvalidValue as error:
        assert error.param == "here"
