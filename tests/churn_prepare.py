"""From a request's literal to what is sent: its graph recorded, checked and admitted as the front end does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from churn_kinds import KINDS
from churn_scenario import TABLE, Ask, Graph
from churn_table import table

from nnsight_vllm import VLLM
from nnsight_vllm.graph.wire import digest, encode
from nnsight_vllm.plan.caching import Salt
from nnsight_vllm.trace.backend import Request


@dataclass(frozen=True)
class Prepared:
    """A request ready to be sent. `margins`: the saved values whose sign decides something."""

    request: Request
    tensors: Mapping[str, bytes]
    changes_rows: bool = False
    margins: tuple[str, ...] = ()


def prepare(model: VLLM, ask: Ask) -> Prepared:
    front = model._engine
    prompt, sampling = front.prompt((ask.prompt.ids,)), front.sampling(ask.sampling)
    if ask.graph is None:
        return Prepared(Request(prompt, sampling, None), {})
    data, tensors, margins = _recorded(model, ask, ask.graph)
    request = Request(prompt, sampling, data, frozenset(tensors))
    front.admit(request, tensors)
    return Prepared(
        request, tensors, front._known(data, tensors, len(ask.prompt)).caching.salt is not Salt.NONE, margins
    )


def _recorded(model: VLLM, ask: Ask, graph: Graph) -> tuple[bytes, dict[str, bytes], tuple[str, ...]]:
    """The graph's bytes, its tensors by digest, and the names of its margins."""
    if graph.kind == TABLE:
        data, files = table(graph)
        return data, {digest(file): file for file in files}, ()
    with model.scan(ask.prompt.ids, **ask.sampling) as tracer:
        margins = KINDS[graph.kind].body(model, tracer, graph)
    (invoke,) = tracer.invokes
    assert invoke.graph is not None
    return encode(invoke.graph), dict(tracer.constants.data), () if margins is None else (margins._slot,)
