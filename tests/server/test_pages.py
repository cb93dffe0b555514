"""What the documentation says of a server runs as it stands, against one with the demo model."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import ENVIRONMENT, LiveServer

ROOT = Path(__file__).parent.parent.parent
ADDRESS = "http://localhost:8000"
KEY = "..."  # as the pages have it


@pytest.fixture(scope="module")
def served(smollm2: str) -> Iterator[LiveServer]:
    named = ("--served-model-name", "MODEL", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32")
    with LiveServer([smollm2, *named], environment=ENVIRONMENT) as server:
        yield server


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert found
    return found


def test_the_code_of_the_servers_page_runs(served: LiveServer, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks("docs/server.md", "python")).replace(ADDRESS, served.url))
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(script.read_text(), str(script), "exec"), names)
    assert not any(isinstance(value, Exception) for value in names.values())


def test_the_curl_lines_of_the_readme_run(served: LiveServer) -> None:
    (lines,) = [block for block in blocks("README.md", "bash") if block.startswith("curl")]
    command = lines.replace("localhost:8000", served.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    (choice,) = json.loads(done.stdout)["choices"]
    assert choice["intervention"]["saved"]["h"]["shape"] == [8, 576]
