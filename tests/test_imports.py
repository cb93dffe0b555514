"""The house by its imports: which room may import which, read from the source, lazy and type-only imports included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nnsight_vllm"

# room -> what it may import besides itself, `graph` and `errors`. A room is a folder of the package, or a file beside them.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "plugins": set(),
    "demo": set(),
    "graph": set(),
    "kernels": set(),
    "plan": {"kernels"},
    "trace": set(),
    "wire": set(),
    "edits": {"kernels", "trace"},
    "client": {"trace", "wire"},
    "remote": {"trace", "wire", "client"},
    "frontend": {"trace", "wire", "client", "plan"},
    "scheduler": {"wire"},
    "worker": {"plan", "wire", "kernels"},
    "server": {"trace", "wire", "client", "plan", "frontend", "edits", "plugins", "kernels"},
    "model": {"trace", "wire", "client", "plan", "frontend", "remote"},
    PACKAGE: {"demo", "model", "trace"},
}

# The same inside the worker; `worker.worker` puts all of them together.
WORKER_MAY_IMPORT: dict[str, set[str]] = {
    "lanes": set(),
    "layers": set(),
    "ops": {"lanes", "layers"},
    "model": {"ops", "lanes", "layers"},
    "results": {"ops", "lanes", "layers"},
    "batch": {"results", "model", "ops", "lanes", "layers"},
    "seam": {"batch", "results", "model", "ops", "lanes", "layers"},
    "worker": {"seam", "batch", "results", "model", "ops", "lanes", "layers"},
}

# What imports vLLM, anywhere in the module. Of the worker that's what knows its model runners (`seam`) and its modules (`layers`).
IMPORT_VLLM = {
    "frontend.async_engine",
    "frontend.collector",
    "frontend.engine",
    "frontend.settings",
    "scheduler.scheduler",
    "server.cli",
    "server.errors",
    "server.journal",
    "server.openai",
    "server.tenants",
    "worker.layers.forwards",
    "worker.layers.head",
    "worker.layers.layer_kinds",
    "worker.seam.runner_v1",
    "worker.seam.runner_v2",
    "worker.seam.startup",
}

# Only shorter from here on.
KNOWN_VIOLATIONS: set[str] = set()
KNOWN_CIRCLES: set[str] = set()


@cache
def imports() -> dict[str, set[str]]:
    """Every module of the package -> the modules of the package that it imports anywhere."""
    files = dict(_modules())
    return {name: {found for found in _imported(path, files) if found != name} for name, path in files.items()}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in {"kernels", "server"}:
            yield ".".join(parts).removesuffix(".__init__"), path
    for linked in ("kernels", "server"):
        for path in sorted((ROOT / linked).glob("*.py")):
            yield f"{PACKAGE}.{linked}.{path.stem}", path


def imports_vllm(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module is not None]
    return any(name.split(".")[0] == "vllm" for name in names)


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module in files:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (inner & files.keys()) or {node.module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def violations() -> set[str]:
    found = set()
    for importer, names in imports().items():
        for name in names:
            own, other = room(importer), room(name)
            if other not in {own, "graph", "errors"} | MAY_IMPORT[own]:
                found.add(f"{importer} -> {name}")
            if own == other == "worker" and not _is_allowed_inside_the_worker(importer, name):
                found.add(f"{importer} -> {name}")
    return {line.replace(f"{PACKAGE}.", "") for line in found}


def _is_allowed_inside_the_worker(importer: str, imported: str) -> bool:
    own, other = importer.split(".")[2], imported.split(".")[2]
    return other == own or other in WORKER_MAY_IMPORT[own]


def circles() -> set[str]:
    """Each set of modules that import one another, in one line."""
    graph = imports()
    reach = {name: _reached(name, graph) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return {" ".join(sorted(group)).replace(f"{PACKAGE}.", "") for group in groups if len(group) > 1}


def _reached(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen, stack = set[str](), [start]
    while stack:
        for name in graph[stack.pop()] - seen:
            seen.add(name)
            stack.append(name)
    return seen


def test_rooms_import_only_what_they_may() -> None:
    assert violations() == KNOWN_VIOLATIONS


def test_no_modules_import_one_another() -> None:
    assert circles() == KNOWN_CIRCLES


def test_only_these_modules_import_vllm() -> None:
    found = {name.removeprefix(f"{PACKAGE}.") for name, path in _modules() if imports_vllm(path)}
    assert found == IMPORT_VLLM


def test_every_room_has_a_rule() -> None:
    assert {room(name) for name in imports()} == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "server").glob("*.py")))
def test_a_module_of_the_server_loads_nothing_of_the_worker(module: str, tmp_path: Path) -> None:
    code = (
        f"import {PACKAGE}.server.{module}, sys; "
        f"print(sorted(m for m in sys.modules if m.startswith('{PACKAGE}.worker')))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("[]")


def test_the_map_of_the_house_is_of_now() -> None:
    page = house.PAGE.read_text()
    assert house.with_map(page) == page, "draw it anew: python tests/house.py"


def test_every_room_is_on_the_map() -> None:
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py")} - {ROOT / PACKAGE}
    assert {folder.relative_to(ROOT / PACKAGE).as_posix() for folder in folders} | {
        "kernels",
        "server",
    } == house.ROOMS.keys()


def test_every_file_that_contributing_names_is_there() -> None:
    named = re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|md))`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []
