"""Graphs as an enemy would write them: drawn from nothing, or good ones damaged; and what has to hold whatever comes of them.

A source of choices is a `random.Random` or anything else with its three methods that are used here, such as a fuzzer's bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from toy import LAYERS, Toy, graph, toy_catalogue

from nnsight_vllm.errors import AdmissionError, GraphError, InterventionError, RecordError
from nnsight_vllm.graph.check import DTYPES, check
from nnsight_vllm.graph.codec import decode, encode, from_json, to_json
from nnsight_vllm.graph.nodes import Graph, Op, Read, Ref, Save
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.plan.caching import caching_of
from nnsight_vllm.plan.chunking import Unchunked, chunking_of
from nnsight_vllm.plan.program import compile_graph
from nnsight_vllm.wire.limits import Limits

T = TypeVar("T")
ALLOWED = (GraphError, RecordError, InterventionError, AdmissionError)
LIMITS = Limits(
    value_bytes=1 << 22, held_bytes=1 << 24, held_bytes_in_all=1 << 26, work=1 << 28, seconds=8.0, trips=5000,
    saved_per_step=1 << 22, log_lines=50,
)  # fmt: skip
MAX_SECONDS = 60.0  # of one case; a busy machine is slow
_SITES = [f"{layer}.{name}" for layer in range(LAYERS) for name in ("mlp", "mlp.again", "out")]
SITES = [*_SITES, "logits.output", "samples.output"]
NAMES = sorted(OPS)
NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    100,
    10**6,
    2**31 - 1,
    2**31,
    -(2**31),
    2**62,
    2**63 - 1,
    -(2**63),
    0.0,
    0.5,
    -1.5,
    1e30,
    1e308,
]
WORDS = [
    "",
    "a",
    "sum",
    "ij,jk->ik",
    "i,j->ij",
    "constant",
    "nearest",
    "values",
    "indices",
    "shape",
    "__class__",
    "meta",
    "float",
    "\x00",
    "é",
]
KEYS = [
    "dim",
    "keepdim",
    "dtype",
    "out",
    "device",
    "size",
    "input",
    "other",
    "n",
    "p",
    "dims",
    "largest",
    "descending",
    "rounding_mode",
    "padding",
    "inplace",
    "mode",
]


class Source(Protocol):
    """Where choices come from."""

    def random(self) -> float: ...
    def randrange(self, start: int, /) -> int: ...
    def choice(self, items: Sequence[T]) -> T: ...


class Drawn:
    """One graph, as the plain values that JSON and msgpack have. Ids are mostly those of values that exist."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ids: list[int] = []
        self.next = 0
        self.inside = False  # of a block over iterations

    def graph(self) -> dict[str, Any]:
        nodes = [self.tensor() for _ in range(self.source.randrange(3))]
        return {"type": "graph", "body": self.block(nodes, self.source.randrange(8) + 1, 0), "version": 1}

    def tensor(self) -> dict[str, Any]:
        """Something that operations can work with."""
        shape = [self.source.choice([1, 2, 3, 4]) for _ in range(self.source.randrange(4))]
        name = self.source.choice(["torch.ones", "torch.rand", "torch.zeros"])
        return {"type": "op", "id": self.new(), "name": name, "args": [{"type": "list", "items": shape}]}

    def block(self, nodes: list[Any], num: int, depth: int) -> dict[str, Any]:
        known = list(self.ids)
        for _ in range(num):
            nodes.append(self.node(depth))
        found = {
            "type": "block",
            "nodes": nodes,
            "yields": [self.arg(1) for _ in range(self.source.randrange(2))] if depth else [],
        }
        if depth and self.source.random() < 0.9:
            self.ids = known
        return found

    def new(self) -> int:
        self.next += 1
        id = self.next if self.source.random() < 0.995 else self.source.choice([0, -1, 2**63, self.next - 1])
        self.ids.append(id)
        return id

    def node(self, depth: int) -> dict[str, Any]:
        kind = self.source.randrange(20)
        known = len(self.ids)
        iteration: int | None = None if self.inside else self.source.choice([0, 0, 0, 0, 1])
        if self.source.random() < 0.03:
            iteration = self.source.choice([None, -1, 0, 2**62])
        site = self.source.choice(SITES) if self.source.random() < 0.98 else "nowhere"
        match kind:
            case 0 | 1:
                return {"type": "read", "id": self.new(), "site": site, "iteration": iteration}
            case 2:
                value = self.arg(0)
                return {"type": "write", "id": self.new(), "site": site, "value": value, "iteration": iteration}
            case 3:
                value = self.arg(0)
                return {"type": "save", "id": self.new(), "name": self.source.choice("ab"), "value": value}
            case 4:
                args = [self.arg(0) for _ in range(self.source.randrange(3))]
                return {"type": "log", "id": self.new(), "args": args}
            case 5 if depth < 3:
                then, orelse = (
                    self.block([], self.source.randrange(3), depth + 1),
                    self.block([], self.source.randrange(3), depth + 1),
                )
                num = min(len(then["yields"]), len(orelse["yields"]))
                for block in (then, orelse):
                    block["yields"] = block["yields"][:num]
                test = self.arg(0)
                outs = [self.new() for _ in range(num)]
                return {"type": "cond", "id": self.new(), "test": test, "then": then, "orelse": orelse, "outs": outs}
            case 6 if depth < 3:
                return self.loop(depth)
            case 7 if depth == 0 or (depth < 2 and self.source.random() < 0.05):
                start, stop, step = (
                    self.source.choice([0, 0, 1]),
                    self.source.choice([None, 2, 3, 2**62]),
                    self.source.choice([1] * 9 + [2, 0, -1]),
                )
                index, self.inside = self.new(), True
                body = self.block([], self.source.randrange(5), depth + 1)
                self.inside = False
                return {
                    "type": "iterations",
                    "id": self.new(),
                    "start": start,
                    "stop": stop,
                    "step": step,
                    "index": index,
                    "body": body,
                }
            case 8:
                extra = self.source.choice(["stop", "const", "call", "call", "export", "import"])
                node: dict[str, Any] = {"type": extra, "id": self.new()}
                more: dict[str, dict[str, Any]] = {
                    "const": {"digest": "ab" * 32},
                    "call": {"module": "double", "args": [self.arg(0)]},
                }
                more |= {"export": {"key": "k", "value": self.arg(0)}, "import": {"key": "k"}}
                return node | more.get(extra, {})
        name = self.source.choice(NAMES)
        args = [self.ref() if known else self.arg(0)] if self.source.random() < 0.8 else []
        args += [self.arg(0) for _ in range(self.source.randrange(4))]
        kwargs = (
            {self.source.choice(KEYS): self.arg(0) for _ in range(self.source.randrange(2))}
            if self.source.random() < 0.3
            else {}
        )
        writes = self.source.choice(SITES) if self.source.random() < 0.05 else None
        return {"type": "op", "id": self.new(), "name": name, "args": args, "kwargs": kwargs, "writes": writes}

    def loop(self, depth: int) -> dict[str, Any]:
        over = (
            self.ref()
            if self.source.random() < 0.6
            else {"type": "list", "items": [self.arg(1)] * self.source.choice([1, 2, 50])}
        )
        num = self.source.randrange(2)
        inits = [self.arg(1) for _ in range(num)]
        item, carried = self.new(), [self.new() for _ in range(num)]
        body = self.block([], self.source.randrange(4), depth + 1)
        body["yields"] = [self.arg(1) for _ in range(num)]
        outs = [self.new() for _ in range(num)]
        return {
            "type": "loop",
            "id": self.new(),
            "over": over,
            "item": item,
            "body": body,
            "carried": carried,
            "inits": inits,
            "outs": outs,
        }

    def ref(self) -> dict[str, Any]:
        return {
            "type": "ref",
            "id": self.source.choice(self.ids) if self.ids and self.source.random() < 0.995 else 12345,
        }

    def arg(self, depth: int) -> Any:
        kind = self.source.randrange(16)
        if kind < 6 and self.ids:
            return self.ref()
        if kind < 9 or depth > 3:
            return self.source.choice(NUMBERS)
        match kind:
            case 9:
                return self.source.choice(WORDS)
            case 10:
                return self.source.choice([None, True, False, {"type": "dots"}, {"type": "float", "text": "nan"}])
            case 11:
                return {"type": "dtype", "name": self.source.choice(sorted(DTYPES))}
            case 12:
                return {"type": "slice", "start": self.arg(4), "stop": self.arg(4), "step": self.arg(4)}
            case 13:
                return {
                    "type": "dict",
                    "items": [[self.arg(4), self.arg(depth + 1)] for _ in range(self.source.randrange(3))],
                }
            case _:
                name = "list" if kind == 14 else "tuple"
                return {"type": name, "items": [self.arg(depth + 1) for _ in range(self.source.randrange(4))]}


