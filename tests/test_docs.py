"""The documentation says what the code does, in English and in Chinese alike."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from qwen2vl_serve import cli
from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.batches.lines import _custom_id
from qwen2vl_serve.batches.store import Status
from qwen2vl_serve.errors import APIError, RequestError, ReservedToken
from qwen2vl_serve.http.cors import EXPOSED_HEADERS
from qwen2vl_serve.http.door import SECURITY_HEADERS
from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.media.image import Header
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.media.sampling import Sampling
from qwen2vl_serve.media.sizing import Sizing
from qwen2vl_serve.media.video import VideoHeader, VideoLimits
from qwen2vl_serve.profile import load_profile, profile_names
from qwen2vl_serve.profile.limits import LimitsSection
from qwen2vl_serve.profile.media import FilesSection, MediaSection
from qwen2vl_serve.profile.sections import EngineSection
from qwen2vl_serve.protocol import chat, content, json_schema
from qwen2vl_serve.protocol.chat import UNSUPPORTED, ChatRequest
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from tests.fake_engine import FakeEngine
from tests.markdown import ROOT, Cell, Document

APIS = [Document("docs/http-api.md"), Document("docs/http-api.zh-CN.md")]
READMES = [Document("README.md"), Document("README.zh-CN.md")]
DOCTORS = [Document("docs/doctor.md"), Document("docs/doctor.zh-CN.md")]
PLANS = [Document("docs/plan.md"), Document("docs/plan.zh-CN.md")]
PAGES = [Document("docs/hardware.md"), Document("docs/hardware.zh-CN.md")]
MODELS = [Document("docs/models.md"), Document("docs/models.zh-CN.md")]
SECURITY = [Document("SECURITY.md"), Document("SECURITY.zh-CN.md")]
CLIENTS = [Document("docs/clients.md"), Document("docs/clients.zh-CN.md")]
PACKAGE = [Document("clients/README.md"), Document("clients/README.zh-CN.md")]
DEPLOY = [Document("docs/deploy.md"), Document("docs/deploy.zh-CN.md")]
USES = [Document("docs/uses.md"), Document("docs/uses.zh-CN.md")]
BATCHES = [Document("docs/batches.md"), Document("docs/batches.zh-CN.md")]
TOOLS = [Document("docs/tools.md"), Document("docs/tools.zh-CN.md")]
TWINS = [
    APIS,
    READMES,
    DOCTORS,
    PLANS,
    PAGES,
    SECURITY,
    CLIENTS,
    DEPLOY,
    USES,
    MODELS,
    PACKAGE,
    BATCHES,
    TOOLS,
]
HELD = [*(document for twins in TWINS for document in twins), Document("CHANGELOG.md")]

api = pytest.mark.parametrize("document", APIS, ids=str)
readme = pytest.mark.parametrize("document", READMES, ids=str)

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
SCHEMA_BOUNDS = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems",
    "minLength", "maxLength",
}  # fmt: skip


def numbers(cell: Cell) -> set[float]:
    """The numbers of a cell's prose; those within code spans are names, not bounds."""
    text = cell.text
    for code in cell.codes:
        text = text.replace(code, "")
    return {float(number) for number in NUMBER.findall(text)}


def schema_facts(schema: Any, name: str = "") -> tuple[set[str], set[float]]:
    """JSON types of a field's schema and the numbers that bound it and what is in it.

    The bound of all integers is told once, not in each row.
    """
    types: set[str] = set()
    bounds: set[float] = set()

    def walk(node: Any, *, top: bool) -> None:
        if "$ref" in node:
            types.update({"object"} if top else ())
            return
        if top and node.get("type") not in (None, "null"):
            types.add(node["type"])
        bounds.update(float(node[key]) for key in SCHEMA_BOUNDS & node.keys())
        for key in ("anyOf", "oneOf"):
            for choice in node.get(key, ()):
                walk(choice, top=top)
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                walk(node[key], top=False)

    walk(schema, top=True)
    return types, bounds - {content.MOST}


