"""Programs on the toy model, put together from named steps: what generated tests run in groups and one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from toy import HIDDEN, Toy

from nnsight_vllm.graph.codec import digest, encode
from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Cond,
    Const,
    Dots,
    Graph,
    Iterations,
    List,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Stop,
    Tuple,
    Write,
)

FULL = Slice()
TOLERANCE = 1e-5


class Builder:
    """Nodes with ids; `constants` are made anew for every request."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.nodes: list[Node] = []
        self.files: list[bytes] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._id = 100

    def id(self) -> int:
        self._id += 1
        return self._id

    def op(self, name: str, *args: Arg, writes: str | None = None, **kwargs: Arg) -> Ref:
        node = Op(self.id(), name, list(args), dict(kwargs), writes)
        self.nodes.append(node)
        return Ref(node.id)

    def read(self, site: str) -> Ref:
        node = Read(self.id(), site, None)
        self.nodes.append(node)
        return Ref(node.id)

    def write(self, site: str, value: Arg) -> None:
        self.nodes.append(Write(self.id(), site, value, None))

    def save(self, value: Arg, name: str) -> None:
        self.nodes.append(Save(self.id(), name, value))

    def const(self, *shape: int) -> Ref:
        tensor = torch.randn(shape, generator=self._generator).to(self.dtype)
        data = save({"tensor": tensor})
        self.files.append(data)
        node = Const(self.id(), digest(data))
        self.nodes.append(node)
        return Ref(node.id)

    def number(self) -> float:
        return float(torch.randn((), generator=self._generator))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self._generator))


def _in_iterations(builder: Builder, before: list[Node], stop: int | None = None) -> bytes:
    return encode(Graph(Block([*before, Iterations(1, 0, stop, 1, 2, Block(builder.nodes))])))


