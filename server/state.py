"""What the server's routes share: one `Interventions` an app, made when the engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from nnsight_vllm.frontend.served_engine import ServedEngine
    from nnsight_vllm.server.edited import EditedModels
    from nnsight_vllm.server.limits import Concurrent, Limits
    from nnsight_vllm.server.results import ResultStore
    from nnsight_vllm.server.tenants import Tenants
    from nnsight_vllm.server.tensors import TensorStore


@dataclass
class Interventions:
    """`base_names`: those of the served model, the first of which is what it calls itself."""

    engine: ServedEngine
    base_names: list[str]
    limits: Limits
    tenants: Tenants
    tensors: TensorStore
    results: ResultStore
    edited: EditedModels
    concurrent: Concurrent


def interventions_of(raw_request: Request) -> Interventions:
    """The app's."""
    found: Interventions = raw_request.app.state.interventions
    return found


def tenant_of(raw_request: Request) -> str:
    """Whose request it is; the empty name where the server has no keys."""
    return interventions_of(raw_request).tenants.of(raw_request)
