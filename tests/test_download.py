"""Checkpoints from a hub on loopback that breaks off, lies and refuses, in both hubs' words."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen2vl_serve import cli
from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.download import Downloaded, Source, download, fetching, have_model
from qwen2vl_serve.download.listing import RepoFile, check_name, needed
from qwen2vl_serve.download.meter import Meter
from qwen2vl_serve.errors import DownloadError, HubUnreachable, PreflightError
from qwen2vl_serve.profile import make_profile
from tests.loopback_hub import COMMIT, NAME, LoopbackHub, loopback_hub

WEIGHTS = "model.safetensors"
BOTH = pytest.mark.parametrize("source", ["hf", "modelscope"])


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, beside what repositories hold that serving does not need."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(MODEL_FOLDER, folder, dirs_exist_ok=True)
    names = "pytorch_model.bin model.onnx training_args.bin original/weights.pth run.py page.png"
    for name in (*names.split(), "onnx/model.safetensors", "consolidated.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub(repository) as one:
        _use(one, tmp_path, monkeypatch)
        yield one


def _use(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(folder / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(folder / "modelscope-home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "no-token"))


class Heard:
    """Takes note of what a ``Progress`` is told."""

    def __init__(self) -> None:
        self.total = self.done = self.fetched = 0
        self.lines: list[str] = []

    def begin(self, total: int) -> None:
        self.total = total

    def advance(self, count: int, *, fetched: bool = True) -> None:
        self.done += count
        self.fetched += count * fetched

    def say(self, line: str) -> None:
        self.lines.append(line)


def fetch(source: Source = "hf", **options: Any) -> Downloaded:
    options.setdefault("progress", Heard())
    return download(NAME, source=source, **options)


def same(folder: Path) -> bool:
    """Whether a folder holds the demo checkpoint to the last byte."""
    return all(
        (folder / file.name).read_bytes() == file.read_bytes() for file in MODEL_FOLDER.iterdir()
    )


@BOTH
def test_only_what_serving_needs(hub: LoopbackHub, source: Source, tmp_path: Path) -> None:
    """The checkpoint to the last byte, no pickle, nothing of the page; every byte is told."""
    heard = Heard()
    found = fetch(source, to=tmp_path / "here", progress=heard)
    assert found.folder == tmp_path / "here"
    assert same(found.folder)
    kept = {p.name for p in found.folder.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert kept == {file.name for file in MODEL_FOLDER.iterdir()}
    assert found.files == len(kept)
    assert heard.done == heard.total == found.size
    assert found.commit == (COMMIT if source == "hf" else None)
    assert checkpoint.check_weights(found.folder) == 1


@BOTH
def test_into_the_hubs_cache_and_not_again(hub: LoopbackHub, source: Source) -> None:
    """A second call gives the same folder and fetches no file; its progress reaches the total."""
    first = fetch(source)
    assert same(first.folder)
    before = len(hub.fetched())
    heard = Heard()
    assert fetch(source, progress=heard).folder == first.folder
    assert len(hub.fetched()) == before
    assert (heard.done, heard.fetched) == (heard.total, 0)


@BOTH
@pytest.mark.parametrize("below", [None, "given"])
def test_the_cache_is_the_one_that_is_read(
    hub: LoopbackHub, source: Source, tmp_path: Path, below: str | None
) -> None:
    """The planner, the doctor and a start without a network find it by its name."""
    cache = None if below is None else tmp_path / below
    found = fetch(source, cache=cache)
    assert hubs.cached_folder(NAME, None, cache) == found.folder
    of_hugging_face = found.folder if source == "hf" else None
    assert hubs.cached_folder(NAME, COMMIT, cache) == of_hugging_face


@pytest.mark.parametrize("asked", ["True", "False"])
def test_the_cache_of_the_hub_that_is_asked_goes_first(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Where both hubs' copies are here, ``VLLM_USE_MODELSCOPE`` says which one is read."""
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", asked)
    folders = {source: fetch(source).folder for source in ("hf", "modelscope")}
    assert hubs.cached_folder(NAME) == folders["modelscope" if asked == "True" else "hf"]


@BOTH
def test_goes_on_where_it_broke_off(hub: LoopbackHub, source: Source, tmp_path: Path) -> None:
    """A connection that breaks off twice: the rest alone is asked for, by a range.

    What is kept is whole pieces of 10 MiB.
    """
    hub.faults[WEIGHTS] = [11_000_000, 1_000]
    found = fetch(source, to=tmp_path)
    assert same(found.folder)
    ranges = [wanted for method, path, wanted in hub.asked if (method, path) == ("GET", WEIGHTS)]
    begun = [int(str(one).removeprefix("bytes=").split("-")[0]) for one in ranges if one]
    assert begun[0] >= 10_000_000, ranges


