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
    _CPUWorker = _CPUModelRunner = _NNsightRunner = Any
    _NNsightWorker: Any = None
else:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as _CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker

    _NNsightRunner = import_module("nnsight.modeling.vllm.model_runners.GPUModelRunner").NNsightGPUModelRunner
    _NNsightWorker = import_module("nnsight.modeling.vllm.workers.GPUWorker").NNsightGPUWorker


class Runner(_NNsightRunner, _CPUModelRunner):
    """nnsight's methods over the CPU runner's."""


class Worker(_CPUWorker):
    """vLLM's CPU worker with nnsight's runner and remote calls."""

    collect_nnsight = _NNsightWorker.collect_nnsight if _NNsightWorker else None
    nnsight_request_count = _NNsightWorker.nnsight_request_count if _NNsightWorker else None
    nnsight_register = _NNsightWorker.nnsight_register if _NNsightWorker else None
    nnsight_clear_registered = _NNsightWorker.nnsight_clear_registered if _NNsightWorker else None

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
