"""A model of three layers without a model: sites, taps and steps for the executor, in plain torch.

Layer i adds one to the residual stream, [rows, 4]; `mlp` sites are plain tensors, `out` sites are streams kept as
hidden + residual. `mlp.again` is the same tensor at the same tap, and comes after it. Logits are the last row of the stream, repeated to 8; the drawn token is their argmax.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nnsight_vllm.frontend.collected import Collected
from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo, SiteInfo
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import decode_deltas, encode
from nnsight_vllm.graph.links import Links
from nnsight_vllm.graph.nodes import Block, Graph, Node
from nnsight_vllm.graph.results import Delta, DictValue, DtypeValue, ListValue, TensorValue, TupleValue, Value
from nnsight_vllm.plan.program import ProgramCache
from nnsight_vllm.wire.limits import Limits
from nnsight_vllm.worker.batch.executor import Executor
from nnsight_vllm.worker.batch.step import Arrival, Step
from nnsight_vllm.worker.batch.tensor_store import Store
from nnsight_vllm.worker.batch.waiting import SiteTable
from nnsight_vllm.worker.model.sampling_sites import LOGITS_TAP, SAMPLES_TAP, sampling_sites
from nnsight_vllm.worker.model.sites import Direct, ResidualStream, Site, TensorSlice
from nnsight_vllm.worker.model.taps import Handler

LAYERS, HIDDEN, VOCAB = 3, 4, 8


def graph(*nodes: Node) -> bytes:
    return encode(Graph(Block(list(nodes))))


def value_of(value: Value) -> object:
    """What a client makes of a value; tensors as nested lists."""
    match value:
        case TensorValue():
            dtype = getattr(torch, value.dtype)
            tensor = torch.frombuffer(bytearray(value.data), dtype=dtype) if value.data else torch.empty(0, dtype=dtype)
            return tensor.reshape(value.shape).tolist()
        case ListValue():
            return [value_of(item) for item in value.items]
        case TupleValue():
            return tuple(value_of(item) for item in value.items)
        case DictValue():
            return {value_of(key): value_of(item) for key, item in value.items}
        case DtypeValue():
            return value.name
        case _:
            return value


def toy_catalogue(dtype: str = "float32", modules: tuple[str, ...] = ("double",)) -> Catalogue:
    """What a client knows of the model."""
    infos = [site.info for site in _sites(dtype)]
    return Catalogue([ModuleInfo(name, "Double") for name in modules], infos, VOCAB, dtype, 64, 64, "all")


class DoubleCalls:
    """The only module that can be called doubles its argument."""

    def call(self, module_path: str, args: list[Tensor]) -> Tensor:
        return args[0] * 2


@dataclass
class Toy:
    """An executor and the steps of an engine around it."""

    silent_taps: frozenset[int] = frozenset()
    batching: bool = True
    dtype: str = "float32"
    limits: Limits = Limits()  # noqa: RUF009 (immutable)
    modules: tuple[str, ...] = ()
    active: dict[int, Handler] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    received: dict[str, list[Delta]] = field(default_factory=dict)
    saved: dict[str, dict[str, object]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    collected: dict[str, Collected] = field(default_factory=dict)
    made: list[tuple[str, str]] = field(default_factory=list)
    seen: dict[int, list[list[list[float]]]] = field(default_factory=dict)  # a tap's tensors after it
    drafts: dict[str, int] = field(default_factory=dict)  # of the next step: so many more rows among the logits

    def __post_init__(self) -> None:
        sites = {site.info.name: site for site in _sites(self.dtype)}
        catalogue = toy_catalogue(self.dtype, self.modules)
        infos = catalogue.sites
        orders = {info.name: info.order for info in infos}
        cpu = torch.device("cpu")
        self.store = Store(cpu)
        table = SiteTable(sites, orders, DoubleCalls(), self.active)
        programs = ProgramCache(lambda g: check(g, catalogue))
        self.executor = Executor(table, programs, self.store, cpu, self.batching, self.limits)

    def add(
        self, name: str, data: bytes | list[bytes], prompt: int = 2, seed: int = 0, links: Links | None = None
    ) -> None:
        self.lengths[name] = prompt
        self.executor.admit(Arrival(name, data, prompt, seed, links=links))

    def step(self, **rows: tuple[int, int]) -> dict[str, Tensor]:
        """One forward: name -> (number of rows, first position). Returns each request's stream and token."""
        counts, positions = [count for count, _ in rows.values()], [position for _, position in rows.values()]
        starts = np.cumsum([0, *counts])
        drawn_from = [1 + self.drafts.get(name, 0) for name in rows]
        logits = np.cumsum(drawn_from) - 1 if self.drafts else None
        step = Step.of(rows, starts, np.array(positions, dtype=np.int64))
        self.executor.begin_step(replace(step, logits=logits))
        stream = self._forward(int(starts[-1]))
        self.executor.enter_logits()
        ends = [int(stop) - num + i for stop, num in zip(starts[1:], drawn_from, strict=True) for i in range(num)]
        self.logits = stream[ends].repeat(1, VOCAB // HIDDEN)
        self.executor.at_tap(LOGITS_TAP, (self.logits,))
        self.executor.leave_logits()
        self.tokens = _padded(self.logits.argmax(-1), drawn_from)
        self.executor.at_tap(SAMPLES_TAP, (self.tokens,))
        names = list(rows)
        sent = self.executor.end_step(names)
        self.made += sent.made
        for place, data in sent.packed({name: i for i, name in enumerate(names)}):
            for delta in decode_deltas(data.numpy().tobytes()):
                self._receive(names[place], delta)
        return {name: stream[starts[i] : starts[i + 1]] for i, name in enumerate(rows)}

    def run(self, data: bytes | list[bytes], steps: int = 1, prompt: int = 2) -> dict[str, object]:
        """One request alone; what it saved."""
        self.add("r", data, prompt)
        for iteration in range(steps):
            self.step(r=(prompt, 0) if iteration == 0 else (1, prompt + iteration - 1))
        return self.saved.get("r", {})

    def failure(self, name: str = "r") -> str:
        (failure,) = [delta.failure for delta in self.received[name] if delta.failure]
        return f"{failure.kind}: {failure.message}"

    def _forward(self, rows: int) -> Tensor:
        kind: torch.dtype = getattr(torch, self.dtype)
        hidden, residual = torch.zeros(rows, HIDDEN, dtype=kind), torch.zeros(rows, HIDDEN, dtype=kind)
        for layer in range(LAYERS):
            residual = residual + hidden
            mlp = self._increments(rows).to(kind)
            self._tap(2 * layer, (mlp,))
            hidden = mlp
            self._tap(2 * layer + 1, (hidden, residual))
        return hidden + residual

    def _increments(self, rows: int) -> Tensor:
        """What each layer adds to the stream."""
        return torch.ones(rows, HIDDEN)

    def _tap(self, tap: int, tensors: tuple[Tensor, ...]) -> None:
        if tap in self.active and tap not in self.silent_taps:
            self.active[tap](tensors)
        self.seen[tap] = [tensor.tolist() for tensor in tensors]

    def _receive(self, name: str, delta: Delta) -> None:
        self.received.setdefault(name, []).append(delta)
        if delta.stopped:
            self.stopped.append(name)
        collected = self.collected.setdefault(name, Collected())
        collected.add(delta)
        collected.read_sheets()
        self.saved[name] = {key: _listed(value) for key, value in collected.sample.values.items()}


def _padded(drawn: Tensor, counts: list[int]) -> Tensor:
    """[requests, most tokens of one], filled up with -1."""
    padded = torch.full((len(counts), max(counts, default=1)), -1, dtype=torch.int32)
    for row, tokens in zip(padded, drawn.split(counts), strict=True):
        row[: len(tokens)] = tokens
    return padded


def _listed(value: object) -> object:
    """Tensors as nested lists."""
    match value:
        case Tensor():
            return value.tolist()
        case list():
            return [_listed(item) for item in value]
        case tuple():
            return tuple(_listed(item) for item in value)
        case dict():
            return {key: _listed(item) for key, item in value.items()}
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case _:
            return value


def _sites(dtype: str) -> list[Site]:
    sites: list[Site] = []
    for layer in range(LAYERS):
        mlp = SiteInfo(f"{layer}.mlp", f"{layer}.mlp", "output", 3 * layer, (None, HIDDEN), dtype)
        again = SiteInfo(f"{layer}.mlp.again", f"{layer}.mlp.again", "output", 3 * layer + 1, (None, HIDDEN), dtype)
        out = SiteInfo(f"{layer}.out", f"{layer}", "output", 3 * layer + 2, (None, HIDDEN), dtype)
        sites += [Direct(info, 2 * layer, TensorSlice(0)) for info in (mlp, again)]
        sites.append(ResidualStream(out, 2 * layer + 1, TensorSlice(0), TensorSlice(1)))
    return sites + sampling_sites(3 * LAYERS, VOCAB, dtype)
