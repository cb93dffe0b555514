"""Prompts that the engine computes in several steps, or that begin in the prefix cache.

A chunk that isn't the prompt's last one runs as a unit of its own, for that step only, with a graph that does what is to be
done with its rows. What it saves is held here. In the step with the prompt's last rows the request's own program runs, with
what was held as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_vllm.errors import InterventionError
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.chunks import Chunked
from nnsight_vllm.plan.program import ProgramCache
from nnsight_vllm.plan.template import Digest, parameter_of
from nnsight_vllm.worker.batch.group import Group
from nnsight_vllm.worker.batch.prompt_progress import Progress
from nnsight_vllm.worker.batch.requests import EngineRequest, interrupted
from nnsight_vllm.worker.batch.tensor_store import Store

Excess = Callable[[EngineRequest, int, int], str]
"""What's over its limit if a request holds so many bytes and all of them so many; empty where nothing is."""


@dataclass(kw_only=True, eq=False)
class PrefillChunk(EngineRequest):
    """A request for one step with a chunk of its prompt. Its failure is its owner's."""

    owner: EngineRequest

    def fail(self, error: BaseException, keep_token: bool | None = None) -> None:
        super().fail(error, keep_token)
        if not self.owner.is_over:
            self.owner.node = self.node
            self.owner.fail(error, keep_token=False)


class Prefill:
    """`chunks`: of this step. `joined`: requests whose prompt's last chunk is in this step, and their constants of held rows."""

    def __init__(
        self, programs: ProgramCache, store: Store, trailing: Callable[[str], int], device: torch.device
    ) -> None:
        self.chunks: list[PrefillChunk] = []
        self.joined: list[tuple[EngineRequest, list[int], str]] = []
        self.num_held = 0  # bytes
        self._programs = programs
        self._store = store
        self._trailing = trailing
        self._device = device

    def unit(self, request: EngineRequest, position: int, count: int) -> EngineRequest | None:
        """What runs on these rows of a prompt: the request, a chunk of it, or nobody. Raises `PreemptedError`."""
        progress, end = request.progress, position + count
        assert progress is not None
        if end > request.prompt_length or (progress.computed and position != progress.computed):
            raise interrupted(request, position, count)
        if count == request.prompt_length:
            request.progress = None
            return request
        if progress.chunking is None:
            progress.chunking = self._chunking(request, progress.graph)
        progress.computed = end
        if end == request.prompt_length:
            self._finish(request, progress, progress.chunking, position)
            return request
        if isinstance(progress.chunking, Unchunked):
            raise interrupted(request, position, count)
        graph = progress.chunking.chunk(position, end)
        return None if graph is None else self._chunk(request, graph)

    def collect(self, excess: Excess) -> None:
        """The step is over: hold what its chunks saved."""
        for chunk in self.chunks:
            request = chunk.owner
            chunk.leave_iteration()
            if request.progress is None or request.is_over:
                continue
            for key, rows in chunk.outbox.values().items():
                self.num_held += request.progress.hold(key, rows)
            if over := excess(request, request.progress.num_bytes, self.num_held):
                self.num_held -= request.progress.let_go(over)
        self.chunks = []

    def forget(self, groups: Iterable[Group]) -> None:
        """The last chunks' step is over, so nobody needs the rows of those before."""
        for request, ids, _ in self.joined:
            for id in ids:
                request.parameters.pop(id, None)
                request.env.pop(id, None)
            for group in (group for group in groups if any(member is request for member in group.members)):
                group.forget(ids)
        self.joined = []

    def drop(self, request: EngineRequest) -> None:
        """The request is gone."""
        if request.progress is not None:
            self.num_held -= request.progress.let_go()
            request.progress = None

    def _chunking(self, request: EngineRequest, graph: bytes) -> Chunked | Unchunked:
        return chunking_of(
            decode(graph), self._trailing, lambda digest: self._store.get(digest).ndim, request.prompt_length
        )

    def _chunk(self, request: EngineRequest, graph: Graph) -> PrefillChunk:
        chunk = PrefillChunk(request.id, request.prompt_length, request.seed, number=request.number, owner=request)
        chunk.spent, chunk.outbox = request.spent, request.outbox.another()
        self._load(chunk, graph, {})
        self.chunks.append(chunk)
        return chunk

    def _finish(self, request: EngineRequest, progress: Progress, chunking: Chunked | Unchunked, position: int) -> None:
        """The prompt's last rows come: have its program know where they begin, and what was held."""
        graph = None if isinstance(chunking, Unchunked) else chunking.last(position)
        if isinstance(chunking, Chunked) and graph is not None:
            keys = {sent.key: position for sents in chunking.sent.values() for sent in sents}
            ids = self._load(request, graph, keys)
            self.joined.append((request, ids, progress.excess))
        self.drop(request)

    def _load(self, unit: EngineRequest, graph: Graph, keys: dict[str, int]) -> list[int]:
        """Give a unit a program. `keys`: constants that are rows of the chunks before, which end at a position."""
        unit.program, parameters = self._programs.of(graph)
        unit.parameters, held = {}, []
        for number, value in enumerate(parameters):
            id = parameter_of(number)
            if isinstance(value, Digest) and value.text in keys:
                held.append(id)
                unit.parameters[id] = self._rows(unit, value.text, keys[value.text])
            else:
                unit.parameters[id] = self._store.value_of(value)
        unit.env = dict(unit.parameters)
        return held

    def _rows(self, unit: EngineRequest, key: str, end: int) -> Tensor:
        """What the chunks before position `end` held under this key."""
        rows = None if unit.progress is None else unit.progress.joined(key, self._device)
        if rows is None:
            raise InterventionError(f"rows before position {end} of the prompt weren't computed")
        return rows
