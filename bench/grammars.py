"""What the dearest JSON schemas that requests may send cost: ``python -m bench.grammars``.

Compiled by the engine's own compiler for a vocabulary as large as Qwen2-VL's, made of the words of
the installed packages. Seconds are of one processor, whatever else the machine does.
"""

from __future__ import annotations

import itertools
import json
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import xgrammar

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol import json_schema

VOCABULARY = 151_936
READ_BYTES = 120_000_000

_WORDS = re.compile(r" ?[A-Za-z\u4e00-\u9fff]+| ?[^\sA-Za-z0-9]{1,6}|\s+|[0-9]")


def words() -> list[bytes]:
    """Return as many tokens as the vocabulary has: bytes, then words, the commonest first."""
    counts: Counter[str] = Counter()
    read = 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = path.read_text("utf-8", "ignore")
        counts.update(_WORDS.findall(text))
        read += len(text)
        if read > READ_BYTES:
            break
    single = [bytes([value]) for value in range(256)]
    found = [word.encode()[:20] for word, _ in counts.most_common()]
    endings = (word + b"_%d" % number for number in itertools.count() for word in found)
    tokens = dict.fromkeys([*single, *found[:VOCABULARY]])
    while len(tokens) < VOCABULARY:
        tokens[next(endings)] = None
    return list(tokens)[:VOCABULARY]


def strings(count: int, *, required: bool = True, **inner: Any) -> dict[str, Any]:
    """Return an object of that many strings."""
    names = [f"field_{number}" for number in range(count)]
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {name: {"type": "string", **inner} for name in names}
    return schema | ({"required": names} if required else {})


def named(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an object that holds each of ``schemas``."""
    properties = {f"part_{number}": schema for number, schema in enumerate(schemas)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def choices(count: int) -> dict[str, Any]:
    """Return an enum."""
    return {"enum": [f"value {number}" for number in range(count)]}


DEAREST: dict[str, dict[str, Any]] = {
    "one string": {"type": "string"},
    "30 fields": strings(30),
    "700 fields": strings(700),
    "1000 choices": choices(1000),
    "50 optional fields": strings(50, required=False),
    "4 times 50 optional fields": named([strings(50, required=False)] * 4),
    "maxLength 20": {"type": "string", "maxLength": 20},
    "maxLength 100": {"type": "string", "maxLength": 100},
    "minLength 100": {"type": "string", "minLength": 100},
    "lengths 18 to 22": named([{"type": "string", "maxLength": 18 + n} for n in range(5)]),
    "pattern .{1,100}": {"type": "string", "pattern": "^.{1,100}$"},
    "pattern of 50 words": {"type": "string", "pattern": r"^(\w+\s){1,50}$"},
    "33 addresses": strings(33, format="email"),
    "10 templates": strings(10, format="uri-template"),
    "maxItems 100000": {"type": "array", "items": strings(5), "maxItems": 100_000},
    "15 levels": {},
    "all at once": named(
        [
            choices(900),
            *[strings(50, required=False)] * 4,
            {"type": "string", "maxLength": 100},
            strings(200),
        ]
    ),
}
for _ in range(15):
    DEAREST["15 levels"] = named([DEAREST["15 levels"]])


def main() -> None:
    """Print the seconds of each."""
    tokens = xgrammar.TokenizerInfo(
        words(), vocab_type=xgrammar.VocabType.RAW, vocab_size=VOCABULARY, stop_token_ids=[0]
    )
    for name, schema in DEAREST.items():
        try:
            json_schema.check({name: schema})
        except InvalidValue as error:
            raise SystemExit(f"is refused: {error}") from None
        text = json.dumps(schema)
        begun = time.process_time()
        xgrammar.Grammar.from_json_schema(text)
        checked = time.process_time()
        compiler = xgrammar.GrammarCompiler(tokens, max_threads=2, cache_enabled=False)
        compiler.compile_json_schema(text)
        ended = time.process_time()
        print(f"{name:28} check {checked - begun:6.3f} s   compile {ended - checked:6.3f} s")  # noqa: T201  (its purpose)


if __name__ == "__main__":
    main()
