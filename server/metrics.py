"""Counters of interventions, in the registry that vLLM's `/metrics` shows. They tell nothing of tenants."""

from __future__ import annotations

from collections.abc import Sized

from prometheus_client import Counter, Gauge

_requests = Counter("nnsight_requests_with_graphs", "Requests with graphs that were sent to the engine.")
_graphs = Counter("nnsight_graphs", "Graphs of these requests.")
_rejected = Counter("nnsight_rejected", "Requests that were refused, by the type of the error.", ["reason"])
running = Gauge("nnsight_running", "Requests with interventions that run, as their limit counts them.")


def count_request(graphs: Sized) -> None:
    """A request goes to the engine with these graphs."""
    _requests.inc()
    _graphs.inc(len(graphs))


def count_rejected(kind: str) -> None:
    """A request is refused; `kind` is the error's type, of which there are few."""
    _rejected.labels(kind).inc()
