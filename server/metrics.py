"""Numbers of interventions, in the registry that vLLM's `/metrics` shows. They tell nothing of tenants.

What the API server sees is counted here. What the engine ran is asked of it whenever somebody looks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sized
from itertools import accumulate

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nnsight_vllm.graph.results import STEP_SECONDS, Stats

PATIENCE = 1.0  # seconds for the engine to answer; after that its numbers are those of the time before
_logger = logging.getLogger(__name__)

_requests = Counter("nnsight_requests_with_graphs", "Requests with graphs that were sent to the engine.")
_graphs = Counter("nnsight_graphs", "Graphs of these requests.")
nodes = Counter("nnsight_graph_nodes", "Nodes of the graphs that came in or were made of a short form.")
rejected = Counter("nnsight_rejected", "Requests that were refused, by the type of the error.", ["reason"])
failed = Counter("nnsight_failed", "Graphs that failed while they ran, by the type of the error.", ["reason"])
running = Gauge("nnsight_running", "Requests with interventions that run, as their limit counts them.")


def count_request(graphs: Sized) -> None:
    """A request goes to the engine with these graphs."""
    _requests.inc()
    _graphs.inc(len(graphs))


class StatsRefresh:
    """Asks the engine what it ran, before its numbers are shown. `stats` may block."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats
        self._asked: asyncio.Future[Stats] | None = None  # one at a time, however many look

    async def __call__(self) -> None:
        if self._asked is None:
            self._asked = asyncio.ensure_future(asyncio.to_thread(self._stats))
        asked = self._asked
        await asyncio.wait([asked], timeout=PATIENCE)
        if asked.done() and asked is self._asked:
            self._asked = None
            if (error := asked.exception()) is None:
                _engine.stats = asked.result()
            else:
                _logger.warning("the engine doesn't tell what it ran: %s", error)


class _Engine(Collector):
    """What the engine said last."""

    def __init__(self) -> None:
        self.stats: Stats | None = None

    def collect(self) -> Iterator[Metric]:
        if self.stats is not None:
            yield from _metrics(self.stats)


def _metrics(stats: Stats) -> Iterator[Metric]:
    operations = CounterMetricFamily(
        "nnsight_operations", "Operations of programs by how they ran, each counted once a request.", labels=["run"]
    )
    for run in ("batched", "one_by_one", "alone"):
        operations.add_metric([run], getattr(stats, run))
    yield operations
    for name, text, value in (
        ("program_hits", "Requests whose program was compiled already.", stats.program_hits),
        ("program_misses", "Requests whose program had to be compiled.", stats.program_misses),
        ("restarted", "Requests that ran again because the engine had evicted them.", stats.restarted),
        ("saved_bytes", "Bytes of saved values and logs that left the worker.", stats.saved_bytes),
        ("exported_values", "Values that requests kept for others.", stats.exported),
        ("imported_values", "Uses of these values.", stats.imported),
    ):
        yield CounterMetricFamily(f"nnsight_{name}", text, value)
    for name, text, value in (
        ("programs", "Programs that are compiled and kept.", stats.programs),
        ("kept_values", "Values that wait for the request that uses them.", stats.num_kept),
        ("table_lines", "Edits that the kernels' tables hold.", stats.table_lines),
        ("table_bytes", "What these tables occupy.", stats.table_bytes),
    ):
        yield GaugeMetricFamily(f"nnsight_{name}", text, value)
    if stats.steps_within:
        names = [*map(str, STEP_SECONDS), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(stats.steps_within)), strict=True))
        text = "Time that the programs of a step with graphs took, in seconds."
        yield HistogramMetricFamily("nnsight_program_seconds", text, buckets=buckets, sum_value=stats.seconds)


_engine = _Engine()
REGISTRY.register(_engine)