def inner_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and schemas of what may stand within an object."""
    for name, schema in model.model_json_schema()["properties"].items():
        yield f"{prefix}.{name}", schema
    for name, field in model.model_fields.items():
        if inner := model_within(field.annotation):
            yield from inner_fields(inner, f"{prefix}.{field.alias or name}")


def model_within(annotation: Any) -> type[BaseModel] | None:
    choices = getattr(annotation, "__args__", (annotation,))
    found = [kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None


@api
def test_every_route_is_listed_and_no_other(document: Document) -> None:
    """The table of routes is the application's, FastAPI's own pages included."""
    profile = load_profile("demo")
    app = build_app(FakeEngine(), media_loader(profile), profile, Keys(()))
    served = {
        f"{method} {route.path.replace('{name:path}', '{name}')}"
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    assert document.table_of(served).keys() == served


@api
def test_the_bound_of_integers_is_told(document: Document) -> None:
    """Once, for it is no number that anybody chooses."""
    assert document.source.count(str(content.MOST)) == 1


@api
def test_every_request_field_has_its_types_and_bounds(document: Document) -> None:
    """A bound that changes in the code, or in the page, no longer matches the other."""
    schemas = ChatRequest.model_json_schema()["properties"]
    table = document.table_of(schemas)
    assert list(table) == list(schemas)
    for name, schema in schemas.items():
        types, bounds = schema_facts(schema)
        _, kind, limits, meaning = table[name]
        assert set(kind.text.split(", ")) == types, name
        assert numbers(limits) == bounds, name
        assert meaning.text, name


@api
def test_every_key_of_an_inner_object_has_its_types_and_bounds(document: Document) -> None:
    """``stream_options`` and ``response_format`` are described down to their last key."""
    fields = {
        **dict(inner_fields(chat.StreamOptions, "stream_options")),
        **dict(inner_fields(chat.ResponseFormat, "response_format")),
        **dict(inner_fields(chat.MMProcessorKwargs, "mm_processor_kwargs")),
        **dict(inner_fields(chat.MediaIOKwargs, "media_io_kwargs")),
    }
    table = document.table_of(fields)
    assert table.keys() == fields.keys()
    for name, schema in fields.items():
        types, bounds = schema_facts(schema)
        assert set(table[name][1].text.split(", ")) == types, name
        assert numbers(table[name][2]) == bounds, name
        assert set(schema.get("enum", ())) <= set(table[name][2].codes), name


@api
def test_roles_and_the_keys_of_their_messages(document: Document) -> None:
    """Each role that is served stands with every key that its messages may carry."""
    models = {
        "system": chat.SystemMessage,
        "developer": chat.SystemMessage,
        "user": chat.UserMessage,
        "assistant": chat.AssistantMessage,
        "tool": chat.ToolMessage,
    }
    table = document.table_of(models)
    assert table.keys() == models.keys()
    for role, model in models.items():
        assert {"role", "content", *table[role][2].codes} == model.model_fields.keys()


@api
def test_content_parts(document: Document) -> None:
    """The kinds of parts and their keys, inside and beside, are those that the parser takes."""
    models = (
        content.TextPart,
        content.ImagePart,
        content.FilePart,
        content.InputImagePart,
        content.VideoPart,
        content.FramesPart,
    )
    served = set()
    for model in models:
        (kind,) = model.model_fields["type"].annotation.__args__
        for key, field in model.model_fields.items():
            inner = model_within(field.annotation)
            keys = [f"{key}.{one}" for one in inner.model_fields] if inner else [key]
            served |= {(kind, one) for one in keys if one != "type"}
    table = next(t for t in document.tables if any("video_url" in row[0].codes for row in t))
    assert {(row[0].codes[0], code) for row in table for code in row[1].codes} == served
    assert {*table[0][0].codes} == {"text", *content.TEXT_TYPES}
    rows = {row[1].codes[0]: row for row in table}
    assert set(rows["image_url.detail"][2].codes) == set(get_args(content.Detail))


@api
def test_the_media_report(document: Document) -> None:
    """Every key of an entry of ``media`` is told."""
    picture = Picture(b"", Header("JPEG", 1, 1), Sizing(28, 28, clamped=False), "key", "param")
    shape, limits = Sizing(28, 28, clamped=False), VideoLimits()
    sampling = Sampling(2, 2.0, (28, 28), shape, listed=False)
    video = Video([b""], VideoHeader(1, 1, 2, 1.0), sampling, limits, "key", "param")
    for medium in (picture, video):
        assert medium.info().keys() - {"type"} <= {*document.codes}


@api
def test_every_refused_field_is_listed(document: Document) -> None:
    """The table of refused fields is the parser's, with the remedy its message names."""
    table = document.table_of(UNSUPPORTED)
    assert table.keys() == UNSUPPORTED.keys()
    for name, remedy in UNSUPPORTED.items():
        named = [
            word for word in ("response_format", "logit_bias", "top_logprobs") if word in remedy
        ]
        assert set(named) <= set(table[name][1].codes), name


