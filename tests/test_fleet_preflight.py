"""What a fleet refuses before a replica starts, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen2vl_serve.errors import PreflightError, ProfileError, SetupError
from qwen2vl_serve.fleet.preflight import door_keys, refuse_what_is_one_servers
from qwen2vl_serve.profile import Profile, load_profile

FILES = Path(__file__).parents[1] / "deploy" / "ray"
OPEN = "server.host=0.0.0.0"


def profile(*settings: str) -> Profile:
    return load_profile("demo", ["files.folder=/mnt/files", *settings])


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where named keys would be."""
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "qwen2vl-serve" / "keys.json"


@pytest.mark.parametrize("host", ["0.0.0.0", "2001:db8::7", "192.0.2.7", "gpu-1"])
def test_a_door_that_others_reach_has_keys(host: str) -> None:
    """Every gateway and replica refuses to start without; the message says where keys come from."""
    with pytest.raises(PreflightError) as refused:
        door_keys(profile(f"server.host={host}"))
    for word in (host, "server.api_key_file", "on every machine", "server.host=127.0.0.1"):
        assert word in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_door_of_this_machine_needs_none(host: str) -> None:
    """On a loopback address no other machine asks, so a fleet starts there without a key."""
    assert not door_keys(profile(f"server.host={host}"))


def test_keys_from_any_source_open_the_door(
    no_keys_of_this_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of plain keys, the environment, named keys; only who has one is let in."""
    (tmp_path / "keys").write_text("sk-1\n")
    assert door_keys(profile(OPEN, f"server.api_key_file={tmp_path / 'keys'}"))
    with monkeypatch.context() as with_variable:
        with_variable.setenv("QWEN2VL_API_KEY", "sk-2")
        keys = door_keys(profile(OPEN))
    keys.check("Bearer sk-2")
    no_keys_of_this_machine.parent.mkdir()
    no_keys_of_this_machine.write_text('{"keys": []}')
    assert door_keys(profile(OPEN))


def test_a_key_file_that_is_not_on_a_machine_leaves_no_door_open_there(tmp_path: Path) -> None:
    """The start is refused by the field's name, not served without the keys of the file."""
    with pytest.raises(ProfileError, match="api_key_file"):
        door_keys(profile(OPEN, f"server.api_key_file={tmp_path / 'absent'}"))


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("batches.enabled=true", "batches.enabled"),
        ("files.folder=null", "files.folder"),
        ("engine.distributed_executor_backend=ray", "engine.distributed_executor_backend"),
        ("server.ssl_certfile=/etc/ssl/cert.pem", "server.ssl_certfile"),
    ],
)
def test_what_is_one_servers_is_refused_by_name(setting: str, word: str) -> None:
    """The message begins with the field: batches, uploads without a folder of all replicas, an
    engine over several machines, TLS, which Ray's proxies would not speak."""
    refuse_what_is_one_servers(profile())
    with pytest.raises(PreflightError, match=rf"^{word}: "):
        refuse_what_is_one_servers(profile(setting))


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_ship_are_closed_or_of_this_machine(file: Path) -> None:
    """Where Ray's proxy listens to a network, the profile names a key file, which has to be there;
    elsewhere it listens on loopback."""
    deployed = yaml.safe_load(file.read_text("utf-8"))
    (application,) = deployed["applications"]
    loaded = load_profile(application["args"]["profile"], application["args"]["set"])
    refuse_what_is_one_servers(loaded)
    if deployed["http_options"]["host"] == "127.0.0.1":
        assert not door_keys(loaded)
        return
    with pytest.raises(SetupError, match=r"server\.api_key_file /"):
        door_keys(loaded)
