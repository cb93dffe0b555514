"""What the server's routes share: one `ServerState` an app, made when the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from nnsight_vllm.frontend.served_engine import ServedEngine
from nnsight_vllm.server.edited import EditedModels
from nnsight_vllm.server.limits import Concurrent, ServerLimits
from nnsight_vllm.server.results import ResultStore
from nnsight_vllm.server.tenants import Tenants
from nnsight_vllm.server.tensors import TensorStore


@dataclass
class ServerState:
    """`base_names`: those of the served model, the first of which is what it calls itself."""

    engine: ServedEngine
    base_names: list[str]
    limits: ServerLimits
    tenants: Tenants
    tensors: TensorStore
    results: ResultStore
    edited: EditedModels
    concurrent: Concurrent


def state_of(raw_request: Request) -> ServerState:
    """The app's."""
    found: ServerState = raw_request.app.state.interventions
    return found


def tenant_of(raw_request: Request) -> str:
    """Whose request it is; the empty name where the server has no keys."""
    return state_of(raw_request).tenants.of(raw_request)
