"""From a request's literal to what is sent: its graph recorded, checked and admitted as the front end does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from churn_kinds import KINDS
from churn_scenario import TABLE, Ask, Graph
from churn_table import table

from nnsight_vllm import VLLM
from nnsight_vllm.graph.codec import decode, digest
from nnsight_vllm.graph.walk import sites_written
from nnsight_vllm.trace.backend import Request

DRAWN = {"logits.output", "samples.output"}


@dataclass(frozen=True)
class Prepared:
    """A request ready to be sent. `margins`: the saved values whose sign decides something."""

    request: Request
    tensors: Mapping[str, bytes]
    changes_rows: bool = False
    margins: tuple[str, ...] = ()


def prepare(model: VLLM, ask: Ask) -> Prepared:
    """Raises `AdmissionError` where the front end refuses it."""
    front = model._engine
    if ask.graph is None:
        return Prepared(Request(front.prompt((ask.prompt.ids,)), front.sampling(ask.sampling), None), {})
    if ask.graph.kind != TABLE:
        return _recorded(model, ask, ask.graph)
    data, files = table(ask.graph)
    tensors = {digest(file): file for file in files}
    request = Request(front.prompt((ask.prompt.ids,)), front.sampling(ask.sampling), data, frozenset(tensors))
    front.admit(request, tensors)
    return Prepared(request, tensors, _changes_rows(data))


def _recorded(model: VLLM, ask: Ask, graph: Graph) -> Prepared:
    with model.scan(ask.prompt.ids, **ask.sampling) as tracer:
        margins = KINDS[graph.kind].body(model, tracer, graph)
    (invoke,) = tracer.invokes
    request = invoke.request()
    changes_rows = any(map(_changes_rows, request.graphs))
    return Prepared(request, invoke.tensors, changes_rows, () if margins is None else (margins._slot,))


def _changes_rows(graph: bytes) -> bool:
    return any(site not in DRAWN for site in sites_written(decode(graph).body))
