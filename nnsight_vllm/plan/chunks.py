"""A graph over a prompt that comes in chunks: what it does with each, as graphs of their own.

Rows are named by their positions in the prompt. In a chunk they have other numbers, and a part of the rows may lie in it or
not: the graphs made here have the numbers of the chunk, and nothing that isn't in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnsight_vllm.graph.check import operands, refs
from nnsight_vllm.graph.copying import Copier
from nnsight_vllm.graph.nodes import Arg, Block, Const, Graph, List, Node, Op, Ref, Save, Slice, Stop, Tuple, Write
from nnsight_vllm.graph.ops import is_inplace
from nnsight_vllm.plan.kinds import RowRange


@dataclass(frozen=True)
class ChunkSave:
    """Value `id`, of rows, goes home or into a container. Each chunk saves its rows under `key`; ids for the joining nodes."""

    key: str
    id: int
    part: RowRange | None
    at: int
    joined: int
    kept: int


@dataclass(frozen=True)
class Chunked:
    """`nodes`: the graph with iteration 0 outside of blocks. `rows`: of those done for every chunk, the rows they are about.

    `sent`: by node, the values that it needs joined. `indexed`: parts by the node that takes them out of all rows.
    """

    nodes: Sequence[Node]
    rows: Mapping[int, RowRange | None]
    sent: Mapping[int, Sequence[ChunkSave]]
    indexed: Mapping[int, RowRange]
    num_rows: int

    def chunk(self, start: int, stop: int) -> Graph | None:
        """What to do with positions `start` to `stop`, which aren't the prompt's last ones; None: nothing."""
        kept: list[Node] = []
        for node in itertools.takewhile(lambda node: not isinstance(node, Stop), self.nodes):
            if node.id in self.rows and _overlaps(self.rows[node.id], start, stop):
                kept.append(self._numbered(node, start, stop))
            due = [sent for sent in self.sent.get(node.id, ()) if _overlaps(sent.part, start, stop)]
            kept += [Save(sent.kept, sent.key, Ref(sent.id)) for sent in due]
        kept = _needed(kept)
        return Graph(Block(kept)) if any(map(_has_effect, kept)) else None

    def last(self, start: int) -> Graph | None:
        """The graph for a step with the positions from `start` on, the prompt's last ones; None: it's the same.

        Rows of the chunks before are constants in it, by the keys of what was sent.
        """
        if start == 0:
            return None
        made: list[Node] = []
        for node in self.nodes:
            if node.id in self.rows and not _overlaps(self.rows[node.id], start, self.num_rows):
                continue
            values: dict[int, Arg] = {}
            for sent in self.sent.get(node.id, ()):
                values[sent.id] = self._join(sent, start, made)
            node = self._numbered(node, start, self.num_rows)
            made.append(Copier(values=values).node(node) if values else node)
        return Graph(Block(made)) if made != list(self.nodes) else None

    def _join(self, sent: ChunkSave, start: int, made: list[Node]) -> Ref:
        """Put before a node what gives it all rows of a value."""
        if sent.part is not None and sent.part.start >= start:
            return Ref(sent.id)
        made.append(Const(sent.at, sent.key))
        if not _overlaps(sent.part, start, self.num_rows):
            return Ref(sent.at)
        made.append(Op(sent.joined, "torch.cat", [List([Ref(sent.at), Ref(sent.id)])]))
        return Ref(sent.joined)

    def _numbered(self, node: Node, start: int, stop: int) -> Node:
        """The node with the numbers that its rows have where `start` is the first."""
        part = self.indexed.get(node.id)
        if part is None or not isinstance(node, Op):
            return node
        first = max(part.start, start) - start
        rows: Arg = first if part.is_one else Slice(first, min(part.stop, stop) - start)
        key = node.args[1]
        key = Tuple([rows, *key.items[1:]]) if isinstance(key, Tuple) else rows
        return Op(node.id, node.name, [node.args[0], key, *node.args[2:]], node.kwargs, node.writes)


def _overlaps(part: RowRange | None, start: int, stop: int) -> bool:
    return part is None or (part.start < stop and start < part.stop)


def _needed(nodes: list[Node]) -> list[Node]:
    """Those that have an effect, and what they use."""
    used: set[int] = set()
    kept = []
    for node in reversed(nodes):
        if node.id in used or _has_effect(node) or (isinstance(node, Op) and is_inplace(node.name)):
            used.update(id for arg in operands(node) for id in refs(arg))
            kept.append(node)
    return kept[::-1]


def _has_effect(node: Node) -> bool:
    """Whether it shows outside of the program."""
    return isinstance(node, Write | Save) or (isinstance(node, Op) and node.writes is not None)