def interrupted(
    hub: LoopbackHub, source: Source, to: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have a download end after 11 MB of the weights; the hub is well afterwards."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("modelscope_hub._download._wait_download_retry", give_up)
    hub.faults[WEIGHTS] = [11_000_000, *[100] * 9]
    with pytest.raises(HubUnreachable, match="goes on where it stopped"):
        fetch(source, to=to)
    hub.faults.clear()


@BOTH
@pytest.mark.parametrize("cached", [True, False])
def test_a_later_call_goes_on(
    hub: LoopbackHub,
    source: Source,
    cached: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an interrupted command has fetched, the next one does not fetch again."""
    to = None if cached else tmp_path / "here"
    interrupted(hub, source, to, monkeypatch)
    hub.asked.clear()
    heard = Heard()
    found = fetch(source, to=to, progress=heard)
    assert same(found.folder)
    assert heard.done == heard.total
    assert heard.fetched < 2_000_000
    (wanted,) = [w for method, path, w in hub.asked if (method, path) == ("GET", WEIGHTS)]
    assert wanted is not None
    assert int(wanted.removeprefix("bytes=").split("-")[0]) > 10_000_000


def give_up(retry: object, error: Exception, *_: object) -> None:
    raise error


@BOTH
def test_a_file_that_fails_ends_it_at_once(
    hub: LoopbackHub, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No waiting for what is under way, which may be hours of weights."""
    monkeypatch.setattr("modelscope_hub._download._wait_download_retry", give_up)
    hub.faults.update({WEIGHTS: ["stuck"] * 9, "tokenizer.json": [404] * 9})
    begun = time.monotonic()
    with pytest.raises((DownloadError, PreflightError)):
        fetch(source, to=tmp_path)
    assert time.monotonic() - begun < 8


@BOTH
def test_ctrl_c_ends_it_at_once(hub: LoopbackHub, source: Source, tmp_path: Path) -> None:
    """In the midst of a file, without a traceback; the same command goes on."""
    hub.faults[WEIGHTS] = ["stuck"] * 9
    words = [sys.executable, "-m", "qwen2vl_serve.cli", "download", NAME, "--source", source]
    words += ["--to", str(tmp_path)]
    begun = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while WEIGHTS not in hub.fetched():
        assert begun.poll() is None
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    try:
        out, told = begun.communicate(timeout=20)
    finally:
        begun.kill()
    assert (begun.returncode, out) == (130, "")
    assert "Traceback" not in told
    hub.faults.clear()
    assert same(fetch(source, to=tmp_path).folder)


@BOTH
@pytest.mark.parametrize("cached", [True, False])
def test_two_commands_at_once_fetch_it_once(
    hub: LoopbackHub, source: Source, cached: bool, tmp_path: Path
) -> None:
    """One fetches; the others wait for it, and then have it as well."""
    hub.faults[WEIGHTS] = ["stuck"]
    options: dict[str, Any] = {} if cached else {"to": tmp_path / "here"}
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(fetch, source, **options) for _ in range(3)]
        while WEIGHTS not in hub.fetched():
            time.sleep(0.05)
        time.sleep(0.5)
        hub.released.set()
        assert all(same(call.result().folder) for call in calls)
    assert hub.fetched().count(WEIGHTS) == 1


def test_a_new_commit_with_the_same_weights(hub: LoopbackHub) -> None:
    """As after an edit of the page: what the cache holds by its hash is not fetched again."""
    first = fetch()
    hub.asked.clear()
    hub.commit = "decade" + "0" * 34
    second = fetch()
    assert second.folder != first.folder
    assert same(second.folder)
    assert not hub.asked


def test_what_was_begun_of_a_longer_file(hub: LoopbackHub, tmp_path: Path) -> None:
    """An interrupted download of another revision to the same folder; no range continues it."""
    part = tmp_path / ".cache" / "huggingface" / "download" / f"config.json{hubs.PART}"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100_000)
    assert same(fetch(to=tmp_path).folder)


@BOTH
def test_what_a_link_in_the_folder_names_is_left_alone(
    hub: LoopbackHub, source: Source, tmp_path: Path
) -> None:
    """A folder of links to another copy gets a file of its own where that copy is different."""
    theirs = tmp_path / "config.json"
    theirs.write_text("{}")
    to = tmp_path / "here"
    to.mkdir()
    (to / "config.json").symlink_to(theirs)
    assert same(fetch(source, to=to).folder)
    assert theirs.read_text() == "{}"


