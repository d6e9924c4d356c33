"""Loading and unloading adapters while the server runs: who may, from where, under which names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile
from qwen2vl_serve.profile import load_profile
from tests.adapter_files import Q_PROJ, VISION, write_adapter
from tests.served import Served, served

OPERATOR = "the-operators-key"


@contextmanager
def serving(folder: Path | None, *overrides: str, key: str = OPERATOR) -> Iterator[Served]:
    fields = [] if folder is None else [f"adapters.allowed_paths=[{folder}]"]
    fields += [f"server.api_keys=[{key}]"] if key else []
    profile = load_profile("demo", [*fields, *overrides])
    with served(profile, Keys(profile.api_keys())) as one:
        yield one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapters" / "ocr")
    write_adapter(tmp_path / "adapters" / "tower", {VISION: (192, 576)})
    write_adapter(tmp_path / "outside")
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "adapters"


@pytest.fixture
def server(folder: Path) -> Iterator[Served]:
    with serving(folder) as one:
        yield one


def load(server: Served, name: str, path: object, key: str = OPERATOR, **fields: Any) -> Any:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return server.request("POST", "/v1/load_lora_adapter", key, json=body)


def unload(server: Served, name: str, key: str = OPERATOR) -> requests.Response:
    return server.request("POST", "/v1/unload_lora_adapter", key, json={"lora_name": name})


def refusal(reply: requests.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


def names(server: Served) -> list[str]:
    return [one["id"] for one in server.request("GET", "/v1/models", OPERATOR).json()["data"]]


def test_from_loading_to_unloading(server: Served, folder: Path) -> None:
    """In vLLM's shapes; the adapter is listed with its parent, and its requests are counted."""
    card = load(server, "ocr", folder / "ocr").json()
    assert (card["id"], card["parent"], card["root"]) == ("ocr", "demo", "demo")
    assert names(server) == ["demo", "alias", "ocr"]
    assert server.request("GET", "/v1/models/ocr", OPERATOR).json() == card
    assert server.chat(OPERATOR, model="ocr").status_code == 200
    assert server.engine.requests[-1].model == "ocr"
    counts = server.request("GET", "/metrics", OPERATOR).text
    assert 'qwen2vl_adapter_requests_total{adapter="ocr"} 1.0' in counts
    assert "qwen2vl_adapters 1.0" in counts
    assert unload(server, "ocr").json() == {"id": "ocr", "object": "model", "deleted": True}
    assert names(server) == ["demo", "alias"]
    assert 'adapter="ocr"' not in server.request("GET", "/metrics", OPERATOR).text
    assert "is not served here" in refusal(server.chat(OPERATOR, model="ocr"), 404)
    assert "no such adapter" in refusal(unload(server, "ocr"), 404)


def test_off_unless_folders_are_allowed(tmp_path: Path) -> None:
    """With the operator's key too, both routes are 403 and name the setting that opens them."""
    write_adapter(tmp_path / "ocr")
    with serving(None) as server:
        assert "allowed_paths" in refusal(load(server, "ocr", tmp_path / "ocr"), 403)
        assert "allowed_paths" in refusal(unload(server, "ocr"), 403)


def test_an_open_server_loads_nothing(folder: Path) -> None:
    """Allowed folders are not enough: where the server has no key at all, loading is 403."""
    with serving(folder, key="") as server:
        assert "needs a key" in refusal(load(server, "ocr", folder / "ocr", key=""), 403)