# Each takes a builder and a place (or a value of rows) and does something with it.
STEPS: dict[str, Any] = {
    "add": lambda b, h: b.op("py.iadd", b.op("py.getitem", h, FULL), b.const(HIDDEN), writes="1.out"),
    "sub": lambda b, h: b.op("tensor.sub_", h, b.const(HIDDEN), writes="1.out"),
    "add a number": lambda b, h: b.op("py.iadd", h, b.number(), writes="1.out"),
    "scale": lambda b, h: b.op("py.imul", h, b.number(), writes="1.out"),
    "the last row": lambda b, h: b.op("py.iadd", b.op("py.getitem", h, -1), b.const(HIDDEN), writes="1.out"),
    "a row of its own": lambda b, h: b.op(
        "py.iadd", b.op("py.getitem", h, b.integer(-1, 0)), b.const(HIDDEN), writes="1.out"
    ),
    "a row that may not be there": lambda b, h: b.op(
        "py.iadd", b.op("py.getitem", h, b.integer(-2, 1)), b.const(HIDDEN), writes="1.out"
    ),
    "some rows": lambda b, h: b.op(
        "py.imul", b.op("py.getitem", h, Slice(b.integer(0, 2), None)), b.const(HIDDEN), writes="1.out"
    ),
    "a column": lambda b, h: b.op("py.setitem", h, Tuple([FULL, 1]), b.number(), writes="1.out"),
    "columns": lambda b, h: b.op("py.iadd", b.op("py.getitem", h, Tuple([Dots(), Slice(1, 3)])), 2.0, writes="1.out"),
    "a part of the last row": lambda b, h: b.op(
        "py.setitem", h, Tuple([-1, Slice(None, 2)]), b.const(2), writes="1.out"
    ),
    "zero": lambda b, h: b.op("tensor.zero_", h, writes="1.out"),
    "project": lambda b, h: _project(b, h),
    "gate": lambda b, h: _gate(b, h),
    "norm": lambda b, h: b.op("py.itruediv", h, b.op("tensor.norm", h, dim=-1, keepdim=True), writes="1.out"),
    "mean of all": lambda b, h: b.op("py.iadd", h, b.op("tensor.mean", h), writes="1.out"),
    "mean of rows": lambda b, h: b.op("py.iadd", h, b.op("tensor.mean", h, 0), writes="1.out"),
    "softmax": lambda b, h: b.op("py.iadd", h, b.op("torch.softmax", h, -1), writes="1.out"),
    "a matrix": lambda b, h: b.op("py.iadd", h, b.op("py.matmul", h, b.const(HIDDEN, HIDDEN)), writes="1.out"),
    "a vector's product": lambda b, h: b.op(
        "py.iadd", h, b.op("py.matmul", b.const(HIDDEN), b.const(HIDDEN, HIDDEN)), writes="1.out"
    ),
    "flipped": lambda b, h: b.op("py.iadd", h, b.op("tensor.flip", h, List([-1])), writes="1.out"),
    "a private copy": lambda b, h: _private(b, h),
    "cumulated": lambda b, h: b.op("py.iadd", h, b.op("tensor.cumsum", h, 0), writes="1.out"),
    "transposed": lambda b, h: b.op("tensor.mul_", b.op("tensor.t", h), 0.5, writes="1.out"),
    "assigned": lambda b, h: b.write("1.out", b.op("py.mul", h, b.const(HIDDEN))),
    "a number assigned": lambda b, h: b.write("1.out", b.number()),
    "clamped": lambda b, h: b.op("tensor.clamp_", h, -1.0, 1.0, writes="1.out"),
    "chosen columns": lambda b, h: b.op(
        "py.setitem", h, Tuple([FULL, b.op("tensor.argsort", b.const(2))]), b.number(), writes="1.out"
    ),
}
EDITS: dict[str, Any] = {
    "added with a strength": lambda b, h: b.op(
        "py.iadd", h, b.op("py.mul", b.const(HIDDEN), b.number()), writes="1.out"
    ),
    "replaced": lambda b, h: b.op("py.setitem", h, FULL, b.const(HIDDEN), writes="1.out"),
    "projected": lambda b, h: b.op("edit.project_out_", h, b.const(HIDDEN), b.number(), writes="1.out"),
    "clamped along": lambda b, h: b.op("edit.clamp_", h, b.const(HIDDEN), -0.5, b.number(), writes="1.out"),
    "norm matched": lambda b, h: b.op("edit.norm_matched_add_", h, b.const(HIDDEN), b.number(), writes="1.out"),
    "low rank": lambda b, h: b.op(
        "edit.low_rank_", h, b.const(2, HIDDEN), b.const(HIDDEN, 2), b.number(), writes="1.out"
    ),
    "a feature": lambda b, h: b.op(
        "edit.sae_clamp_", h, b.const(HIDDEN), b.number(), b.const(HIDDEN), b.number(), writes="1.out"
    ),
    "the last row projected": lambda b, h: b.op(
        "edit.project_out_", b.op("py.getitem", h, -1), b.const(HIDDEN), 1.0, writes="1.out"
    ),
    "a direction of the run": lambda b, h: b.op(
        "edit.project_out_", h, b.op("py.mul", b.const(HIDDEN), b.const(HIDDEN)), 1.0, writes="1.out"
    ),
}
STEPS |= EDITS
STEPS["compared and halved"] = lambda b, h: b.op(
    "py.imul", h, b.op("py.add", b.op("py.gt", h, b.number()), 0.5), writes="1.out"
)
STEPS["numbers on both sides"] = lambda b, h: _numbers_on_both_sides(b, h)
LOOKS: dict[str, Any] = {
    "all": lambda b, h: h,
    "the last row": lambda b, h: b.op("py.getitem", h, -1),
    "the first rows": lambda b, h: b.op("py.getitem", h, Slice(None, 2)),
    "topk": lambda b, h: b.op("tensor.topk", h, 2),
    "argmax": lambda b, h: b.op("tensor.argmax", h, -1),
    "sum": lambda b, h: b.op("tensor.sum", h),
    "mean": lambda b, h: b.op("tensor.mean", h, dim=0),
    "max of rows": lambda b, h: b.op("tensor.amax", h, 0),
    "norm of the last": lambda b, h: b.op("tensor.norm", b.op("py.getitem", h, -1)),
    "compared": lambda b, h: b.op("py.gt", h, b.number()),
    "values of topk": lambda b, h: b.op("py.attr", b.op("tensor.topk", h, 2), "values"),
    "a product of own": lambda b, h: b.op("py.matmul", b.op("py.getitem", h, -1), b.const(HIDDEN)),
    "a transpose": lambda b, h: b.op("tensor.t", h),
    "shape": lambda b, h: b.op("py.size", h, 0),
    "a list": lambda b, h: b.op("tensor.tolist", h),
}


def _project(b: Builder, h: Ref) -> None:
    d = b.const(HIDDEN)
    along = b.op("py.getitem", b.op("py.matmul", h, d), Tuple([FULL, None]))
    b.op("py.isub", h, b.op("py.mul", along, d), writes="1.out")


def _gate(b: Builder, h: Ref) -> None:
    d, gate = b.const(HIDDEN), b.op("py.gt", b.op("py.matmul", h, b.const(HIDDEN)), b.number())
    along = b.op("py.mul", b.op("py.matmul", h, d), gate)
    change = b.op("py.mul", b.op("py.getitem", along, Tuple([FULL, None])), d)
    b.op("py.isub", h, change, writes="1.out")


def _numbers_on_both_sides(b: Builder, h: Ref) -> None:
    value = b.op("py.sub", b.number(), b.op("py.mul", b.number(), h))
    value = b.op("py.add", b.number(), b.op("py.truediv", value, b.number()))
    b.op(
        "py.iadd",
        h,
        b.op("py.sub", value, b.op("py.truediv", b.number(), b.op("py.add", b.op("tensor.abs", h), 1.0))),
        writes="1.out",
    )


