"""Class L, boot: what cannot start says why in one line, and ends with 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.servers import HOST, free_port, stock_command
from qwen2vl_serve import demo
from qwen2vl_serve.profile import load_profile
from tests.hostile.case import Outcome

SECONDS = 90.0

DEMO_MODEL = Path(demo.__file__).parent / "model"

Words = list[str]


@dataclass(frozen=True)
class Boot:
    """``words`` makes what is wrong and returns the options; ``told`` has to be in the line.

    ``stock`` tells whether vLLM's own server can be given the same.
    """

    name: str
    told: tuple[str, ...]
    words: Callable[[Path, ExitStack], Words]
    stock: bool = False


def profile(text: str | bytes) -> Callable[[Path, ExitStack], Words]:
    """A profile of this text."""

    def words(folder: Path, stack: ExitStack) -> Words:
        path = folder / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--profile", str(path)]

    return words


def options(*more: str) -> Callable[[Path, ExitStack], Words]:
    """The demo with these options."""
    return lambda folder, stack: ["--profile", "demo", *more]


def busy_port(folder: Path, stack: ExitStack) -> Words:
    """A port that another listens on."""
    other = stack.enter_context(socket.create_server((HOST, 0)))
    return ["--profile", "demo", "--port", str(other.getsockname()[1])]


def model(change: Callable[[Path], object]) -> Callable[[Path, ExitStack], Words]:
    """The demo's checkpoint with something broken in it."""

    def words(folder: Path, stack: ExitStack) -> Words:
        copy = folder / "model"
        shutil.copytree(DEMO_MODEL, copy)
        change(copy)
        return ["--profile", "demo", "--model", str(copy)]

    return words


def edit(**changes: Any) -> Callable[[Path], object]:
    """Change values of config.json; None takes one out."""

    def change(copy: Path) -> None:
        path = copy / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))

    return change


def other_mrope(copy: Path) -> None:
    """Rotary settings as a transformers of before ``rope_type`` wrote them, and not whole."""
    path = copy / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text.pop("rope_parameters", None)
    text["rope_scaling"] = {"type": "su", "mrope_section": [4, 6, 6]}
    path.write_text(json.dumps(config))


def cut(copy: Path) -> None:
    """Cut the weights off in the middle."""
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(copy: Path) -> None:
    """Overwrite the header of the weights."""
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
DEMO = "model: {model: demo}\n"