def test_clients_keys_do_not_load(folder: Path, tmp_path: Path) -> None:
    """A named key may use what it is allowed, and change nothing for others."""
    file = KeysFile(tmp_path / "keys.json")
    secret = file.add("client", KeyLimits(), ["ocr"], None)
    profile = load_profile(
        "demo", [f"adapters.allowed_paths=[{folder}]", f"server.api_keys=[{OPERATOR}]"]
    )
    with served(profile, Keys(profile.api_keys(), file)) as server:
        assert "needs a key" in refusal(load(server, "mine", folder / "ocr", secret), 403)
        assert load(server, "ocr", folder / "ocr").status_code == 200
        assert "needs a key" in refusal(unload(server, "ocr", secret), 403)
        listed = server.request("GET", "/v1/models", secret).json()["data"]
        assert [one["id"] for one in listed] == ["ocr"]
        assert "is not served" in refusal(server.chat(secret, model="demo"), 404)
        # Without a name it gets the first model that it may use, and not the engine's own first.
        assert server.chat(secret).status_code == 200
        assert server.engine.requests[-1].model == "ocr"


@pytest.mark.parametrize(
    "path",
    ["{out}", "{in}/../outside", "{in}/link", "../outside", "/etc", "{in}/nothing", "\x00", "~"],
)
def test_only_from_the_allowed_folders(server: Served, folder: Path, path: str) -> None:
    """Outside reads the same whether something is there or not; links lead nowhere."""
    path = path.replace("{in}", str(folder)).replace("{out}", str(folder.parent / "outside"))
    assert "is no folder below" in refusal(load(server, "ocr", path), 400)
    assert names(server) == ["demo", "alias"]


def test_a_path_below_an_allowed_folder(server: Served, folder: Path) -> None:
    """A relative path counts from the allowed folder, not from where the server was started."""
    assert load(server, "ocr", "ocr").status_code == 200
    assert server.engine.adapters["ocr"].folder == folder / "ocr"


def test_names_that_are_taken(server: Served, folder: Path) -> None:
    """The model's own stay its own; a loaded one is replaced with ``load_inplace: true`` alone."""
    assert "the model's own" in refusal(load(server, "alias", "ocr"), 400)
    assert load(server, "ocr", "ocr").status_code == 200
    for unsaid in ({}, {"load_inplace": None}):
        assert "load_inplace" in refusal(load(server, "ocr", "ocr", **unsaid), 400)
    before = server.engine.adapters["ocr"].digest
    write_adapter(folder / "ocr", rank=4)
    assert load(server, "ocr", "ocr", load_inplace=True).status_code == 200
    assert server.engine.adapters["ocr"].digest != before


def test_what_is_refused_says_why(folder: Path) -> None:
    """Vision parts that would be left out, too high a rank and another model's sizes are 400."""
    with serving(folder, "engine.enable_tower_connector_lora=false") as server:
        assert "vision tower" in refusal(load(server, "t", "tower"), 400)
    with serving(folder, "engine.max_lora_rank=1") as server:
        assert "has rank 2" in refusal(load(server, "ocr", "ocr"), 400)
        write_adapter(folder / "wide", {Q_PROJ: (512, 512)})
        assert "for another model" in refusal(load(server, "wide", "wide"), 400)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"lora_name": "", "lora_path": "ocr"}, "invalid_value"),
        ({"lora_name": 1, "lora_path": "ocr"}, "invalid_type"),
        (
            {"lora_name": "a", "lora_path": "ocr", "is_3d_lora_weight": True},
            "unsupported_parameter",
        ),
        ({"lora_name": "a" * 101, "lora_path": "ocr"}, "invalid_value"),
        ({"lora_name": "a\nb", "lora_path": "ocr"}, "invalid_value"),
    ],
)
def test_bodies_are_strict(server: Served, body: dict[str, Any], code: str) -> None:
    """A field that is missing, empty, mistyped, unknown, too long or of two lines is 400."""
    reply = server.request("POST", "/v1/load_lora_adapter", OPERATOR, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)


def test_the_body_is_bounded(folder: Path) -> None:
    """A body above ``limits.max_body_bytes`` is 413, and the message tells the limit."""
    with serving(folder, "limits.max_body_bytes=1000") as server:
        assert "at most 1000" in refusal(load(server, "ocr", "x" * 2000), 413)