def test_a_hub_that_is_ill(hub: LoopbackHub, tmp_path: Path) -> None:
    """A server's error on one file: told with its status, and the rest is not lost."""
    hub.faults[WEIGHTS] = [500]
    with pytest.raises(DownloadError, match="answers 500; try again later"):
        fetch(to=tmp_path)
    before = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert before
    hub.asked.clear()
    assert same(fetch(to=tmp_path).folder)
    assert before.isdisjoint(hub.fetched())


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_a_damaged_file_is_fetched_again(hub: LoopbackHub, tmp_path: Path, path: str) -> None:
    """Large files by their SHA-256, small ones by git's name: the size alone was right."""
    hub.faults[path] = ["corrupt"]
    heard = Heard()
    found = fetch(to=tmp_path, progress=heard)
    assert same(found.folder)
    assert any("fetched again" in line for line in heard.lines)
    assert heard.done == heard.total


@BOTH
def test_what_stays_damaged_is_not_kept(
    hub: LoopbackHub, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of wrong content is left where a server would find it."""
    monkeypatch.setattr("modelscope_hub._download._DownloadControl.sleep", lambda *_: None)
    hub.faults[WEIGHTS] = ["corrupt"] * 20
    with pytest.raises(DownloadError, match="hash"):
        fetch(source, to=tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_damage_in_the_cache_is_found(hub: LoopbackHub) -> None:
    """A second `download` looks at every byte of what is there."""
    found = fetch()
    real = (found.folder / WEIGHTS).resolve()
    data = bytearray(real.read_bytes())
    data[1000] ^= 1
    real.write_bytes(data)
    assert same(fetch().folder)


def test_a_file_that_was_cut_later(hub: LoopbackHub, tmp_path: Path) -> None:
    """The next call to the same folder finds it by its size and fetches it again."""
    fetch(to=tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{")
    assert same(fetch(to=tmp_path).folder)


def test_a_disk_without_room(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first byte, not after the last gigabyte."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(PreflightError, match=r"0\.0 GB are still to come"):
        fetch(to=tmp_path / "new")
    assert not hub.fetched()


@BOTH
@pytest.mark.parametrize("cached", [True, False])
def test_a_disk_with_room_for_the_rest(
    hub: LoopbackHub,
    source: Source,
    cached: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an interrupted command has fetched is there already."""
    to = None if cached else tmp_path / "here"
    interrupted(hub, source, to, monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    assert same(fetch(source, to=to).folder)


def test_a_folder_that_cannot_be_written(hub: LoopbackHub, tmp_path: Path) -> None:
    """A place below a file is refused in our words, not by the system's error halfway."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot be written"):
        fetch(to=tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": "t", "gated": True}, "is gated; accept its terms"),
        ({"token": "t"}, "or it is private"),
        ({"name": "owner/other"}, "no such model"),
    ],
)
def test_refusals_of_the_hub(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    """One line each; a gated model is told apart, a private one not from one that is missing."""
    with loopback_hub(repository, **options) as hub:
        _use(hub, tmp_path, monkeypatch)
        with pytest.raises(PreflightError, match=words) as refusal:
            fetch(to=tmp_path)
        assert "\n" not in str(refusal.value)


def test_a_token_opens_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the account's token in ``HF_TOKEN`` a gated repository comes whole."""
    with loopback_hub(repository, token="hf_secret", gated=True) as hub:
        _use(hub, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert same(fetch(to=tmp_path / "here").folder)


@pytest.mark.parametrize(
    ("variable", "value", "source"),
    [
        ("HF_ENDPOINT", "hf-mirror.com", "hf"),
        ("HF_ENDPOINT", " https://hf-mirror.com", "auto"),
        ("MODELSCOPE_ENDPOINT", "127.0.0.1:9", "modelscope"),
    ],
)
def test_an_endpoint_that_is_no_address(
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    source: Source,
) -> None:
    """The refusal names the variable and what to write; it does not say that the hub is down."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(PreflightError, match=f"^{variable} is '{value}'.*https://"):
        fetch(source)


def test_an_endpoint_may_end_with_a_slash(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As people copy it from a browser."""
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    assert same(fetch(to=tmp_path).folder)


@pytest.mark.parametrize(("source", "package"), [("hf", "socksio"), ("modelscope", "PySocks")])
def test_a_socks_proxy_without_its_package(hub: LoopbackHub, source: Source, package: str) -> None:
    """As a local proxy's program sets it for all; the line names the package, not the hub."""
    words = [sys.executable, "-m", "qwen2vl_serve.cli", "download", NAME, "--source", source]
    proxy = dict.fromkeys(("all_proxy", "http_proxy"), "socks5://127.0.0.1:9")
    proxy |= dict.fromkeys(("no_proxy", "NO_PROXY"), "")
    done = subprocess.run(words, env={**os.environ, **proxy}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"pip install {package}" in done.stderr


def test_no_such_revision(hub: LoopbackHub, tmp_path: Path) -> None:
    """The refusal says that the model lacks the revision, not that there is no such model."""
    with pytest.raises(PreflightError, match="has no revision v9"):
        fetch(to=tmp_path, revision="v9")


def test_modelscope_has_no_such_model(hub: LoopbackHub, tmp_path: Path) -> None:
    """The refusal names the hub that was asked, since the other may have the model."""
    hub.name = "owner/other"
    with pytest.raises(PreflightError, match="ModelScope has no such model"):
        fetch("modelscope", to=tmp_path)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Either variable refuses a download and is named by the refusal; no hub hears of it."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(PreflightError, match=f"would have to be asked of a hub, which {variable}"):
        fetch(to=tmp_path)
    assert not hub.requests


def test_weights_that_are_pickles_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles may run code when they are loaded, so ``pytorch_model.bin`` does not stand in."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with loopback_hub(folder) as hub:
        _use(hub, tmp_path, monkeypatch)
        with pytest.raises(PreflightError, match="no weights as safetensors"):
            fetch(to=tmp_path / "here")


def dead_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return f"http://127.0.0.1:{gone.getsockname()[1]}"


def test_auto_asks_modelscope_where_the_other_is_not_reached(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a firewall that lets one of them through; what happened is told."""
    monkeypatch.setenv("HF_ENDPOINT", dead_address())
    heard = Heard()
    found = fetch("auto", to=tmp_path, progress=heard)
    assert (found.source, same(found.folder)) == ("modelscope", True)
    assert heard.lines[-1] == "asking ModelScope instead"
    with pytest.raises(HubUnreachable, match="is not reached"):
        fetch("hf", to=tmp_path)


def test_auto_follows_vllms_variable(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``VLLM_USE_MODELSCOPE`` set, ``auto`` asks ModelScope though both hubs are well."""
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert fetch("auto", to=tmp_path).source == "modelscope"


def test_the_command(hub: LoopbackHub, tmp_path: Path, capsys: Any) -> None:
    """The folder on standard output, for scripts; how it goes and the commit on the other."""
    to = tmp_path / "here"
    assert cli.main(["download", NAME, "--to", str(to)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{to}\n"
    assert f"--set model.revision={COMMIT}" in told.err
    assert "12.1 MB of 12.1 MB" in told.err
    assert cli.main(["download", "nothing"]) == 2
    assert cli.main(["download", NAME, "--revision", "v9"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_download_that_fails_ends_with_1(
    hub: LoopbackHub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that is not reached is one line and 1, not the 2 of a name that is wrong."""
    monkeypatch.setenv("HF_ENDPOINT", dead_address())
    assert cli.main(["download", NAME, "--source", "hf", "--to", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def profile(**model: Any) -> Any:
    return make_profile({"model": {"model": NAME, **model}})


def test_a_server_has_its_model_before_the_engine_starts(hub: LoopbackHub) -> None:
    """Fetched on the first use, with lines that tell how far it is; taken from the cache later."""
    lines: list[str] = []
    ready = have_model(profile(revision="main"), lines.append)
    assert same(Path(ready.model.path))
    assert ready.model.served_names == ("tiny-vl",)
    assert COMMIT in lines[-1]
    hub.requests.clear()
    assert have_model(profile(), lines.append) == ready
    assert not hub.requests


@BOTH
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "VLLM_USE_MODELSCOPE"])
def test_a_server_without_a_network_serves_what_is_here(
    hub: LoopbackHub, source: Source, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the other hub gave, as where ``auto`` had fallen back to it."""
    found = fetch(source)
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert have_model(profile(), print).model.path == str(found.folder)
    assert not hub.requests


@pytest.mark.parametrize("place", ["models", "hub/models"])
def test_what_an_older_modelscope_fetched_is_served(
    hub: LoopbackHub, tmp_path: Path, place: str
) -> None:
    """Up to 1.37 it kept no revisions apart, and wrote ``___`` for a dot."""
    folder = tmp_path / "modelscope" / place / "owner" / "tiny___5-vl"
    shutil.copytree(MODEL_FOLDER, folder)
    named = make_profile({"model": {"model": "owner/tiny.5-vl"}})
    assert have_model(named, print).model.path == str(folder)
    assert not hub.requests


def test_a_checkpoint_that_is_here_in_part_is_gone_on_with(hub: LoopbackHub) -> None:
    """A start fetches weights that the cache lacks into the folder that holds the rest."""
    found = fetch()
    (found.folder / WEIGHTS).unlink()
    assert have_model(profile(), print).model.path == str(found.folder)
    assert same(found.folder)


def test_serve_tells_how_far_it_is(hub: LoopbackHub) -> None:
    """The whole launcher over a scripted engine: lines of the download before the first phase."""
    words = [sys.executable, "-m", "tests.serve_fake", "--port", "0", "up", f"model={NAME}"]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    lines = []
    assert done.stdout is not None
    for line in done.stdout:
        lines.append(line)
        if line.startswith("ready"):
            done.terminate()
    assert done.wait(120) == 0, lines
    told = [line for line in lines if line.startswith("fetch")]
    assert "12.1 MB of 12.1 MB" in told[-2]
    assert COMMIT in told[-1]
    assert lines.index(told[-1]) < next(n for n, line in enumerate(lines) if "ready" in line)


@pytest.mark.parametrize("model", ["demo", str(MODEL_FOLDER)])
def test_a_folder_is_served_as_it_is(model: str) -> None:
    """For ``demo`` and for a path the profile stays what it was: there is nothing to fetch."""
    given = make_profile({"model": {"model": model}})
    assert have_model(given, print) == given


@pytest.mark.parametrize("name", ["plain", "a/b/c", "../x", "a/..", "a b/c", "a/b?x", "/x", "é/x"])
def test_names_that_are_none(name: str) -> None:
    """Only ``owner/name`` in ASCII is asked for: no path, space, query or ``..`` gets to a hub."""
    with pytest.raises(PreflightError, match="is no model's name"):
        check_name(name)


PARTS = (
    "/", ".", "..", "a", "model", ".safetensors", ".json", ".bin", ".pth", ".pt", ".py", ".onnx",
    ".gguf", "consolidated", "LICENSE", "additional_chat_templates/",
)  # fmt: skip
"""Of which a name is made that may be taken for a listed one."""


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-APACHE"])
def test_a_licence_comes_along(name: str) -> None:
    """As text, whatever it is called."""
    files = [RepoFile("model.safetensors", 1), RepoFile(name, 1)]
    assert [file.path for file in needed(files, "a/b")] == ["model.safetensors", name]


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=6).map("".join))
@example("LICENSE.bin")
@example("LICENSE.py")
@example("..json")
@example("../model.safetensors")
@example("additional_chat_templates/../model.jinja")
def test_nothing_but_listed_kinds_is_needed(path: str) -> None:
    """Neither what may run code when it is loaded, nor what lies outside of the folder."""
    files = [RepoFile("model.safetensors", 1), RepoFile(path, 1)]
    for file in needed(files, "a/b"):
        assert not file.path.startswith(("/", "."))
        assert ".." not in file.path.split("/")
        assert not file.path.endswith((".bin", ".pth", ".pt", ".py", ".onnx", ".gguf"))


def test_the_lines_of_a_meter() -> None:
    """At most one line in 5 s, with rate and time left, and a last one when all is here."""
    now = 0.0
    lines: list[str] = []
    clock: Callable[[], float] = lambda: now  # noqa: E731
    meter = Meter(lines.append, clock)
    meter.begin(16_000_000_000)
    now = 10.0
    meter.advance(1_000_000_000)
    assert lines == ["1.0 GB of 16.0 GB, 100.0 MB/s, 2 min 30 s left"]
    now = 12.0
    meter.advance(1)
    assert len(lines) == 1
    now = 20.0
    meter.advance(14_999_999_999)
    assert lines[1] == "16.0 GB of 16.0 GB, 800.0 MB/s"


def test_what_was_here_before_is_no_measure_of_speed() -> None:
    """Most of it kept from an interruption: the time that is left is of what still comes."""
    now = 0.0
    lines: list[str] = []
    meter = Meter(lines.append, lambda: now)
    meter.begin(16_000_000_000)
    meter.advance(14_000_000_000, fetched=False)
    now = 10.0
    meter.advance(100_000_000)
    assert lines == ["14.1 GB of 16.0 GB, 10.0 MB/s, 3 min 10 s left"]
