"""What a program is made of: flat instructions with jumps, one kind a class.

A request's place in a program is one index, so requests of like structure can be grouped by (program, index). `At` is
the only instruction that waits. `free` names the values that are dead once the instruction is done.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnsight_vllm.graph.nodes import Arg, Block, Call, Const, Export, Graph, Import, Log, Op, Read, Save, Write
from nnsight_vllm.graph.text import render, render_arg

Plain = Read | Write | Op | Const | Call | Save | Log | Export | Import


@dataclass(frozen=True)
class At:
    """Wait until the model is at `site` in `iteration`. No site: until the iteration begins. None: the block's own."""

    site: str | None
    iteration: int | None

    def __str__(self) -> str:
        where = "the iteration" if self.site is None else self.site
        return f"at {where}" + ("" if self.iteration is None else f" @{self.iteration}")


@dataclass(frozen=True)
class Run:
    """Run one node that neither waits nor jumps."""

    node: Plain
    free: tuple[int, ...] = ()

    def __str__(self) -> str:
        return render(Graph(Block([self.node]))) + _free(self.free)


@dataclass(frozen=True)
class Halt:
    """End the request; `node` is the stop's id."""

    node: int

    def __str__(self) -> str:
        return "stop"


@dataclass(frozen=True)
class Branch:
    """Go on if `test` holds, else jump to `target`."""

    node: int
    test: Arg
    target: int

    def __str__(self) -> str:
        return f"unless {render_arg(self.test)} jump {self.target}"


@dataclass(frozen=True)
class Jump:
    target: int

    def __str__(self) -> str:
        return f"jump {self.target}"


@dataclass(frozen=True)
class Move:
    """Set `ids[i]` to `values[i]`, all at once."""

    ids: tuple[int, ...]
    values: tuple[Arg, ...]
    free: tuple[int, ...] = ()

    def __str__(self) -> str:
        left, right = ", ".join(f"%{id}" for id in self.ids), ", ".join(render_arg(value) for value in self.values)
        return (f"{left} = {right}" if self.ids else "pass") + _free(self.free)


@dataclass(frozen=True)
class LoopBegin:
    """Start a loop over the items of `over`."""

    node: int
    over: Arg

    def __str__(self) -> str:
        return f"loop over {render_arg(self.over)}"


@dataclass(frozen=True)
class LoopNext:
    """The innermost loop's next item; after the last one leave the loop and jump to `exit`."""

    item: int
    exit: int

    def __str__(self) -> str:
        return f"%{self.item} = next item or jump {self.exit}"


@dataclass(frozen=True)
class IterBegin:
    """Start a block that runs at iterations `start, start + step, ...` below `stop`."""

    start: Arg
    stop: Arg
    step: Arg

    def __str__(self) -> str:
        stop = "" if self.stop is None else render_arg(self.stop)
        return f"iterations {render_arg(self.start)}:{stop}:{render_arg(self.step)}"


@dataclass(frozen=True)
class IterNext:
    """The block's next iteration; after the last one leave the block and jump to `exit`."""

    index: int
    exit: int

    def __str__(self) -> str:
        return f"%{self.index} = next iteration or jump {self.exit}"


@dataclass(frozen=True)
class Free:
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return "free " + " ".join(f"%{id}" for id in self.ids)


@dataclass(frozen=True)
class End:
    def __str__(self) -> str:
        return "end"


Instruction = At | Run | Halt | Branch | Jump | Move | LoopBegin | LoopNext | IterBegin | IterNext | Free | End


def _free(ids: tuple[int, ...]) -> str:
    return "  | " + str(Free(ids)) if ids else ""