@api
def test_control_tokens_are_refused_or_allowed_as_told(document: Document) -> None:
    """Every control token of the model is in the page, in the column where the parser puts it."""
    limits = RequestLimits(max_messages=9, max_n=1, max_tokens=None, images=0, videos=0)
    row = next(t[0] for t in document.tables if any("im_start" in c for c in t[0][0].codes))
    refused, allowed = ({code.replace("\\", "") for code in cell.codes} for cell in row)
    vocabulary = (ROOT / "qwen2vl_serve" / "demo" / "model" / "tokenizer.json").read_text("utf-8")
    known = set(re.findall(r"<\|(?!reserved)\w+\|>", vocabulary))
    assert refused | allowed == known
    for token in known:
        body = json.dumps({"messages": [{"role": "user", "content": f"a{token}b"}]})
        if token in refused:
            with pytest.raises(ReservedToken):
                parse_chat(body.encode(), limits)
        else:
            parse_chat(body.encode(), limits)


@api
def test_the_examples_are_requests_and_errors_of_this_server(document: Document) -> None:
    """The request passes the parser; the error is what the parser says, to the letter."""
    limits = RequestLimits(max_messages=9, max_n=8, max_tokens=None, images=1, videos=0)
    request, error = (block.text for block in document.blocks if block.language == "json")
    parse_chat(request.encode(), limits)
    with pytest.raises(RequestError) as caught:
        parse_chat(json.dumps({**json.loads(request), "n": 9}).encode(), limits)
    assert json.loads(error) == caught.value.body()


def errors_with_codes(kind: type[APIError] = APIError) -> Iterator[type[APIError]]:
    for child in kind.__subclasses__():
        if child.code is not None:
            yield child
        yield from errors_with_codes(child)


@api
def test_every_error_is_listed_with_status_and_type(document: Document) -> None:
    """The table of errors is the error tree."""
    known = {kind.code: kind for kind in errors_with_codes()}
    table = document.table_of(str(code) for code in known)
    assert table.keys() == known.keys()
    for code, kind in known.items():
        assert table[str(code)][1].text == str(kind.status), code
        assert table[str(code)][2].codes == (kind.type,), code
        assert all(cell.text for cell in table[str(code)]), code


@api
def test_every_header_is_listed(document: Document) -> None:
    """Headers that errors carry, and those that the application sets, are all told of."""
    carried = {name.lower() for kind in errors_with_codes() for name in kind.headers}
    carried.add("allow")  # its value is the path's
    package = ROOT / "qwen2vl_serve"
    source = "".join(
        (package / name).read_text("utf-8")
        for name in ("app.py", "http/connection.py", "http/envelope.py")
    )
    set_by_app = set(
        re.findall(r'(?:self\.headers|MutableHeaders\([^)]*\))\["([^"]+)"\] =', source)
    )
    assert len(set_by_app) == 4, "the pattern above no longer finds where headers are set"
    at_the_door = {*EXPOSED_HEADERS, *(name.decode() for name, _ in SECURITY_HEADERS)}
    assert document.table_of(carried).keys() == carried | set_by_app | at_the_door


@api
def test_every_metric_of_ours_is_listed_with_its_labels(document: Document) -> None:
    """Names are those that Prometheus sees, with the counter's ending."""
    known = {}
    for family in Metrics().registry.collect():
        ending = "_total" if family.type == "counter" else ""
        known[family.name + ending] = family
    table = document.table_of(known)
    assert table.keys() == known.keys()
    source = (ROOT / "qwen2vl_serve" / "http" / "envelope.py").read_text("utf-8")
    for name, row in table.items():
        call = source[source.index(f'"{name.removesuffix("_total")}"') :].split("registry=")[0]
        labels = re.search(r"\[(.*?)\]", call, re.DOTALL)
        wanted = re.findall(r'"(\w+)"', labels[1]) if labels else []
        assert list(row[1].codes) == wanted, name


