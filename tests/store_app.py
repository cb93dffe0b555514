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
from nnsight_vllm.server import edited_routes, result_routes, tensor_routes
from nnsight_vllm.server.edited import EditedModels
from nnsight_vllm.server.errors import Refused, answer_refused
from nnsight_vllm.server.limits import Concurrent, ServerLimits
from nnsight_vllm.server.results import ResultStore
from nnsight_vllm.server.state import ServerState
from nnsight_vllm.server.tensors import TensorStore
from nnsight_vllm.trace.tree import Tree


class Who:
    """In the place of the tenants with keys."""

    def of(self, raw_request: Request) -> str:
        return raw_request.headers.get("who", "")


def interventions(limits: ServerLimits | None = None, directory: Path | None = None) -> ServerState:
    limits = limits or ServerLimits()
    return ServerState(
        engine=SimpleNamespace(tree=Tree(catalogue())),  # type: ignore[arg-type]
        base_names=["toy"],
        limits=limits,
        tenants=Who(),  # type: ignore[arg-type]
        tensors=TensorStore(limits.stored_bytes),
        results=ResultStore(limits.results_kept, limits.result_bytes, limits.result_seconds),
        edited=EditedModels(directory),
        concurrent=Concurrent(limits.concurrent_requests),
    )


def client_of(state: ServerState) -> TestClient:
    app = FastAPI()
    app.state.interventions = state
    app.exception_handler(Refused)(answer_refused)
    for module in (tensor_routes, result_routes, edited_routes):
        app.include_router(module.router)
    return TestClient(app)


def packed(tensor: Tensor, name: str = "tensor") -> tuple[str, bytes]:
    data = save({name: tensor})
    return digest(data), data
