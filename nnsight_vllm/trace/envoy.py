"""A module of the model, as the user holds it: `model.model.layers[5].mlp`.

Outside of a trace an envoy only knows its place in the tree. Inside, `.output` and `.input` are the module's sites at
the current iteration, and calling it applies the module to a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight_vllm.errors import RefusedError, UnknownModuleError
from nnsight_vllm.graph.catalogue import Port, SiteInfo
from nnsight_vllm.trace.iterations import IterationBlock
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorder import current
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.tree import Tree


class Envoy:
    """One module of the tree."""

    def __init__(self, tree: Tree, path: str) -> None:
        self.__dict__.update(_known_tree=tree, _path=path)

    @property
    def _tree(self) -> Tree:
        tree: Tree = self.__dict__["_known_tree"]
        return tree

    @property
    def path(self) -> str:
        """The module's path, such as `model.layers.5.mlp`."""
        return str(self.__dict__["_path"])

    # -- the tree ----------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Envoy:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._child(name)

    def _child(self, name: str) -> Envoy:
        path = f"{self.path}.{name}" if self.path else name
        self._tree.module(path)
        return Envoy(self._tree, path)

    def __getitem__(self, index: int | slice) -> Any:
        names = [name for name in self._tree.children(self.path) if name.isdigit()]
        if not names:
            raise UnknownModuleError(f"{self.path} isn't a list of modules; {user_line()}")
        if isinstance(index, slice):
            return [self._child(name) for name in names[index]]
        if not hasattr(type(index), "__index__"):
            raise UnknownModuleError(f"{self.path} is indexed with a number or a slice, got {index!r}; {user_line()}")
        if not -len(names) <= index < len(names):
            raise UnknownModuleError(f"{self.path} has {len(names)} modules, no number {index}; {user_line()}")
        return self._child(names[index])

    def __len__(self) -> int:
        return len(self._tree.children(self.path))

    def __iter__(self) -> Iterator[Envoy]:
        return iter([self._child(name) for name in self._tree.children(self.path)])

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._tree.children(self.path)]

    def __repr__(self) -> str:
        kind = self._tree.module(self.path).kind
        return "\n".join(self._tree._render(self.path, f"({self.path}): {kind}" if self.path else kind, 0))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Envoy) and other.path == self.path and other._tree is self._tree

    def __hash__(self) -> int:
        return hash(self.path)

    # -- sites -------------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returns: a tensor `[tokens, ...]`, or for blocks and attention a tuple of it."""
        return self._read("output")

    @output.setter
    def output(self, value: object) -> None:
        self._write("output", value)

    @property
    def input(self) -> Any:
        """The first argument of the module: a tensor `[tokens, ...]`."""
        return self._read("input")

    @input.setter
    def input(self, value: object) -> None:
        self._write("input", value)

    @property
    def inputs(self) -> Any:
        """`((input,), {})`."""
        place = self._read("input")
        site = self._tree.site(self.path, "input")
        return PlaceTuple((PlaceTuple((place,), site), {}), site)

    @inputs.setter
    def inputs(self, value: object) -> None:
        match value:
            case ((argument,), {}) if not value[1]:
                self._write("input", argument)
            case _:
                raise RefusedError(f"{self.path}.inputs is ((input,), {{}}); {user_line()}")

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)
        else:
            raise RefusedError(f"only .output, .input and .inputs of a module can be set, not .{name}; {user_line()}")

    def _read(self, port: Port) -> Any:
        site = self._tree.site(self.path, port)
        place = current(f"{self.path}.{port}").places.read(site)
        return PlaceTuple((place,), site) if port == "output" and site.structure == "tuple" else place

    def _write(self, port: Port, value: object) -> None:
        site = self._tree.site(self.path, port)
        if port == "output" and site.structure == "tuple":
            value = _only_item(site, value)
        current(f"{self.path}.{port}").places.write(site, value)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Apply the module to a value, ad hoc: its sites don't fire, the value isn't modified."""
        if len(args) != 1 or kwargs:
            raise RefusedError(f"{self.path or 'the model'} is called with one value; {user_line()}")
        return current(f"{self.path}(...)").call(self.path, args[0])

    def next(self) -> Envoy:
        """What follows at this module means its next iteration. Returns the module."""
        current(f"{self.path}.next()").places.bump(self.path)
        return self

    def all(self) -> IterationBlock:
        """A block that runs at every iteration; inside, only this module and those below it may be touched."""
        return IterationBlock(slice(None), self.path)


class PlaceTuple(tuple[Any, ...]):
    """The tuple that a module returns or takes. Its items are places; setting an item sets the site."""

    site: SiteInfo

    def __new__(cls, items: tuple[Any, ...], site: SiteInfo) -> PlaceTuple:
        made = super().__new__(cls, items)
        made.site = site
        return made

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise RefusedError(f"{self.site.name}[{index}] isn't available: {_missing(self.site)}; {user_line()}")
        return super().__getitem__(index)

    def __setitem__(self, index: object, value: object) -> None:
        if index not in (0, -1) or not isinstance(self[0], Proxy):
            raise RefusedError(f"{self.site.name} is a tuple; set {self.site.name}[0] or [0][:]; {user_line()}")
        current(self.site.name).places.write(self.site, value)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __add__(self, other: object) -> tuple[Any, ...]:
        if not isinstance(other, tuple):
            self._refuse(" + ...")
        return tuple(self) + other

    def __mul__(self, other: object) -> NoReturn:
        self._refuse(" * ...")

    __rmul__ = __mul__

    def _refuse(self, use: str) -> NoReturn:
        item = "[0]" if isinstance(super().__getitem__(0), Proxy) else "[0][0]"
        name = self.site.path + (".inputs" if item == "[0][0]" else f".{self.site.port}")
        raise RefusedError(f"{name} is a tuple, its tensor is {name}{item}: write {name}{item}{use}; {user_line()}")

    def save(self) -> Proxy:
        """Save the tuple with its items as they are now."""
        recorder = current(self.site.name)
        return recorder.op("py.tuple", tuple, (list(_plain(self)),), {}).save()

    def stop(self) -> None:
        """End the request here."""
        current(self.site.name).stop()


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, tuple) else value


def _only_item(site: SiteInfo, value: object) -> object:
    if isinstance(value, tuple | list) and len(value) == 1:
        return value[0]
    raise RefusedError(f"{site.name} is a tuple of one tensor; assign (value,) or set [0]; {user_line()}")


def _missing(site: SiteInfo) -> str:
    if site.path.endswith(("attn", "attention")):
        return "the engine's attention computes no probabilities"
    return "the engine returns one tensor here"