@api
def test_the_defaults_of_the_limits(document: Document) -> None:
    """Each limit of a request stands with the default that the profile gives it."""
    media = MediaSection().limit_mm_per_prompt
    limits = LimitsSection().model_dump(exclude={"overflow", "reserved_tokens"})  # choices
    known = {f"limits.{name}": value for name, value in limits.items()}
    known |= {f"media.limit_mm_per_prompt.{k}": v for k, v in media.model_dump().items()}
    known["engine.max_model_len"] = EngineSection().max_model_len
    for name in (
        "max_image_pixels",
        "max_video_bytes",
        "max_video_frames",
        "max_video_pixels",
        "video_decode_seconds",
        "max_download_bytes",
        "download_seconds",
    ):
        known[f"media.{name}"] = getattr(MediaSection(), name)
    known["files.max_file_bytes"] = FilesSection().max_file_bytes
    table = document.table_of(known)
    assert table.keys() == known.keys()
    for name, value in known.items():
        assert numbers(table[name][1]) == (set() if value is None else {float(value)}), name
        assert set(table[name][2].codes) < {str(kind.code) for kind in errors_with_codes()}


@pytest.mark.parametrize("document", BATCHES, ids=str)
def test_every_status_of_a_batch_is_told(document: Document) -> None:
    """And the line of the input that the page shows is one that the server takes."""
    statuses = set(get_args(Status))
    assert {code for row in document.table_of({"failed"}).values() for code in row[0].codes}
    assert statuses <= {code for table in document.tables for row in table for code in row[0].codes}
    (line,) = (block.text for block in document.blocks if block.language == "json")
    assert _custom_id(line.strip().encode(), 10_000) == "page-1"


@api
def test_the_bounds_of_schemas(document: Document) -> None:
    """Each number of the table is the one that the parser holds schemas to."""
    told = {
        float(text.replace(",", ""))
        for table in document.tables
        if any("enum" in row[0].codes for row in table)
        for row in table
        for text in re.findall(r"[0-9][0-9,]*[0-9]", row[1].text)
    }
    assert told == {float(getattr(json_schema, name)) for name in BOUNDS}


BOUNDS = [name for name in vars(json_schema) if name.startswith("MOST_")]


def exit_statuses() -> set[int]:
    """The statuses that ``cli._run`` returns: of its own, and what commands end with."""
    tree = ast.parse(Path(cli.__file__).read_text("utf-8"))
    run = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_run")
    return {0} | {
        node.value
        for node in ast.walk(run)
        if isinstance(node, ast.Constant) and type(node.value) is int
    }


@api
def test_exit_statuses(document: Document) -> None:
    """The table of exit statuses is what the command line returns, and what it says of itself."""
    known = {str(status) for status in exit_statuses()}
    assert document.table_of(known).keys() == known
    assert cli.__doc__ is not None
    told = cli.__doc__.partition("Exit status:")[2]
    assert known == set(re.findall(r"\b(\d+) [a-z]", told))


@readme
def test_the_readme_tells_the_exit_statuses(document: Document) -> None:
    """One sentence of the README names them all."""
    known = exit_statuses()
    assert any(
        known <= {int(number) for number in re.findall(r"\d+", sentence)}
        for sentence in re.split(r"(?<=。)|(?<=\.)\s|\n\n", document.source)
    )


def variables_read() -> set[str]:
    """Names of environment variables in the code of server and client."""
    pattern = re.compile(
        r"(?:QWEN2VL|VLLM|HF|XDG|CUDA|TRANSFORMERS|OTEL|ONEDNN|TORCH_COMPILE)_[A-Z_]+"
    )
    found = set()
    for folder in ("qwen2vl_serve", "clients/qwen2vl_client"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= {node.value} if pattern.fullmatch(node.value) else set()
    return found


@api
def test_every_environment_variable_is_listed(document: Document) -> None:
    """What the code reads or sets is told; what else is told exists in vLLM or the hub's client."""
    read = variables_read()
    told = document.table_of(read).keys()
    assert read <= told
    package = importlib.util.find_spec("vllm")
    if package is not None and package.origin is not None:
        theirs = Path(package.origin).with_name("envs.py").read_text("utf-8")
        known = {"HF_TOKEN", "HF_ENDPOINT", *re.findall(r'"(VLLM_\w+)"', theirs)}
        assert told - read <= known


def options_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        (cli.serve_main if words == ["--help"] else cli.main)(words)
    assert stop.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))


