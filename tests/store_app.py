"""The routes of the server's stores without an engine: the tenant is what the header `who` says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from fake_model import catalogue
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from safetensors.torch import save
from torch import Tensor

from nnsight_vllm.graph.codec import digest
from nnsight_vllm.server import edited, results, tensors
from nnsight_vllm.server.edited import EditedModels
from nnsight_vllm.server.errors import Refused, answer_refused
from nnsight_vllm.server.limits import Concurrent, Limits
from nnsight_vllm.server.results import ResultStore
from nnsight_vllm.server.state import Interventions
from nnsight_vllm.server.tensors import TensorStore
from nnsight_vllm.trace.tree import Tree


class Who:
    """In the place of the tenants with keys."""

    def of(self, raw_request: Request) -> str:
        return raw_request.headers.get("who", "")


def interventions(limits: Limits | None = None, directory: Path | None = None) -> Interventions:
    limits = limits or Limits()
    return Interventions(
        engine=SimpleNamespace(tree=Tree(catalogue())),  # type: ignore[arg-type]
        base_names=["toy"],
        limits=limits,
        tenants=Who(),  # type: ignore[arg-type]
        tensors=TensorStore(limits.stored_bytes),
        results=ResultStore(limits.results_kept, limits.result_bytes, limits.result_seconds),
        edited=EditedModels(directory),
        concurrent=Concurrent(limits.concurrent_requests),
    )


def client_of(state: Interventions) -> TestClient:
    app = FastAPI()
    app.state.interventions = state
    app.exception_handler(Refused)(answer_refused)
    for module in (tensors, results, edited):
        app.include_router(module.router)
    return TestClient(app)


def packed(tensor: Tensor, name: str = "tensor") -> tuple[str, bytes]:
    data = save({name: tensor})
    return digest(data), data
