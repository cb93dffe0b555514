"""`nv.record(model, fn)`: what a function does to a model, as a graph for the HTTP API. Nothing runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import msgspec

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import to_json
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.graph.walk import constants_of
from nnsight_vllm.trace.backend import Outcome, Prompt, Request
from nnsight_vllm.trace.envoy import Envoy
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recording import pop, push
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tracer import GraphView, Tracer
from nnsight_vllm.trace.tree import Tree


@dataclass(frozen=True)
class Recorded:
    """`graph` prints one line a node; `tensors`: those it names, as safetensors bytes by digest."""

    graph: GraphView
    tensors: dict[str, bytes]

    def to_json(self) -> str:
        """The graph as JSON: what stands in `"graph"` of an intervention."""
        return self.graph.to_json()

    def __str__(self) -> str:
        return str(self.graph)


def record(
    model: Envoy | Tree, fn: Callable[..., object], rows: int | None = None, max_tokens: int | None = None
) -> Recorded:
    """Record `fn(model)`, or `fn(model, tracer)` where it takes two arguments, as one request's block.

    `rows`: the prompt's number of tokens where the graph is for prompts of one length; otherwise `h.shape[0]` is a value of
    the run. `max_tokens` likewise. Where `fn` returns a dict of saved values, its keys are the names under which
    they come home; else those are `s0`, `s1`, ... Raises what a trace's block raises, with the line.
    """
    tree = model if isinstance(model, Tree) else model._tree
    root = Envoy(tree, "") if isinstance(model, Tree) else model
    tracer = Tracer(_Nowhere(tree, rows, max_tokens), ("",), {}, runs=False)
    assert tracer._only is not None
    recorder = tracer._only.recorder
    push(recorder)
    try:
        returned = fn(root, tracer) if _takes_two(fn) else fn(root)
        graph = _renamed(recorder.graph(), _names(returned, recorder))
    finally:
        pop()
        recorder.state = "closed"
    if recorder.cached:
        raise RefusedError(f"tracer.cache() collects with a graph of its own: save what is wanted; {user_line()}")
    check(graph, tree.catalogue)
    data = tracer.constants.data
    return Recorded(GraphView(graph), {digest: data[digest] for digest in sorted(constants_of(graph.body))})


@dataclass
class _Nowhere:
    """A backend for recording only."""

    tree: Tree
    rows: int | None
    max_tokens: int | None

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        return Prompt(cast("int", self.rows), None, None)  # a recorder knows prompts of unknown length

    def sampling(self, arguments: dict[str, object]) -> Any:
        return SimpleNamespace(max_tokens=self.max_tokens, n=1)

    def admit(self, request: Request, tensors: Mapping[str, bytes]) -> None:
        pass

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        raise AssertionError("what is recorded for the HTTP API isn't run")


def _takes_two(fn: Callable[..., object]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fn).parameters.values()
    needed = [one for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]
    return len(needed) >= 2


def _names(returned: object, recorder: object) -> dict[str, str]:
    """The names of saves, by those that the recorder gave them."""
    if not isinstance(returned, Mapping):
        return {}
    found: dict[str, str] = {}
    for name, value in returned.items():
        if not isinstance(value, Proxy) or value._recorder is not recorder or value._slot is None:
            _refuse(name, "isn't a value that was saved")
        if value._slot in found:
            _refuse(name, f"is the value that {found[value._slot]!r} names already")
        found[value._slot] = str(name)
    return found


def _refuse(name: object, why: str) -> NoReturn:
    raise RefusedError(f"the function returns a dict of saved values; {name!r} {why}; {user_line()}")


def _renamed(graph: Graph, names: dict[str, str]) -> Graph:
    """The graph with other names for its saves."""
    if not names:
        return graph
    plain = json.loads(to_json(graph))
    _rename(plain, names)
    return msgspec.convert(plain, Graph)


def _rename(plain: object, names: dict[str, str]) -> None:
    if isinstance(plain, list):
        for item in plain:
            _rename(item, names)
    elif isinstance(plain, dict):
        if plain.get("type") == "save":
            plain["name"] = names.get(plain["name"], plain["name"])
        for item in plain.values():
            _rename(item, names)
