"""What is no schema, or would be passed over, is refused by its place in the schema."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol import json_schema


def refusal(schema: dict[str, Any]) -> str:
    with pytest.raises(InvalidValue) as caught:
        json_schema.check({"here": schema})
    assert caught.value.param == "here"
    return caught.value.message


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}]},
        {"allOf": [{"oneOf": [TEXT, {"$ref": "#"}]}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
        },
        {"properties": {"a": {"$ref": "#/properties/a"}}},
    ],
    ids=str,
)
def test_a_schema_that_is_itself_is_refused(schema: dict[str, Any]) -> None:
    """Its grammar has no end, and the engine answers it with an error of its own."""
    assert "leads back to itself" in refusal(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"anyOf": []}, ".anyOf must be an array of some schemas, not an empty array"),
        ({"oneOf": []}, ".oneOf must be"),
        ({"$ref": "#/$defs/b", "$defs": {}}, ".$ref is '#/$defs/b', where no schema is"),
        ({"$ref": "#/x/b/1", "x": {"b": [TEXT]}}, "where no schema is"),
        ({"$ref": "#anchor"}, ".$ref is '#anchor'; it must be as '#/$defs/name'"),
        ({"$ref": 5}, ".$ref is 5"),
        ({"type": "text"}, ".type must be one of array, boolean, .* not 'text'"),
        ({"type": []}, ".type must be .* not an empty array"),
        ({"enum": []}, ".enum must be an array of some values, not an empty array"),
        ({"required": "a"}, ".required must be an array of names, not 'a'"),
        ({"required": [1]}, ".required must be"),
        ({"properties": [TEXT]}, ".properties must be an object of schemas, not an array"),
        ({"properties": {"a": "string"}}, ".properties must be an object of schemas"),
        ({"items": [TEXT]}, ".items must be a schema"),
        ({"minItems": 1.5}, ".minItems must be a whole number from 0 on, not 1.5"),
        ({"maxLength": -1}, ".maxLength must be"),
        ({"minimum": "3"}, ".minimum must be a number"),
        ({"minimum": 5, "maximum": 4}, r".minimum is 5, more than maximum \(4\)"),
        ({"minLength": 5, "maxLength": 4}, ".minLength is 5"),
        ({"minItems": 5, "maxItems": 4}, ".minItems is 5"),
        ({"pattern": "("}, ".pattern is '[(]', which is no pattern"),
        ({"pattern": "*a"}, "no pattern"),
        ({"pattern": "a)"}, "no pattern"),
        ({"patternProperties": {"(": TEXT}}, ".patternProperties is"),
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused_by_its_place(schema: dict[str, Any], words: str) -> None:
    """At the top, in a property, in an item, behind a reference: with word and value."""
    import re

    pattern = words if ".*" in words or "\\" in words or "[(]" in words else re.escape(words)
    assert re.search("here" + pattern if words[0] == "." else pattern, refusal(schema))
    if "$ref" in schema:
        return
    for place, around in {
        "properties.type": {"properties": {"type": schema}},
        "items.anyOf[1]": {"items": {"anyOf": [TEXT, schema]}},
        "$defs.a": {"$ref": "#/$defs/a", "$defs": {"a": schema}},
        "x.a": {"$ref": "#/x/a", "x": {"a": schema}},
    }.items():
        assert f"here.{place}." in refusal(around)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": TEXT},
        {"if": TEXT, "then": TEXT, "else": TEXT},
        {"dependentRequired": {"a": ["b"]}},
        {"dependentSchemas": {"a": TEXT}},
        {"dependencies": {"a": ["b"]}},
        {"$dynamicRef": "#a"},
        {"$recursiveRef": "#"},
        {"pattern": "^(?=a)b"},
        {"pattern": "(?!a)b"},
        {"pattern": "(?<!a)b"},
        {"pattern": "(?<name>a)b"},
        {"$ref": "#/$defs/a", "$defs": {"a": TEXT}, "maxLength": 4},
        {"$ref": "#/$defs/a", "$defs": {"a": TEXT}, "type": "integer"},
        {"$ref": "#/$defs/a", "$defs": {"a": TEXT}, "enum": ["a"]},
    ],
    ids=str,
)
def test_what_no_grammar_enforces_is_refused_by_name(schema: dict[str, Any]) -> None:
    """It would be passed over, and the answer break the schema."""
    message = refusal(schema)
    assert any(f"here.{name} " in message for name in schema)
    assert "held to" in message or "passed over" in message


class Colour(StrEnum):
    RED = "red"


class Cat(BaseModel):
    kind: Literal["cat"]
    age: Annotated[int, Field(ge=0, le=30)]


class Dog(BaseModel):
    kind: Literal["dog"]
    friend: Cat | None = Field(default=None, description="who")


class House(BaseModel):
    """What pydantic writes of most that it can."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    colour: Annotated[Colour, Field(description="of its roof")] = Colour.RED
    beside: list[House] = []
    size: tuple[int, str] = (1, "a")
    note: Annotated[str, Field(min_length=1, max_length=9)] | None = None
    more: dict[str, float] = {}


@pytest.mark.parametrize(
    "schema",
    [
        House.model_json_schema(),
        {"type": ["string", "null"], "title": "A", "description": None, "default": None},
        {"properties": {"not": TEXT, "enum": TEXT, "$ref": TEXT, "required": TEXT, "items": TEXT}},
        {"const": {"type": "none", "not": 1}, "default": {"enum": []}, "examples": [{"anyOf": []}]},
        {"enum": [{"type": "none"}, {"$ref": "#nowhere"}]},
        {"items": {"$ref": "#"}},
        {"anyOf": [{"items": {"$ref": "#"}}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": TEXT}, "type": "string", "title": "A", "default": ""},
        {"$ref": "#/%24defs/a~1b", "$defs": {"a/b": TEXT}},
        {"additionalProperties": False, "items": True, "minItems": 2, "maxItems": 2},
        {"pattern": r"^\p{L}[(?=]+\(?=(?:a|b)\/(?i:c)$"},
    ],
    ids=lambda schema: str(schema)[:50],
)
def test_what_people_and_libraries_write_is_taken(schema: dict[str, Any]) -> None:
    """Annotations, names of properties that are keywords elsewhere, trees of themselves."""
    json_schema.check({"here": schema})
