"""The house rules of imports: downward only, vLLM in the seam, torch nowhere at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "qwen2vl_serve"

LAYERS: dict[str, int] = {
    # L0: what everything may use
    "": 0,
    "errors": 0,
    "line": 0,
    "machine": 0,
    "torchvision_ops": 0,
    "vision": 0,
    # L1: what is asked for
    "profile": 1,
    "protocol": 1,
    "engine": 1,
    # L2: parts with one concern each
    "admission": 2,
    "media": 2,
    "context": 2,
    "auth": 2,
    "http": 2,
    "uploads": 2,
    "batches": 2,
    "engines": 2,
    "checkpoints": 2,
    "download": 2,
    "adapters": 2,
    # L3: the seam, what is known before it is met, the application
    "vllm_engine": 3,
    "plan": 3,
    "doctor": 3,
    "boot": 3,
    "preflight": 3,
    "api": 3,
    "app": 3,
    # L4: what runs them
    "launch": 4,
    "demo": 4,
    "fleet": 4,
    # L5
    "cli": 5,
}
SEAM = "vllm_engine"
HEAVY = {"torch", "torchvision", "transformers"}
# The demo trains its own model; torch is its trade.
HEAVY_ALLOWED = (SEAM, "demo")


@dataclass(frozen=True)
class Import:
    """One import statement: ``names`` are absolute, with and without what is taken from them."""

    file: str
    line: int
    names: tuple[str, ...]
    deferred: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.names[-1]}"


def module_of(path: Path) -> str:
    """Name of a file's part below the package: ``media`` for ``media/fetch.py``."""
    inner = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return "" if inner == ("__init__",) else inner[0]


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def imports_of(source: str, file: str, package: str) -> Iterator[Import]:
    """Yield every import, also those within functions, behind conditions and by name."""

    def visit(node: ast.AST, deferred: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import) and not typing_only:
            for alias in node.names:
                yield Import(file, node.lineno, (alias.name,), deferred)
        elif isinstance(node, ast.ImportFrom) and not typing_only:
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                yield Import(file, node.lineno, (base, f"{base}.{alias.name}"), deferred)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(file, node.lineno, (str(node.args[0].value),), deferred)
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing_only or checking)

    yield from visit(ast.parse(source), deferred=False, typing_only=False)


def imports(path: Path) -> list[Import]:
    folder = ".".join(path.relative_to(ROOT).parts[:-1])
    return list(imports_of(path.read_text("utf-8"), str(path.relative_to(ROOT)), folder))


def part(name: str) -> str | None:
    """The part of our package that an import names, None for what is not ours."""
    head, _, rest = name.partition(".")
    if head != PACKAGE:
        return None
    return rest.split(".")[0]


def target(found: Import) -> str | None:
    """The module that an import reaches: ``from qwen2vl_serve import app`` reaches app."""
    parts = [part(name) for name in found.names]
    known = [name for name in parts if name is not None and name in LAYERS]
    return known[-1] if known else parts[0]


def rises(module: str, found: Import) -> bool:
    reached = target(found)
    if reached is None or reached == module:
        return False
    return LAYERS[reached] > LAYERS[module]


def needs_vllm(found: Import) -> bool:
    return found.names[0].split(".")[0] == "vllm"


def is_heavy(found: Import) -> bool:
    return found.names[0].split(".")[0] in HEAVY and not found.deferred


def test_every_module_has_a_layer():
    """A new module or package has to be put into the table, one that is gone taken out of it."""
    known = {module_of(path) for path in sources()}
    assert known == set(LAYERS), "give it a layer in this test's table"


def test_modules_import_only_downward():
    """Its own layer is allowed; imports within functions count, those for type checkers do not."""
    rising = [
        str(found) for path in sources() for found in imports(path) if rises(module_of(path), found)
    ]
    assert rising == []


def test_parts_form_no_circle():
    """Within a layer, too: of two parts that know each other neither is read by itself."""
    known = {name: set[str]() for name in LAYERS}
    for path in sources():
        reached = {target(found) for found in imports(path)} - {None, module_of(path)}
        known[module_of(path)] |= {name for name in reached if name}
    list(TopologicalSorter(known).static_order())  # raises CycleError, which names them


def test_only_the_seam_knows_vllm():
    """A new vLLM is a matter of ``vllm_engine`` alone; imports within functions count, too."""
    foreign = [
        str(found)
        for path in sources()
        if not module_of(path).startswith(SEAM)
        for found in imports(path)
        if needs_vllm(found)
    ]
    assert foreign == []


def test_torch_is_imported_within_functions_only():
    """So are torchvision and transformers, for a quick start; the seam and the demo are free."""
    heavy = [
        str(found)
        for path in sources()
        if not module_of(path).startswith(HEAVY_ALLOWED)
        for found in imports(path)
        if is_heavy(found)
    ]
    assert heavy == []


def test_client_imports_without_the_server():
    """Not even within a function does it import the server, vLLM, torch or transformers."""
    foreign = [
        str(found)
        for path in sorted((ROOT / "clients" / "qwen2vl_client").rglob("*.py"))
        for found in imports(path)
        if found.names[0].split(".")[0] in {PACKAGE, "vllm", *HEAVY}
    ]
    assert foreign == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("errors", "from qwen2vl_serve import profile", "rises"),
        ("errors", "from qwen2vl_serve.profile import Profile", "rises"),
        ("errors", "import qwen2vl_serve.profile", "rises"),
        ("errors", "from . import profile", "rises"),
        ("errors", "from .profile import Profile", "rises"),
        ("preflight", "def f():\n    from qwen2vl_serve import launch", "rises"),
        ("preflight", "import importlib\nimportlib.import_module('qwen2vl_serve.cli')", "rises"),
        ("preflight", "try:\n    import vllm\nexcept ImportError: pass", "vllm"),
        ("preflight", "def f():\n    from vllm.config import ModelConfig", "vllm"),
        ("preflight", "if True:\n    import torch.nn", "heavy"),
        ("preflight", "class A:\n    from transformers import pipeline", "heavy"),
    ],
)
def test_a_forbidden_import_is_found(module, source, fault):
    """The walk sees relative, deferred, conditional and dynamic imports."""
    found = list(imports_of(source, "x.py", PACKAGE))
    caught = {
        "rises": any(rises(module, one) for one in found),
        "vllm": any(needs_vllm(one) for one in found),
        "heavy": any(is_heavy(one) for one in found),
    }
    assert [name for name, hit in caught.items() if hit] == [fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("launch", "from qwen2vl_serve import errors, profile, app"),
        ("app", "from qwen2vl_serve import __version__"),
        ("app", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("app", "def f():\n    import torch"),
        ("media", "from qwen2vl_serve.media import fetch"),
    ],
)
def test_an_allowed_import_is_left_alone(module, source):
    """Down a layer, within a package, for type checkers, torch within a function: no fault."""
    found = list(imports_of(source, "x.py", PACKAGE))
    assert not any(rises(module, one) or needs_vllm(one) or is_heavy(one) for one in found)


def test_light_commands_load_nothing_heavy():
    """Profiles, preflight, command line and client run where torch and vLLM are not installed."""
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'transformers', 'vllm'):\n"
        "    sys.modules[name] = None\n"
        "import qwen2vl_client\n"
        "from qwen2vl_serve import app, cli, preflight\n"
        "from qwen2vl_serve.launch import serve\n"
        "sys.exit(cli.main(['profiles']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "multi-gpu" in done.stdout
