"""Graphs for people: one line a node, blocks indented."""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_vllm.graph.nodes import (
    Arg,
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dots,
    Dtype,
    Export,
    Graph,
    Import,
    Iterations,
    List,
    Log,
    Loop,
    Node,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    Stop,
    Tuple,
    Write,
)


def render(graph: Graph) -> str:
    """The whole graph, one line a node."""
    return "\n".join(_block(graph.body, ""))


def render_arg(arg: Arg) -> str:
    """One argument as it would stand in Python, values as `%id`."""
    match arg:
        case Ref():
            return f"%{arg.id}"
        case Slice():
            parts = (arg.start, arg.stop) if arg.step is None else (arg.start, arg.stop, arg.step)
            return ":".join("" if part is None else render_arg(part) for part in parts)
        case List():
            return f"[{_args(arg.items)}]"
        case Tuple():
            return f"({_args(arg.items)})"
        case Dict():
            return "{" + ", ".join(f"{render_arg(key)}: {render_arg(value)}" for key, value in arg.items) + "}"
        case Dots():
            return "..."
        case Dtype():
            return arg.name
        case Special():
            return arg.text
        case _:
            return repr(arg)


def _args(args: list[Arg]) -> str:
    return ", ".join(render_arg(arg) for arg in args)


def _at(iteration: int | None) -> str:
    return "" if iteration is None else f" @{iteration}"


def _block(block: Block, indent: str) -> Iterator[str]:
    for node in block.nodes:
        yield from _node(node, indent)
    if block.yields:
        yield f"{indent}yield {_args(block.yields)}"


def _node(node: Node, indent: str) -> Iterator[str]:
    match node:
        case Cond():
            yield f"{indent}{_outs(node.outs)}cond {render_arg(node.test)}"
            yield from _block(node.then, indent + "  ")
            if node.orelse.nodes or node.orelse.yields:
                yield f"{indent}else"
                yield from _block(node.orelse, indent + "  ")
        case Loop():
            carried = ", ".join(
                f"%{id} = {render_arg(init)}" for id, init in zip(node.carried, node.inits, strict=True)
            )
            carrying = f" carrying {carried}" if carried else ""
            yield f"{indent}{_outs(node.outs)}loop %{node.item} in {render_arg(node.over)}{carrying}"
            yield from _block(node.body, indent + "  ")
        case Iterations():
            stop = "" if node.stop is None else node.stop
            step = "" if node.step == 1 else f":{node.step}"
            yield f"{indent}iterations %{node.index} in {node.start}:{stop}{step}"
            yield from _block(node.body, indent + "  ")
        case _:
            yield f"{indent}{_line(node)}"


def _outs(outs: list[int]) -> str:
    return ", ".join(f"%{id}" for id in outs) + " = " if outs else ""


def _line(node: Node) -> str:
    match node:
        case Read():
            return f"%{node.id} = read {node.site}{_at(node.iteration)}"
        case Write():
            return f"write {node.site}{_at(node.iteration)} = {render_arg(node.value)}"
        case Op():
            kwargs = [f"{key}={render_arg(value)}" for key, value in node.kwargs.items()]
            args = ", ".join([*(render_arg(arg) for arg in node.args), *kwargs])
            return f"%{node.id} = {node.name}({args})" + (f" writes {node.writes}" if node.writes else "")
        case Const():
            return f"%{node.id} = const {node.digest[:12]}"
        case Call():
            return f"%{node.id} = call {node.module}({_args(node.args)})"
        case Save():
            return f"save {node.name} = {render_arg(node.value)}"
        case Log():
            return f"log({_args(node.args)})"
        case Stop():
            return "stop"
        case Export():
            return f"export {node.key} = {render_arg(node.value)}"
        case Import():
            return f"%{node.id} = import {node.key}{_at(node.iteration)}"
        case _:
            raise AssertionError(type(node))
