"""The code in README and docs runs as it stands, top to bottom of each page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import nnsight_vllm

if TYPE_CHECKING:
    from conftest import Engines

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/language.md", "docs/batching.md", "docs/scheduling.md", "docs/async.md", "docs/edits.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str, engines: Engines, smollm2: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shared(checkpoint: str, **keywords: Any) -> nnsight_vllm.VLLM:
        return engines(checkpoint, **keywords)

    monkeypatch.setattr(nnsight_vllm, "VLLM", shared, raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(script.read_text(), str(script), "exec"), names)
    assert not any(isinstance(value, Exception) for value in names.values())
