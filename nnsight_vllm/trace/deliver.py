"""After the run: names of the user's frame that are bound to saved proxies get the values themselves."""

from __future__ import annotations

from types import FrameType

from nnsight_vllm.trace.blocks import frames
from nnsight_vllm.trace.blocks.poison import Poison
from nnsight_vllm.trace.proxy import Proxy


def deliver(frame: FrameType) -> None:
    """Put saved values in the place of their proxies. What was not saved keeps its proxy, which says so when used."""
    found = {name: _settled(value) for name, value in _names(frame).items()}
    changed = {name: value.value for name, value in found.items() if isinstance(value, Proxy) and value._has_value}
    if changed:
        frames.write_names(frame, changed)


def _names(frame: FrameType) -> dict[str, object]:
    return {**frames.global_names(frame), **frames.names(frame)}


def _settled(value: object) -> object:
    """A name bound in one branch only: the proxy of the branch that ran, if it was saved there."""
    if not isinstance(value, Poison):
        return value
    values = [proxy for proxy in value.values if isinstance(proxy, Proxy) and proxy._is_done and proxy._has_value]
    return values[0] if len(values) == 1 else None
