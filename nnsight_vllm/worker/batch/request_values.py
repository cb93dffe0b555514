"""The values of a request that runs by itself, as the control loop looks at them: plain ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.nodes import Arg
from nnsight_vllm.plan.instructions import At
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.control import ValueStrategy
from nnsight_vllm.worker.batch.cursor import IterationsFrame
from nnsight_vllm.worker.batch.request_nodes import RequestNodes
from nnsight_vllm.worker.batch.requests import EngineRequest
from nnsight_vllm.worker.ops.operations import evaluate
from nnsight_vllm.worker.ops.usage import Clock, Holdings, bytes_of, over_time

UNBOUNDED = 2**31


class RequestValues(ValueStrategy[EngineRequest]):
    """`holdings`: the memory of all requests' values."""

    def __init__(self, nodes: RequestNodes, clock: Clock, holdings: Holdings, limits: Limits) -> None:
        self.nodes = nodes.methods
        self._clock = clock
        self._holdings = holdings
        self._limits = limits

    def lag(self, request: EngineRequest, at: At) -> int:
        iteration: int = request.innermost.current if at.iteration is None else at.iteration
        return iteration - request.iteration

    def truth(self, request: EngineRequest, test: Arg) -> bool:
        return bool(evaluate(test, request.env))

    def items(self, request: EngineRequest, over: Arg) -> list[Any]:
        return items_of(evaluate(over, request.env), self._limits)

    def bound(self, request: EngineRequest, bound: Arg) -> int:
        number: int = UNBOUNDED if bound is None else evaluate(bound, request.env)
        return number

    def goes_on(self, request: EngineRequest, frame: IterationsFrame) -> bool:
        goes_on: bool = frame.upcoming < frame.stop
        return goes_on

    def index(self, numbers: int) -> int:
        return numbers

    def value(self, request: EngineRequest, arg: Arg) -> Any:
        return evaluate(arg, request.env)

    def made(self, request: EngineRequest, value: Any) -> None:
        if self._holdings.made(bytes_of(value)) and (excess := self._holdings.excess(request.spent.held)):
            raise InterventionError(excess)

    def check_time(self, request: EngineRequest) -> float:
        self._clock.lap(request.spent, 1)
        raise over_time(request.spent.seconds, self._limits)


def items_of(over: Any, limits: Limits) -> list[Any]:
    """What a loop goes over. Raises where that's more than the trips it may make."""
    num = over.shape[0] if isinstance(over, Tensor) and over.ndim else len(over)
    if num > limits.trips:
        raise InterventionError(f"a loop over {num} items; the limit `trips` is {limits.trips}")
    return list(over)
