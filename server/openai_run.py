"""One HTTP request's intervention on its way through vLLM's handlers: into the engine with each of its prompts, and back.

vLLM's handlers know nothing of it. It is in the request's context, where `generate` finds it; what comes home waits here
for the answer, by choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from typing import Any

from nnsight_vllm.frontend.served_engine import Heard
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.results import Failure
from nnsight_vllm.server import metrics
from nnsight_vllm.server.answers import ChoiceResults, ResultFormat
from nnsight_vllm.server.edited import EditedModel
from nnsight_vllm.server.errors import Failed, Refused, refusing, require_at_most
from nnsight_vllm.server.full import Lowered
from nnsight_vllm.server.schema import Intervention
from nnsight_vllm.server.short import lower
from nnsight_vllm.server.state import ServerState
from nnsight_vllm.server.tensor_refs import TensorOf
from nnsight_vllm.trace.backend import Prompt, Request
from nnsight_vllm.wire.extras import KEY

RESULTS = "/v1/interventions/results"

current: ContextVar[OpenAIRun | None] = ContextVar("openai_run", default=None)


class OpenAIRun:
    """The intervention of a request, the edited model that it names, or both. `tenant`: whose it is."""

    def __init__(
        self, state: ServerState, tenant: str, intervention: Intervention | None, edited: EditedModel | None
    ) -> None:
        self.results: dict[int, ChoiceResults] = {}  # by the number of the choice
        self._state = state
        self._tenant = tenant
        self._intervention = intervention
        self._edited = edited
        self.refusal: Refused | None = None
        self._num_choices = 0
        self._num_due = 0  # prompts that weren't judged yet
        self._ids: list[str] = []
        self._failure = ""
        self._full_form: Lowered | None = None  # a graph that doesn't depend on the prompt

    async def read(self) -> None:
        """Read a whole graph once, on a thread: a large one takes a while. Raises `Refused`."""
        if self._intervention is not None and self._intervention.graph is not None:
            self._full_form = await asyncio.to_thread(self._own, self._intervention, 0, None)

    def entry(self, route: str) -> dict[str, object] | None:
        """What the journal tells of it when it's over. `left`: its client went before the end. None for what was refused."""
        if not self._ids:
            return None
        over = sum(results.is_over for results in self.results.values())
        outcome = self._failure or ("answered" if over == self._num_choices else "left")
        return {
            "id": ",".join(self._ids),
            "route": route,
            "tenant": self._tenant,
            "edited": self._edited.name if self._edited else "",
            "choices": self._num_choices,
            "outcome": outcome,
        }

    def require_run(self) -> None:
        """Raise `Refused` where an answer was made without the engine: it would pass for one of the edited model."""
        if not self._num_choices:
            raise Refused(
                "this request was answered without running the model, and so without its intervention", "intervention"
            )

    @property
    def is_admitted(self) -> bool:
        """Whether all prompts that came so far were judged: taken, or one of them refused."""
        return self.refusal is not None or (self._num_choices > 0 and self._num_due == 0)

    def generate(
        self, generate: Callable[..., AsyncGenerator[Any, None]], prompt: Any, params: Any, id: str
    ) -> AsyncGenerator[Any, None]:
        """vLLM's `generate` with the graphs. A refusal is raised by its first step, and is in `refusal`."""
        first, self._num_choices = self._num_choices, self._num_choices + params.n
        self._num_due += 1
        return self._generated(generate, prompt, params, id, first)

    async def _generated(
        self, generate: Callable[..., AsyncGenerator[Any, None]], prompt: Any, params: Any, id: str, first: int
    ) -> AsyncGenerator[Any, None]:
        try:
            request, tensors, lowered = await asyncio.to_thread(self._admitted, prompt, params)
        except Refused as error:
            self.refusal = error
            raise
        self._num_due -= 1
        metrics.count_request(request.graphs)
        self._ids.append(id)
        format = self._format(lowered)
        async with aclosing(self._state.engine.carried(generate, id, request, tensors)) as heard_ones:
            async for heard in heard_ones:
                self._collect(heard, format, first)
                yield heard.output

    def _format(self, lowered: Lowered | None) -> ResultFormat:
        saves = lowered.names if lowered is not None else {}
        return ResultFormat(saves, self._state.limits.inline_result_bytes, self._keep)

    def _collect(self, heard: Heard, format: ResultFormat, first: int) -> None:
        """Keep what a step brought for the answer. Raises `Failed`."""
        if heard.failure is not None:
            metrics.failed.labels(heard.failure.kind).inc()
            self._failure = heard.failure.kind
            raise failed(heard.failure)
        for sample, fresh in heard.fresh.items():
            self.results.setdefault(first + sample, ChoiceResults(format)).add(fresh)
        for completion in heard.output.outputs:
            results = self.results.setdefault(first + completion.index, ChoiceResults(format))
            results.is_over = completion.finish_reason is not None
            results.is_stopped = completion.index in heard.stopped

    def _admitted(self, prompt: Any, params: Any) -> tuple[Request, dict[str, bytes], Lowered | None]:
        """On a thread, since a large graph takes seconds. Raises `Refused`."""
        request, tensors, lowered = self._lowered(prompt, params)
        with refusing("intervention"):
            self._state.engine.admit(request, tensors)
        return request, tensors, lowered

    def _lowered(self, prompt: Any, params: Any) -> tuple[Request, dict[str, bytes], Lowered | None]:
        if not isinstance(prompt, Mapping) or prompt.get("type") != "token":
            raise Refused("a request with an intervention has text and token ids only", "intervention")
        rows = len(prompt["prompt_token_ids"])
        tensors: dict[str, bytes] = {}
        edits: tuple[bytes, ...] = ()
        if self._edited is not None:
            standing = self._standing(self._edited, rows, params.max_tokens)
            edits, tensors = (encode(standing.graph),), {**self._edited.tensors, **standing.tensors}
        own = None
        if self._intervention is not None:
            own = self._full_form or self._own(self._intervention, rows, params.max_tokens)
            tensors = {**tensors, **own.tensors}
        size = sum(map(len, tensors.values()))
        require_at_most(self._state.limits.constant_bytes, size, "bytes of constants", "intervention")
        request = Request(
            Prompt(rows, prompt.get("prompt"), prompt),
            params,
            None if own is None else encode(own.graph),
            frozenset(tensors),
            edits,
            tenant=self._state.engine.tenant(self._tenant),
        )
        return request, tensors, own

    def _own(self, intervention: Intervention, rows: int, max_tokens: int | None) -> Lowered:
        return self._lower(intervention, rows, max_tokens, partial(self._state.tensors.get, self._tenant))

    def _standing(self, edited: EditedModel, rows: int, max_tokens: int | None) -> Lowered:
        try:
            return self._lower(edited.intervention, rows, max_tokens, edited.tensor_of)
        except Refused as error:
            message = f"the edit {edited.name!r} can't go with this request: {error.param}: {error.message}"
            raise Refused(message, "model", status=error.status, kind=error.kind) from None

    def _lower(self, intervention: Intervention, rows: int, max_tokens: int | None, tensor_of: TensorOf) -> Lowered:
        tree, most = self._state.engine.tree, self._state.limits.graph_nodes
        return lower(intervention, tree, rows, max_tokens, tensor_of, most)

    def _keep(self, data: bytes) -> str:
        return f"{RESULTS}/{self._state.results.add(self._tenant, data)}"


def generate_with_graphs(generate: Callable[..., Any], prompt: Any, params: Any, id: str, **rest: Any) -> Any:
    """In the place of the engine client's `generate`. Without an intervention it's vLLM's own call."""
    if getattr(params, "extra_args", None) and any(str(name).startswith(KEY) for name in params.extra_args):
        raise Refused(f"fields that begin with {KEY!r} are the server's own", "vllm_xargs")
    run = current.get()
    if run is None:
        return generate(prompt, params, id, **rest)
    return run.generate(partial(generate, **rest), prompt, params, id)


def failed(failure: Failure) -> Failed:
    """A graph that failed while it ran, for a stranger."""
    if failure.retryable:
        return Failed(
            f"{failure.message}; send the request again",
            "intervention",
            status=HTTPStatus.TOO_MANY_REQUESTS,
            kind=failure.kind,
            headers={"Retry-After": "1"},
        )
    return Failed(f"the graph failed: {failure.message}", "intervention", kind=failure.kind)