def damaged(data: bytes, source: Source) -> bytes:
    """The bytes with one to four small stretches replaced by noise or by other stretches of them."""
    changed = bytearray(data)
    for _ in range(source.randrange(4) + 1):
        start, other = source.randrange(len(changed) + 1), source.randrange(len(data))
        size = source.choice([0, 1, 1, 2, 9])
        noise = bytes(source.randrange(256) for _ in range(size))
        piece = source.choice([noise, data[other : other + 10 * size]])
        changed[start : start + source.choice([0, 1, len(piece)])] = piece
    return bytes(changed)


def case(source: Source) -> bytes:
    """One input: JSON, which begins with a brace, or msgpack."""
    tree = Drawn(source).graph()
    is_json = source.random() < 0.3
    data = msgspec.json.encode(tree) if is_json else msgspec.msgpack.encode(tree)
    return damaged(data, source) if source.random() < 0.15 else data


PLAIN = graph(Read(0, "1.out", 0), Op(1, "torch.softmax", [Ref(0), -1]), Save(2, "x", Ref(1)))


class Judge:
    """Runs inputs one after the other. `counts`: how far they got."""

    def __init__(self) -> None:
        alone = Toy(modules=("double",))
        alone.add("plain", PLAIN)
        self._expected = alone.step(plain=(2, 0))["plain"], alone.saved["plain"]
        self._catalogue = toy_catalogue(modules=("double",))
        self.counts = dict.fromkeys(["refused", "failed", "ran"], 0)

    def judge(self, data: bytes) -> str:
        """How far an input got. Raises where something comes out that may not, or anything else isn't as it must be."""
        start = time.perf_counter()
        found = self._judge(data)
        seconds = time.perf_counter() - start
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
        self.counts[found] += 1
        return found

    def _judge(self, data: bytes) -> str:
        legal = self._legal(data)
        if legal is None:
            return "refused"
        assert decode(encode(legal)) == legal or "nan" in to_json(legal)
        compile_graph(legal)
        for length in (1, 2, 70):  # what the front end and the scheduler ask of it
            facts = lambda site: 1, lambda digest: 1, length
            caching_of(legal, *facts)
            cut = chunking_of(legal, *facts)
            if not isinstance(cut, Unchunked):
                for chunk in (cut.chunk(0, 1), cut.last(1)):
                    _ = chunk and compile_graph(chunk)
        toy = Toy(limits=LIMITS, modules=("double",))
        toy.add("plain", PLAIN)
        for name in ("one", "two"):
            toy.add(name, encode(legal))
        streams = toy.step(plain=(2, 0), one=(2, 0), two=(2, 0))
        assert not any(delta.failure for delta in toy.received["plain"]), toy.failure("plain")
        assert torch.equal(streams["plain"], self._expected[0]), "another request's rows changed"
        assert toy.saved["plain"] == self._expected[1], "another request's values changed"
        over = {name for name in ("one", "two") if any(d.failure or d.stopped for d in toy.received.get(name, []))}
        toy.executor.drop(["plain", *over])
        toy.step(**{name: (1, 2) for name in ("one", "two") if name not in over})
        failed = any(delta.failure for name in ("one", "two") for delta in toy.received.get(name, []))
        toy.executor.drop(["one", "two"])
        toy.executor.exports.end()
        assert not (left := toy.executor.leftovers([])), left
        return "failed" if failed else "ran"

    def _legal(self, data: bytes) -> Graph | None:
        try:
            found = from_json(data) if data[:1] == b"{" else decode(data)
            check(found, self._catalogue)
        except ALLOWED:
            return None
        return found
