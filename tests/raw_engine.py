"""vLLM with our worker and scheduler and without our front end: hand-written graphs in, deltas out.

In this process, so that a test can look at the scheduler and at the rows of every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import v2_on_cpu

from nnsight_vllm.graph.codec import decode_deltas
from nnsight_vllm.graph.results import Delta
from nnsight_vllm.wire.extras import RequestExtras, encode_extras


@dataclass
class Answer:
    """What came of one request; `output` is vLLM's."""

    output: Any
    deltas: list[Delta] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return list(self.output.outputs[0].token_ids)

    @property
    def failures(self) -> list[str]:
        return [delta.failure.kind for delta in self.deltas if delta.failure]


class RawEngine:
    """`steps`: for each forward since the last `generate` began, rows by the request's number in it.

    `free`: how many blocks were free when it began.
    """

    def __init__(self, checkpoint: str, **keywords: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            if not v2_on_cpu.IS_CHOSEN:
                patch.setenv(v2_on_cpu.VARIABLE, "0")
            self.llm = _start(checkpoint, keywords)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.worker = self.core.model_executor.driver_worker.worker
        self.steps: list[dict[int, int]] = []
        self.free: list[int] = []
        self._deltas: dict[str, list[Delta]] = {}
        self._numbers: dict[str, int] = {}
        self._watch()

    def generate(self, *requests: tuple[list[int], bytes | None, dict[str, Any]]) -> list[Answer]:
        """Run (prompt's ids, graph, sampling parameters) together. Among these `cut`: whether the prompt may be cut."""
        from vllm import SamplingParams

        self.steps.clear()
        self.free.clear()
        self._deltas.clear()
        self._numbers.clear()
        prompts = [{"prompt_token_ids": ids, "cache_salt": str(number)} for number, (ids, _, _) in enumerate(requests)]
        params = []
        for _, graph, arguments in requests:
            extra = (
                None
                if graph is None
                else encode_extras(RequestExtras([graph], is_chunkable=arguments.get("cut", False)))
            )
            defaults = {"temperature": 0.0, "ignore_eos": True, "skip_reading_prefix_cache": True}
            rest = {name: value for name, value in arguments.items() if name != "cut"}
            params.append(SamplingParams(**{**defaults, **rest}, extra_args=extra))
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [Answer(output, self._of(output.request_id)) for output in outputs]

    def leftovers(self) -> list[str]:
        (found,) = self.llm.collective_rpc("nnsight_integrity", args=([],))
        return msgspec.msgpack.decode(found, type=list[str])

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _of(self, external_id: str) -> list[Delta]:
        return [delta for id, deltas in self._deltas.items() if id.split("-")[0] == external_id for delta in deltas]

    def _watch(self) -> None:
        processor, runner = self.llm.llm_engine.output_processor, self.worker.model_runner
        process, execute = processor.process_outputs, runner.execute_model

        def process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            for output in outputs:
                if output.pooling_output is not None:
                    deltas = decode_deltas(output.pooling_output.numpy().tobytes())
                    self._deltas.setdefault(output.request_id, []).extend(deltas)
                    output.pooling_output = None
            return process(outputs, *args, **kwargs)

        def execute_model(scheduled: Any, *args: Any) -> Any:
            rows = {self._number(id): count for id, count in scheduled.num_scheduled_tokens.items()}
            if rows:
                self.steps.append(rows)
                self.free.append(self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
            return execute(scheduled, *args)

        processor.process_outputs, runner.execute_model = process_outputs, execute_model

    def _number(self, request_id: str) -> int:
        number = int(request_id.split("-")[0])
        self._numbers.setdefault("first", number)
        return number - self._numbers["first"]


def _start(checkpoint: str, keywords: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        worker_cls="nnsight_vllm.worker.worker.Worker",
        scheduler_cls="nnsight_vllm.scheduler.scheduler.Scheduler",
        additional_config={"nnsight_vllm": {"sites": "all"}},
        **keywords,
    )