def _private(b: Builder, h: Ref) -> None:
    """A value of the request's own, changed through a view, then given back."""
    own = b.op("tensor.clone", h)
    b.op("py.iadd", b.op("py.getitem", own, -1), b.const(HIDDEN))
    b.op("tensor.mul_", own, b.number())
    b.op("py.setitem", h, FULL, own, writes="1.out")


@dataclass(frozen=True)
class Plan:
    """What all requests of a scenario do; constants are each request's own."""

    steps: tuple[str, ...]
    looks: tuple[str, ...]
    branch: str | None
    appends: bool


def build(plan: Plan, seed: int, stop: int | None, dtype: torch.dtype = torch.float32) -> tuple[bytes, list[bytes]]:
    b = Builder(seed, dtype)
    before: list[Node] = []
    h = b.read("1.out")
    for number, name in enumerate(plan.steps):
        STEPS[name](b, h)
        if name in {"assigned", "a number assigned"}:
            h = b.read("1.out")
        if number < len(plan.looks):
            _look(b, h, plan, number, before)
    for number in range(len(plan.steps), len(plan.looks)):
        _look(b, h, plan, number, before)
    if plan.branch is not None:
        _branch(b, h, plan.branch)
    b.save(b.op("tensor.clone", b.read("2.out")), "after")
    logits = b.read("logits.output")
    b.op("py.iadd", b.op("py.getitem", logits, Tuple([FULL, b.integer(0, 3)])), b.number(), writes="logits.output")
    b.save(b.op("py.attr", b.op("tensor.topk", logits, 2), "values"), "logits")  # the toy's logits have ties
    b.save(b.read("samples.output"), "token")
    return _in_iterations(b, before, stop), b.files


def _look(b: Builder, h: Ref, plan: Plan, number: int, before: list[Node]) -> None:
    value = LOOKS[plan.looks[number]](b, h)
    if plan.appends:
        kept = b.id()
        before += [Op(kept, "py.list"), Save(b.id(), f"look{number}", Ref(kept))]
        b.op("py.append", Ref(kept), value)
    else:
        b.save(value, f"look{number}")


def _branch(b: Builder, h: Ref, kind: str) -> None:
    test = b.op("py.gt", b.op("tensor.sum", h), b.number() * 4)
    then, orelse = Builder(b.integer(0, 99)), Builder(b.integer(0, 99))
    then._id, orelse._id = b.id() + 1000, b.id() + 2000
    then.op("py.imul", h, 2.0, writes="1.out")
    made = then.op("py.add", h, then.number())
    if kind == "stop":
        orelse.nodes.append(Stop(orelse.id()))
    other = orelse.op("py.mul", h, orelse.number())
    out = b.id()
    b.nodes.append(Cond(b.id(), test, Block(then.nodes, [made]), Block(orelse.nodes, [other]), [out]))
    b.save(Ref(out), "branch")
    item, carried, result = b.id(), b.id(), b.id()
    body = Builder(0)
    body._id = b.id() + 3000
    total = body.op("py.add", Ref(carried), body.op("py.mul", Ref(item), 0.5))
    b.nodes.append(Loop(b.id(), h, item, Block(body.nodes, [total]), [carried], [0.0], [result]))
    b.save(Ref(result), "loop")


def run(
    requests: list[tuple[bytes, list[bytes], int]], steps: int, batching: bool, late: int, dtype: str = "float32"
) -> Toy:
    """All requests together; the last `late` of them come one step later."""
    toy = Toy(batching=batching, dtype=dtype)
    done: dict[str, int] = {}
    for step in range(steps):
        done = {name: iteration for name, iteration in done.items() if not _is_over(toy, name)}
        for i, (data, files, prompt) in enumerate(requests):
            if step == (1 if i >= len(requests) - late else 0):
                toy.store.put(files)
                toy.add(f"r{i}", data, prompt, seed=i)
                done[f"r{i}"] = 0
        rows = {}
        for name, iteration in done.items():
            prompt = toy.lengths[name]
            rows[name] = (prompt, 0) if iteration == 0 else (1, prompt + iteration - 1)
            done[name] += 1
        toy.step(**rows)
    return toy


def _is_over(toy: Toy, name: str) -> bool:
    """Whether the front end would have ended the request."""
    return any(delta.failure or delta.stopped for delta in toy.received.get(name, []))


def compare(one: object, other: object, path: str) -> None:
    """Equal structure and types; numbers within the tolerance."""
    assert type(one) is type(other), (path, one, other)
    if isinstance(one, list | tuple):
        assert isinstance(other, list | tuple) and len(one) == len(other), (path, one, other)
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            compare(left, right, f"{path}[{i}]")
    elif isinstance(one, float):
        assert isinstance(other, float)
        same = math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (one != one and other != other)
        assert same or one == other, (path, one, other)
    else:
        assert one == other, path
