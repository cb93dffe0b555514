"""The frequent edits by Triton's kernels, in a process of its own whose Triton is the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PROGRAM = """
import json, sys
import torch
import nnsight_vllm as nv
from nnsight_vllm import edits

def main():
    states, results = [], []
    with nv.VLLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, seed=0) as model:
        width = model.llm.llm_engine.model_config.get_hidden_size()
        vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        with model.trace(temperature=0.0, max_tokens=4, ignore_eos=True) as tracer:
            for i, vector in enumerate(vectors):
                with tracer.invoke([1, 5, 9, 40][: i + 2]):
                    saved = nv.list().save()
                    with tracer.all():
                        h = model.model.layers[0].output[0]
                        h += vector
                        h *= 0.5 + i
                        model.model.layers[1].mlp.output[:] = vector
                        stream = model.model.layers[1].output[0]
                        stream[:] -= vector
                        edits.project_out(stream, vector)
                        edits.clamp(stream, vectors[0], low=-1.0, high=1.0 + i)
                        saved.append(stream[-1])
                    states.append(saved)
                    results.append(tracer.result.save())
        stats = model.stats()
    tokens = [list(result.token_ids) for result in results]
    states = [torch.stack(list(saved)).tolist() for saved in states]
    print(json.dumps({"tokens": tokens, "states": states, "one_by_one": stats.one_by_one, "batched": stats.batched}))

if __name__ == "__main__":
    main()
"""


def test_an_engine_gives_the_same_by_the_kernels(tiny_checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    reference, triton = (_run(tmp_path, tiny_checkpoint("llama"), backend) for backend in ("reference", "triton"))
    states = [torch.tensor(run.pop("states")) for run in (reference, triton)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)  # dot products add up in another order
    assert triton == reference
    assert triton["batched"] and not triton["one_by_one"]


def _run(folder: Path, checkpoint: str, backend: str) -> dict[str, object]:
    # In one process every request is there before the first step: the steps of the two runs hold the same requests.
    settings = {"NNSIGHT_VLLM_KERNELS": backend, "TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {**os.environ, **settings}
    command = [sys.executable, str(folder / "program.py"), checkpoint]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        pytest.fail(run.stderr[-3000:])
    found: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return found
