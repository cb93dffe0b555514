"""vLLM's `endpoint_plugins` entry point: our routes on vLLM's app, and what they need of the engine."""

from __future__ import annotations

import asyncio
import functools
import threading
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.routing import APIRoute
from starlette.datastructures import State

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.frontend.served_engine import ServedEngine
from nnsight_vllm.server import edited_routes, metrics, openai, result_routes, tensor_routes, traces
from nnsight_vllm.server.edited import EditedModels
from nnsight_vllm.server.errors import Refused, answer_refused
from nnsight_vllm.server.limits import Concurrent, ServerLimits
from nnsight_vllm.server.openai_run import generate_with_graphs
from nnsight_vllm.server.results import ResultStore
from nnsight_vllm.server.state import ServerState
from nnsight_vllm.server.tenants import Tenants
from nnsight_vllm.server.tensors import TensorStore
from nnsight_vllm.trace.source import hide_lines

NAME = "nnsight_vllm"


async def _hide_lines() -> None:
    hide_lines()


def _first(route: APIRoute, call: Callable[..., Awaitable[None]]) -> None:
    """Have a route of vLLM's call this before it answers."""
    found = get_parameterless_sub_dependant(depends=Depends(call), path=route.path_format)
    route.dependant.dependencies.insert(0, found)


class Plugin:
    """What vLLM makes of the entry point."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes; those of vLLM's with the same path and method give way."""
        if not getattr(app.state.args, "serves_interventions", False):
            raise EngineSettingError(
                "interventions are served by `nnsight-vllm serve`, which takes what `vllm serve` takes"
            )
        refresh = metrics.StatsRefresh(lambda: app.state.interventions.engine.stats())
        for route in app.routes:
            if isinstance(route, APIRoute) and "POST" in route.methods:
                _first(route, openai.refuse_field)
            elif isinstance(route, APIRoute) and route.path == "/metrics":
                _first(route, refresh)
        for module in (openai, tensor_routes, result_routes, edited_routes, traces):
            app.include_router(module.router, dependencies=[Depends(_hide_lines)])
        app.exception_handler(Refused)(answer_refused)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Find out what the engine has, and stand between vLLM's handlers and it."""
        limits = ServerLimits.from_args(args)
        tenants: Tenants = args.intervention_tenants
        loop, thread = asyncio.get_running_loop(), threading.current_thread()
        engine = await asyncio.to_thread(ServedEngine, engine_client, loop, thread, limits.stored_bytes_in_all)
        engine_client.generate = functools.partial(generate_with_graphs, engine_client.generate)
        state.interventions = ServerState(
            engine=engine,
            base_names=list(args.served_model_name or [args.model]),
            limits=limits,
            tenants=tenants,
            tensors=TensorStore(limits.stored_bytes),
            results=ResultStore(limits.results_kept, limits.result_bytes, limits.result_seconds),
            edited=EditedModels(args.edits_dir),
            concurrent=Concurrent(limits.concurrent_requests),
        )