BOOTS = (
    Boot("port in use", ("server.port", "in use"), busy_port, stock=True),
    Boot("port that is none", ("server.port",), options("--port", "99999")),
    Boot("host of another", ("server.host",), options("--host", "192.0.2.7")),
    Boot("unknown key", ("mine.yaml:2: ", "sed"), profile(DEMO + "engine: {sed: 1}\n")),
    Boot("unknown section", ("mine.yaml:2: ", "motor"), profile(DEMO + "motor: {}\n")),
    Boot(
        "wrong type",
        ("mine.yaml:3: ", "engine.max_model_len"),
        profile(DEMO + "engine:\n  max_model_len: long\n"),
    ),
    Boot(
        "a string for a number",
        ("mine.yaml:2: ",),
        profile(DEMO + 'engine: {max_model_len: "4096"}\n'),
    ),
    Boot("a negative limit", ("limits.max_n",), profile(DEMO + "limits: {max_n: -1}\n")),
    Boot("a tab", ("mine.yaml:3: ",), profile(DEMO + "engine:\n\tseed: 1\n")),
    Boot("a key twice", ("mine.yaml:2: ", "model"), profile(DEMO + DEMO)),
    Boot("an alias bomb", ("mine.yaml",), profile(ALIASES)),
    Boot("!!python", ("mine.yaml:1: ",), profile("model: !!python/object/apply:os.system [id]\n")),
    Boot("a list", ("mine.yaml",), profile("- model\n")),
    Boot("an empty file", ("mine.yaml",), profile("")),
    Boot("bytes", ("mine.yaml",), profile(bytes(range(256)))),
    Boot("deep nesting", ("mine.yaml",), profile("model: " + "[" * 5000)),
    Boot("no such profile", ("demos",), lambda folder, stack: ["--profile", "demos"]),
    Boot(
        "no such file", ("none.yaml",), lambda folder, stack: ["--profile", f"{folder}/none.yaml"]
    ),
    Boot("unknown option", ("--nonsense",), options("--nonsense")),
    Boot("vLLM's option", ("engine.max_model_len",), options("--max-model-len", "4096")),
    Boot(
        "no such model folder",
        ("model.model", "none"),
        lambda folder, stack: ["--profile", "demo", "--model", f"{folder}/none"],
        stock=True,
    ),
    Boot(
        "no config.json",
        ("config.json",),
        model(lambda copy: (copy / "config.json").unlink()),
        stock=True,
    ),
    Boot(
        "config.json cut off",
        ("config.json",),
        model(lambda copy: (copy / "config.json").write_text('{"model_type": ')),
        stock=True,
    ),
    Boot("another family", ("llava",), model(edit(model_type="llava")), stock=True),
    Boot("weights cut off", ("safetensors",), model(cut), stock=True),
    Boot("weights overwritten", ("safetensors",), model(spoil), stock=True),
    Boot("mrope of another version", ("rope",), model(other_mrope)),
    Boot(
        "parallelism that divides no heads",
        ("engine.tensor_parallel_size",),
        options("--set", "engine.tensor_parallel_size=3"),
        stock=True,
    ),
    Boot("no GPU", ("NVIDIA",), lambda folder, stack: ["--profile", "multi-gpu"]),
    Boot(
        "a file of keys that is not there",
        ("server.api_key_file",),
        options("--set", "server.api_key_file=/none"),
    ),
    Boot(
        "a certificate that is not there",
        ("server.ssl_certfile",),
        options("--set", "server.ssl_certfile=/none"),
    ),
    Boot(
        "an uploads folder that is a file",
        ("files.folder",),
        options("--set", "files.folder=/etc/passwd"),
    ),
)


Done = subprocess.CompletedProcess


def in_a_process(words: Words, folder: Path) -> Done[str]:
    """Run a command; it does not look for models on the hub."""
    environment = {**os.environ, "XDG_STATE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        words, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
    )


def judge(
    boot: Boot, kind: str, folder: Path, run: Callable[[Words, Path], Done[str]] = in_a_process
) -> Outcome:
    """Try to start ``ours`` or ``stock``."""
    folder.mkdir()
    with ExitStack() as stack:
        words = boot.words(folder, stack)
        if "--port" not in words:
            words = [*words, "--port", str(free_port())]
        if kind == "stock":
            words = _stock(words)
        else:
            words = [sys.executable, "-m", "qwen2vl_serve.cli", "serve", *words]
        try:
            done = run(words, folder)
        except subprocess.TimeoutExpired:
            return Outcome(f"neither up nor ended after {SECONDS:.0f} s")
    if done.returncode == 0:
        return Outcome("exit status 0")
    return Outcome(unlike=_unlike(boot, done))


def _unlike(boot: Boot, done: Done[str]) -> str | None:
    if done.returncode != 2:
        return f"exit status {done.returncode}: {done.stderr[-200:]}"
    if done.stdout or re.fullmatch(r"serve: [^\n]+\n", done.stderr) is None:
        return f"not one line: {done.stdout[-200:]}{done.stderr[-300:]}"
    missing = [word for word in boot.told if word not in done.stderr]
    return f"{missing} is not in {done.stderr!r}" if missing else None


def _stock(words: Words) -> Words:
    """Return the command of vLLM's server with the same model, port and parallelism."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    fields = [f"host={HOST}", f"port={given['--port']}"]
    fields += [f"model.model={given['--model']}"] if "--model" in given else []
    fields += [given["--set"]] if "--set" in given else []
    return stock_command(load_profile("demo", fields))
