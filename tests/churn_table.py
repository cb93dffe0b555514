"""Graphs of a scenario that are put together from the toy model's steps and looks (generated.py), at a site of a real one."""

from __future__ import annotations

from churn_kinds import HIDDEN
from churn_scenario import TABLE, Graph
from generated import LOOKS, STEPS, Builder

from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Arg, Block, Iterations, Loop, Node, Op, Ref, Save, Write
from nnsight_vllm.graph.nodes import Graph as Nodes

SITES = ["output", "mlp.output", "self_attn.q_proj.output", "post_attention_layernorm.output", "mlp.down_proj.output"]
# Not what rounding decides: comparisons of every element. The gates are a kind above.
TABLE_STEPS = sorted(set(STEPS) - {"compared and halved", "gate"})
TABLE_LOOKS = [
    "all",
    "the last row",
    "the first rows",
    "mean",
    "max of rows",
    "norm of the last",
    "a transpose",
    "shape",
]
TABLE_LOOKS += ["values of topk", "loop"]


class _Steps(Builder):
    """Steps and looks of the toy model at a site of a real one."""

    def __init__(self, seed: int, site: str) -> None:
        super().__init__(seed)
        self._site = site

    def op(self, name: str, *args: Arg, writes: str | None = None, **kwargs: Arg) -> Ref:
        return super().op(name, *args, writes=writes and self._site, **kwargs)

    def read(self, site: str) -> Ref:
        return super().read(self._site)

    def write(self, site: str, value: Arg) -> None:
        self.nodes.append(Write(self.id(), self._site, value, None))

    def const(self, *shape: int) -> Ref:
        return super().const(*(HIDDEN if size == 4 else size for size in shape))


def table(graph: Graph) -> tuple[bytes, list[bytes]]:
    """The program of a graph of kind `TABLE`, and its constants."""
    assert graph.kind == TABLE
    b = _Steps(graph.seed, f"model.layers.{graph.layer}.{graph.site}")
    before: list[Node] = []
    place = b.read("")
    for name in graph.steps:
        STEPS[name](b, place)
        if "assigned" in name:
            place = b.read("")
    for number, name in enumerate(graph.looks):
        value = _loop(b, place) if name == "loop" else LOOKS[name](b, place)
        kept = b.id()
        before += [Op(kept, "py.list"), Save(b.id(), f"look{number}", Ref(kept))]
        b.op("py.append", Ref(kept), value)
    block = Iterations(1, graph.first, graph.last, graph.step, 2, Block(b.nodes))
    return encode(Nodes(Block([*before, block]))), b.files


def _loop(b: Builder, place: Ref) -> Ref:
    """The sum of half of each row, row by row."""
    item, carried, result = b.id(), b.id(), b.id()
    body = Builder(0)
    body._id = b.id() + 3000
    total = body.op("py.add", Ref(carried), body.op("py.mul", Ref(item), 0.5))
    b.nodes.append(Loop(b.id(), place, item, Block(body.nodes, [total]), [carried], [0.0], [result]))
    return Ref(result)