@readme
def test_every_option_of_serve_is_listed(
    document: Document, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of options is that of ``serve --help``."""
    options = options_of(["--help"], capsys) | {"--help"}
    told = {
        code.split()[0]
        for table in document.tables
        for row in table
        for code in row[0].codes
        if code.startswith("--")
    }
    assert told == options


@readme
def test_every_command_is_listed(document: Document, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of ``qwen2vl-serve --help`` stand in the README, each in a code span."""
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out.partition("COMMAND")[2]
    commands = re.findall(r"^    (\w+) +\S", listed, re.MULTILINE)
    assert commands[0] == "serve"
    for command in commands:
        assert f"qwen2vl-serve {command}" in document.codes


@readme
def test_the_table_of_profiles(document: Document) -> None:
    """Model, cards, window and pictures in the README are those of the profiles that ship."""
    names = profile_names()
    table = document.table_of(names)
    assert sorted(table) == names
    for name in names:
        profile = load_profile(name)
        _, model, cards, window, media = table[name]
        if profile.model.model != "demo":
            assert model.codes == (profile.model.model,)
            hardware, engine = profile.hardware, profile.engine
            assert cards.text.startswith(f"{profile.workers} × {hardware.card}")
            if engine.tensor_parallel_size > 1:
                assert str(engine.tensor_parallel_size) in cards.text.split("×", 1)[1]
            if "GiB" in cards.text:
                assert f"{hardware.card_memory_gib:g} GiB" in cards.text
        assert numbers(window) == {profile.engine.max_model_len}
        limits = profile.media.limit_mm_per_prompt
        assert numbers(media) == {limits.image, limits.video} - {0}


@readme
def test_every_target_of_make_that_is_named_exists(document: Document) -> None:
    """``make serve`` and the others are targets, and the README names the two that matter."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\n])", document.source))
    assert {"serve", "test", "help"} <= named <= targets
    for variable in ("EXTRA", "PROFILE", "PORT", "PYTHON"):
        assert variable in makefile
        assert any(code.startswith(f"{variable}=") for code in document.codes)


@pytest.mark.parametrize("document", HELD, ids=str)
def test_links_lead_somewhere(document: Document) -> None:
    """Every relative link names a file that exists, every anchor a heading."""
    for link in document.links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.path.parent / name).resolve() if name else document.path
        assert target.exists(), link
        if anchor:
            assert anchor in Document(str(target.relative_to(ROOT))).anchors, link


@pytest.mark.parametrize("twins", TWINS, ids=str)
def test_links_stay_in_the_language(twins: list[Document]) -> None:
    """A Chinese page leads to Chinese ones where they exist, an English one to English ones."""
    for document, twin in (twins, twins[::-1]):
        for link in document.links:
            name = link.partition("#")[0]
            target = (document.path.parent / name).resolve()
            if not name.endswith(".md") or target == twin.path or "://" in link:
                continue
            chinese = document.path.name.endswith(".zh-CN.md")
            if chinese and target.with_suffix(".zh-CN.md").exists():
                raise AssertionError(link)
            assert chinese or not name.endswith(".zh-CN.md"), link


@pytest.mark.parametrize("twins", TWINS, ids=str)
def test_the_two_languages_have_one_shape(twins: list[Document]) -> None:
    """The same headings by level, the same tables by size, the same code but for comments."""
    english, chinese = twins
    assert [tag for tag, _ in english.headings] == [tag for tag, _ in chinese.headings]
    assert [len(table) for table in english.tables] == [len(table) for table in chinese.tables]

    def code(document: Document) -> list[tuple[str, frozenset[str], str]]:
        comment = re.compile(r"(?:^|\s+)#(?!\{).*", re.MULTILINE)
        return [(b.language, b.tags, comment.sub("", b.text)) for b in document.blocks]

    assert code(english) == code(chinese)


@pytest.mark.parametrize("twins", TWINS, ids=str)
def test_the_two_languages_name_the_same_things(twins: list[Document]) -> None:
    """What stands in code marks is not translated, so that each page has all of the other's."""
    english, chinese = twins
    assert {*english.codes} == {*chinese.codes}


@readme
def test_the_demo_model_is_introduced_as_what_it_is(document: Document) -> None:
    """The first paragraph that names the demo model says that it is a demonstrator."""
    words = ("demonstrator", "test bed") if document.path.name == "README.md" else ("演示", "测试")
    names = ("demo model", "演示模型")
    paragraphs = document.source.replace("\n", " ").split("  ")
    first = next(p for p in paragraphs if any(name in p for name in names))
    assert all(word in first for word in words)
