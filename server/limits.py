"""What strangers may ask for at most: a flag of the server each, told by `GET /v1/interventions/limits`."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.server import metrics
from nnsight_vllm.server.errors import Refused


def _limit(default: int, help: str) -> Any:
    return field(default=default, metadata={"help": help})


_OF_ENGINE = {
    "request": "saved_bytes",
    "engine": "saved_bytes_in_all",
    "saved_per_step": "saved_step_bytes",
    "seconds": "program_seconds",
    "trips": "loop_trips",
    "value_bytes": "value_bytes",
    "held_bytes": "held_bytes",
    "held_bytes_in_all": "held_bytes_in_all",
    "log_lines": "log_lines",
}
"""Names of `wire.limits.Limits`, and ours of the same."""


@dataclass(frozen=True)
class ServerLimits:
    """Counts, bytes and seconds. Each is a positive integer; the flag of `graph_nodes` is `--max-graph-nodes`."""

    graph_nodes: int = _limit(100_000, "nodes of one graph")
    trace_nodes: int = _limit(400_000, "nodes of all graphs of a trace that differ")
    trace_requests: int = _limit(1024, "requests, prompts or samples of a trace")
    constant_bytes: int = _limit(256 << 20, "bytes of tensors that one request uses")
    body_bytes: int = _limit(512 << 20, "bytes of one request's body")
    stored_bytes: int = _limit(1 << 30, "bytes of uploaded tensors that are kept for one tenant")
    stored_bytes_in_all: int = _limit(8 << 30, "bytes of tensors that the engine keeps, for all tenants")
    inline_result_bytes: int = _limit(
        64 << 10, "bytes of a saved tensor told in the answer itself; above it, a link is"
    )
    results_kept: int = _limit(256, "saved tensors behind links that are kept for one tenant")
    result_bytes: int = _limit(1 << 30, "bytes of all of them")
    result_seconds: int = _limit(600, "seconds for which they are kept")
    concurrent_requests: int = _limit(64, "requests with interventions of one tenant at a time")
    saved_bytes: int = _limit(1 << 30, "bytes that one request may save")
    saved_bytes_in_all: int = _limit(8 << 30, "bytes that all requests that run may have saved")
    edited_models: int = _limit(64, "edited models of one tenant")
    saved_step_bytes: int = _limit(1 << 30, "bytes that one request may save in one step, which is a token")
    program_seconds: int = _limit(10, "seconds that one request's program may run in one step")
    loop_trips: int = _limit(65_536, "trips of one request's loops in one step")
    value_bytes: int = _limit(2 << 30, "bytes that one operation may make")
    held_bytes: int = _limit(4 << 30, "bytes of values that one request may keep")
    held_bytes_in_all: int = _limit(16 << 30, "bytes of values that all requests that run may keep")
    log_lines: int = _limit(10_000, "lines of logs of one request")

    @classmethod
    def from_args(cls, args: Namespace) -> ServerLimits:
        """Of parsed arguments. Raises `EngineSettingError` that names the flag."""
        limits = cls(**{one.name: getattr(args, _dest(one.name)) for one in dataclasses.fields(cls)})
        for name, value in dataclasses.asdict(limits).items():
            if value < 1:
                raise EngineSettingError(f"{_flag(name)} {value}: expected at least 1")
        for small, large in (
            ("saved_bytes", "saved_bytes_in_all"),
            ("graph_nodes", "trace_nodes"),
            ("constant_bytes", "stored_bytes_in_all"),
            ("held_bytes", "held_bytes_in_all"),
        ):
            one, all = getattr(limits, small), getattr(limits, large)
            if one > all:
                raise EngineSettingError(f"{_flag(small)} {one}: expected at most {_flag(large)}, which is {all}")
        return limits

    def of_engine(self) -> dict[str, object]:
        """What the worker keeps to."""
        return {"limits": {name: getattr(self, ours) for name, ours in _OF_ENGINE.items()}}


def add_arguments(group: Any) -> None:
    """A flag for each limit, to an argparse group."""
    for one in dataclasses.fields(ServerLimits):
        group.add_argument(
            _flag(one.name),
            dest=_dest(one.name),
            type=int,
            default=one.default,
            help=f"most {one.metadata['help']} (default: {one.default})",
        )


def _dest(name: str) -> str:
    return f"max_{name}"


def _flag(name: str) -> str:
    return f"--max-{name.replace('_', '-')}"


class Concurrent:
    """Counts what runs, by tenant, and refuses more than `limit` for one. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> dict[str, int]:
        """By tenant; without those that run nothing."""
        return dict(self._running)

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        """One more while the block runs. Raises `Refused` with status 429."""
        if self._running[tenant] >= self._limit:
            raise Refused(
                f"{self._running[tenant]} requests with interventions run already; the limit is {self._limit}",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                kind="RateLimitError",
                headers={"Retry-After": "1"},
            )
        self._running[tenant] += 1
        metrics.running.inc()
        try:
            yield
        finally:
            self._running[tenant] -= 1
            self._running += Counter()  # drops the zeros
            metrics.running.dec()
