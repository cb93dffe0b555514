"""`nnsight` 0.8.1 on a machine without a GPU, as a peer to measure.

Its runner refuses vLLM's CPU build. A worker of vLLM's CPU kind that takes nnsight's runner in place of its own is enough
to run it; its eager engine, its language and its way of bringing values home are unchanged. It wants an environment of its own:

    python -m venv nnsight-venv
    nnsight-venv/bin/pip install --no-deps torch==2.13.0+cpu -r requirements/cpu.txt
    nnsight-venv/bin/pip install --no-deps nnsight==0.8.1 greenlet websocket-client zstandard
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _CPUWorker = Any
    _CPUModelRunner = Any
    _NNsightRunner = Any
    _NNsightWorker: Any = None
else:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as _CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker

    _NNsightRunner = import_module("nnsight.modeling.vllm.model_runners.GPUModelRunner").NNsightGPUModelRunner
    _NNsightWorker = import_module("nnsight.modeling.vllm.workers.GPUWorker").NNsightGPUWorker


class Runner(_NNsightRunner, _CPUModelRunner):  # type: ignore[misc]
    """nnsight's methods over the CPU runner's."""


class Worker(_CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with nnsight's runner and remote calls."""

    collect_nnsight = _NNsightWorker.collect_nnsight
    nnsight_request_count = _NNsightWorker.nnsight_request_count
    nnsight_register = _NNsightWorker.nnsight_register
    nnsight_clear_registered = _NNsightWorker.nnsight_clear_registered

    def init_device(self) -> None:
        import torch

        torch.accelerator.empty_cache = lambda: None
        super().init_device()
        self.model_runner.__class__ = Runner


def open_peer(checkpoint: str, arguments: dict[str, Any]) -> Any:
    """A running `nnsight` engine."""
    import torch

    torch.accelerator.empty_cache = lambda: None
    peer = import_module("nnsight.modeling.vllm").VLLM
    peer._WORKER_CLS = "nnsight_peer.Worker"
    return peer(checkpoint, dispatch=True, **arguments)


def patching_sweep(
    model: Any, clean: list[int], corrupted: list[int], answers: tuple[int, int], sampling: dict[str, Any]
) -> list[float]:
    """The sweep in its language; a block gives `(hidden, residual)`, whose sum is the residual stream."""
    right, wrong = answers
    with model.trace(clean, **sampling):
        states = []
        for layer in model.model.layers:
            hidden, residual = layer.output
            states.append((hidden + residual).clone())
        states.save()  # type: ignore[attr-defined]
    places = [(block, token) for block in range(len(states)) for token in range(len(corrupted))]
    rows = [states[block][token].clone() for block, token in places]
    return _patched(model, corrupted, places, rows, right, wrong, sampling)


def _patched(
    model: Any,
    corrupted: list[int],
    places: list[tuple[int, int]],
    rows: list[Any],
    right: int,
    wrong: int,
    sampling: dict[str, Any],
) -> list[float]:
    """All patched runs in one trace. Every request takes along the names of its block only."""
    with model.trace(**sampling) as tracer:
        differences: Any = [None] * len(places)
        differences.save()
        for number, ((block, token), row) in enumerate(zip(places, rows, strict=True)):
            with tracer.invoke(corrupted):
                hidden, residual = model.model.layers[block].output
                hidden[token] = row - residual[token]
                logits = model.logits[0]
                differences[number] = float(logits[right] - logits[wrong])
    return list(differences)
