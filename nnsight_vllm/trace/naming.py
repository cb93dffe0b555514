"""What the user calls the values that an invoke saves: the names they are bound to when its block ends."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

from nnsight_vllm.trace.blocks import frames
from nnsight_vllm.trace.blocks.poison import Poison, is_poison
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import Recorder


def names_of_saves(recorder: Recorder, frame: FrameType) -> dict[str, list[str]]:
    """The names in the frame of what the recorder saved, by the saves' own: `h`, or `layers[3]` for an item of a list."""
    names = {**frames.global_names(frame), **frames.names(frame)}
    found: dict[str, list[str]] = {}
    for name, value in names.items():
        for proxy in _proxies(value):
            _note(found, recorder, proxy, name)
    if recorder.save_names - found.keys():
        for name, value in names.items():
            for key, item in _items(value):
                if not is_poison(item) and isinstance(item, Proxy):
                    _note(found, recorder, item, f"{name}[{key!r}]")
    return found


def _proxies(value: object) -> Iterator[Proxy]:
    """The value, or what the branches left that may stand for it."""
    if is_poison(value):
        assert isinstance(value, Poison)
        yield from (one for one in value.values if isinstance(one, Proxy))
    elif isinstance(value, Proxy):
        yield value


def _items(value: object) -> Iterator[tuple[object, object]]:
    if type(value) in {list, tuple}:
        yield from enumerate(value)  # type: ignore[arg-type]
    elif type(value) is dict:
        yield from value.items()


def _note(found: dict[str, list[str]], recorder: Recorder, proxy: Proxy, name: str) -> None:
    if proxy._recorder is recorder and proxy._slot is not None and name not in found.setdefault(proxy._slot, []):
        found[proxy._slot].append(name)
