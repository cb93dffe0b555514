"""Compile every kernel for GPUs that aren't here, and say what it takes of one.

`python -m nnsight_vllm.kernels.ahead [page.md]` prints the table, or renews it in the page. What is compiled is the very
launch that `dispatch` would run, at H = 4096 and rank 16, with addresses that are multiples of 16 bytes. Needs no GPU and
runs nothing; not for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnsight_vllm.kernels.columns import COLUMNS
from nnsight_vllm.kernels.dispatch import launch
from nnsight_vllm.kernels.launch import OPTIONS, Launch

ARCHITECTURES = (80, 90)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WIDTH, RANK, ROWS, LINES = 4096, 16, 256, 32
BEGIN, END = "<!-- compiled -->\n", "<!-- /compiled -->\n"


@dataclass(frozen=True)
class Compiled:
    """`registers` a thread, `spilled` bytes a thread (stores and loads), `shared` bytes a program, `ptx` the assembly's text."""

    operation: str
    dtype: str
    architecture: int
    cubin_bytes: int
    registers: int
    spilled: int
    shared: int
    ptx: str


def compile_all() -> Iterator[Compiled]:
    """Each operation for each dtype (rows and vectors) and architecture."""
    for operation in COLUMNS:
        for dtype in DTYPES:
            for architecture in ARCHITECTURES:
                yield compile_one(operation, dtype, architecture)


def compile_one(
    operation: str, dtype: torch.dtype, architecture: int, width: int = WIDTH, rank: int = RANK
) -> Compiled:
    return _compile(operation, DTYPES[dtype], _example(operation, dtype, width, rank), architecture)


def table(compiled: list[Compiled]) -> str:
    """One Markdown line for each operation and dtype; all architectures side by side."""
    heads = [f"sm_{a} {what}" for a in ARCHITECTURES for what in ("registers", "spilled", "shared")]
    lines = [
        f"Triton {triton.__version__}",
        "",
        f"| operation | dtype | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    found = {(c.operation, c.dtype, c.architecture): c for c in compiled}
    for operation, dtype in dict.fromkeys((c.operation, c.dtype) for c in compiled):
        each = [found[operation, dtype, a] for a in ARCHITECTURES]
        cells = [str(number) for c in each for number in (c.registers, c.spilled, c.shared)]
        lines.append(f"| {operation} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def renew(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def _example(operation: str, dtype: torch.dtype, width: int, rank: int) -> Launch:
    def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    columns = {
        column.name: empty(LINES, *column.sizes(width, rank), dtype=dtype if column.shape else torch.float32)
        for column in COLUMNS[operation]
    }
    return launch(empty(ROWS, width, dtype=dtype), operation, empty(ROWS, dtype=torch.int32), columns)


def _compile(operation: str, dtype: str, described: Launch, architecture: int) -> Compiled:
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # what comes from the cache leaves no log
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(_source(described), target=GPUTarget("cuda", architecture, 32), options=dict(OPTIONS))
    return Compiled(
        operation,
        dtype,
        architecture,
        cubin_bytes=len(kernel.asm["cubin"]),
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spilled=_number(r"(\d+) bytes spill stores", log.getvalue())
        + _number(r"(\d+) bytes spill loads", log.getvalue()),
        shared=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
    )


def _source(described: Launch) -> ASTSource:
    """As Triton specializes a call: by type, by what is a multiple of 16, and by numbers that are 1."""
    arguments = dict(zip(described.kernel.arg_names, described.args, strict=False))
    constants = dict(described.constants) | {name: 1 for name, value in arguments.items() if _is_one(value)}
    signature = {name: f"*{_type(v.dtype)}" if isinstance(v, Tensor) else "i32" for name, v in arguments.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, arg in enumerate(described.args) if isinstance(arg, Tensor) or arg % 16 == 0]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(described.kernel, signature, constants, attributes)


def _is_one(value: Tensor | int) -> bool:
    return isinstance(value, int) and value == 1


def _type(dtype: torch.dtype) -> str:
    return "i32" if dtype == torch.int32 else DTYPES[dtype]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"expected {pattern!r} in what ptxas says; got {text!r}")
    return int(found[1])


def main() -> None:
    text = table(list(compile_all()))
    if len(sys.argv) == 1:
        print(text, end="")
        return
    page = Path(sys.argv[1])
    page.write_text(renew(page.read_text(), text))


if __name__ == "__main__":
    main()
