"""The map of the house in nnsight_vllm/README.md, drawn from the tree: every module with the first sentence of its docstring.

python tests/house.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "nnsight_vllm" / "README.md"
BEGIN, END = "<!-- map: drawn by tests/house.py -->", "<!-- map: end -->"
ROOMS = {
    "graph": "what a user recorded, as data; loads neither torch nor vLLM",
    "trace": "the language: proxies, places, blocks",
    "trace/blocks": "source to blocks: a `with` block whose control flow is over values of the run",
    "plan": "graph -> program",
    "wire": "what crosses a process, typed, both directions in one file",
    "client": "what every front end shares",
    "remote": "the front end whose engine is a server",
    "frontend": "the front end beside vLLM's engine",
    "scheduler": "in vLLM's scheduler",
    "worker": "in vLLM's worker",
    "worker/seam": "vLLM's model runners: all their private names",
    "worker/batch": "the requests of a step: where their programs stand, and what runs for many at once",
    "worker/results": "what goes home",
    "worker/model": "sites and taps in vLLM's model",
    "worker/ops": "operations on values, bounded",
    "worker/lanes": "the values of many requests as one",
    "worker/layers": "what is known of vLLM's modules",
    "kernels": "edits of rows by table",
    "server": "vLLM's server with interventions",
}


def drawn() -> str:
    """The map, in Markdown: a heading a room, a line a module."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| file | |\n|---|---|"
    yield from map(_line, sorted((ROOT / "nnsight_vllm").glob("*.py")))
    for room, purpose in ROOMS.items():
        yield f"\n**{room}/** {purpose}\n\n| file | |\n|---|---|"
        folder = ROOT / room if room in {"kernels", "server"} else ROOT / "nnsight_vllm" / room
        yield from map(_line, sorted(path for path in folder.glob("*.py") if path.name != "__init__.py"))


def _line(path: Path) -> str:
    return f"| `{path.name}` | {_first_sentence(path)} |"


def _first_sentence(path: Path) -> str:
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    first, dot, _ = text.partition(". ")
    return f"{first}." if dot else text


def with_map(page: str) -> str:
    """The page with the map of now between its markers."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{drawn()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text()))
