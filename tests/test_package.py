"""The package as a package: importing it does nothing, and its two linked folders travel with it."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnsight_vllm

ROOT = Path(__file__).resolve().parents[1]


def _run(code: str, folder: Path) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import nnsight_vllm, sys; print([m for m in ('torch', 'vllm', 'transformers', 'rich') if m in sys.modules])"
    assert _run(code, tmp_path) == "[]"


def test_importing_the_demo_and_the_errors_loads_no_torch(tmp_path: Path) -> None:
    code = "from nnsight_vllm import demo_model, NNsightError; import sys; print('torch' in sys.modules)"
    assert _run(code, tmp_path) == "False"


def test_recording_needs_no_vllm(tmp_path: Path) -> None:
    code = "import nnsight_vllm as nv; nv.list, nv.VLLM; import sys; print('vllm' in sys.modules)"
    assert _run(code, tmp_path) == "False"


def test_the_graph_package_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, sys, nnsight_vllm.graph as g\n"
        "for m in pkgutil.iter_modules(g.__path__): importlib.import_module(f'{g.__name__}.{m.name}')\n"
        "print([m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    assert _run(code, tmp_path) == "[]"


def test_every_public_name_is_found() -> None:
    missing = [name for name in dir(nnsight_vllm) if not hasattr(nnsight_vllm, name)]
    assert missing == []


def test_every_error_of_the_hierarchy_is_public() -> None:
    from nnsight_vllm import errors

    ours = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.NNsightError)}
    assert ours <= set(nnsight_vllm.__all__)


def test_star_import_leaves_the_builtins_alone() -> None:
    assert not set(nnsight_vllm.__all__) & set(dir(builtins))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"nnsight_vllm.*nonsense"):
        nnsight_vllm.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_missing_attribute_while_the_engine_starts_is_no_missing_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nnsight_vllm.model._open", lambda model, *settings: model.nonsense)
    model = nnsight_vllm.VLLM(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"the engine didn't start: .*nonsense"):
        model.llm  # noqa: B018


@pytest.mark.parametrize("name", ["kernels", "server"])
def test_a_linked_folder_is_a_relative_link_and_imports_from_anywhere(name: str, tmp_path: Path) -> None:
    link = ROOT / "nnsight_vllm" / name
    assert os.readlink(link) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()
    code = f"import nnsight_vllm.{name} as m; print(list(m.__path__)[0])"
    assert Path(_run(code, tmp_path)).resolve() == ROOT / name


def test_no_folder_of_tests_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_other_index_host_is_named() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "requirements").iterdir()]
    lines = [line for file in files for line in file.read_text().splitlines() if "://" in line]
    assert [line for line in lines if "https://download.pytorch.org/whl/cpu" not in line] == []
