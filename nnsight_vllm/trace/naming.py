"""What the user calls the values that an invoke saves: the names they are bound to when its block ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FrameType

from nnsight_vllm.trace.blocks import frames
from nnsight_vllm.trace.blocks.poison import Poison, is_poison
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import Recorder


def names_of_saves(recorder: Recorder, frame: FrameType) -> dict[str, list[str]]:
    """The names in the frame of what the recorder saved, by the saves' own: `h`, or `layers[3]` for an item of a list."""
    names = {**frames.global_names(frame), **frames.names(frame)}
    found: dict[str, list[str]] = {}
    _note(found, recorder, _values(names))
    if recorder.save_names - found.keys():
        _note(found, recorder, _items(names))
    return found


def _values(names: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The values by name, or what the branches left that may stand for one."""
    for name, value in names.items():
        if is_poison(value):
            assert isinstance(value, Poison)
            yield from ((name, one) for one in value.values)
        else:
            yield name, value


def _items(names: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in names.items():
        pairs: Iterable[tuple[object, object]] = ()
        if type(value) in {list, tuple}:
            pairs = enumerate(value)  # type: ignore[arg-type]
        elif type(value) is dict:
            pairs = value.items()
        yield from ((f"{name}[{key!r}]", item) for key, item in pairs if not is_poison(item))


def _note(found: dict[str, list[str]], recorder: Recorder, values: Iterable[tuple[str, object]]) -> None:
    for name, value in values:
        slot = value._slot if isinstance(value, Proxy) and value._recorder is recorder else None
        if slot is not None and name not in found.setdefault(slot, []):
            found[slot].append(name)
