"""Stands for vLLM's front end, as far as our collector sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from nnsight_vllm.graph.codec import encode_delta
from nnsight_vllm.graph.results import Delta, Failure, ListValue, Saved


class Core:
    """Names requests and puts all tokens so far of each sample into its request's queue."""

    def __init__(self) -> None:
        self.input_processor = SimpleNamespace(assign_request_id=self.assign)
        self.output_processor = SimpleNamespace(process_outputs=self.process, request_states={})
        self.tokens: dict[str, list[int]] = {}

    def assign(self, request: Any) -> None:
        request.external_req_id, request.request_id = request.request_id, f"{request.request_id}-1"

    def add(self, name: str, n: int = 1) -> tuple[RequestOutputCollector, list[str]]:
        """Its queue, and its samples' ids."""
        request = SimpleNamespace(request_id=name)
        self.input_processor.assign_request_id(request)
        queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, request.request_id)
        ids = [request.request_id] if n == 1 else [f"{i}_{request.request_id}" for i in range(n)]
        for i, id in enumerate(ids):
            self.tokens[id] = []
            self.output_processor.request_states[id] = SimpleNamespace(
                request_id=id,
                external_req_id=name,
                parent_req=request if n > 1 else None,
                request_index=i,
                detokenizer=object(),
                queue=queue,
            )
        return queue, ids

    def process(self, outputs: list[Any]) -> Any:
        for output in outputs:
            state, tokens = self.output_processor.request_states[output.request_id], self.tokens[output.request_id]
            tokens += output.new_token_ids
            is_last = output.finish_reason is not None
            reason = "length" if is_last else None
            text = "x" * len(tokens)
            completion = CompletionOutput(state.request_index, text, tokens, None, None, finish_reason=reason)
            state.queue.put(RequestOutput(state.external_req_id, None, [1], None, [completion], finished=is_last))
        return SimpleNamespace(reqs_to_abort=[])


def step(id: str, number: int, reason: Any = None) -> Any:
    """One engine output: a token, and a saved list that grows."""
    saved = Saved("s0", ListValue([number]), append=number > 0)
    return _output(id, number, reason, Delta([saved], logs=[f"line {number}"]))


def eviction(id: str) -> Any:
    """The last output of a request with a graph whose memory the engine took away."""
    return _output(id, 0, None, Delta([], failure=Failure("PreemptedError", "evicted", None, True)))


def _output(id: str, token: int, reason: Any, delta: Delta) -> Any:
    message = torch.frombuffer(bytearray(encode_delta(delta)), dtype=torch.uint8)
    return SimpleNamespace(
        request_id=id, new_token_ids=[token], new_logprobs=None, finish_reason=reason, pooling_output=message
    )
