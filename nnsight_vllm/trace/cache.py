"""`tracer.cache()`: the values of all sites, or of some, in every iteration of a request.

They are collected by a graph of their own, which runs behind all others at each site, so it sees what they made of it.
After the run a `Cache` is a mapping of module paths; it can be walked like the model, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nnsight_vllm.errors import RefusedError, UnknownModuleError, ValueNotSetError
from nnsight_vllm.graph.catalogue import Port, SiteInfo
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Block, Graph, Iterations, Node, Op, Read, Ref, Save
from nnsight_vllm.trace.envoy import Envoy
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.recorder import Recorder
    from nnsight_vllm.trace.tree import Tree


def cached_sites(tree: Tree, modules: object, include_inputs: bool) -> list[SiteInfo]:
    """The sites of these modules, or of all. Raises for a module that hasn't what is asked for."""
    ports: tuple[Port, ...] = ("input", "output") if include_inputs else ("output",)
    if modules is None:
        return [site for site in tree.catalogue.sites if site.port in ports]
    items = modules if isinstance(modules, list | tuple | set) else [modules]
    return [tree.site(_path_of(item), port) for item in items for port in ports if _has(tree, _path_of(item), port)]


def _has(tree: Tree, path: str, port: Port) -> bool:
    """Whether to ask for this port: samples and logits, for one, have no input to be had."""
    return port == "output" or (path, port) in tree.sites or tree.module(path).refusals.get(port) is not None


def _path_of(module: object) -> str:
    if isinstance(module, Envoy):
        return module.path
    if isinstance(module, str):
        return module
    raise RefusedError(f"a cache takes modules or their paths, got {module!r:.80}; {user_line()}")


def slot_of(site: str) -> str:
    """The name under which a site's values come home."""
    return f"cache {site}"


@lru_cache(maxsize=64)
def collecting_graph(sites: tuple[str, ...]) -> bytes:
    """Each site's values appended to a list of its own; `sites` in firing order."""
    lists: list[Node] = []
    body: list[Node] = []
    for number, site in enumerate(sites):
        kept, value = Ref(2 + 4 * number), Ref(4 + 4 * number)
        lists += [Op(kept.id, "py.list"), Save(kept.id + 1, slot_of(site), kept)]
        body += [Read(value.id, site, None), Op(value.id + 1, "py.append", [kept, value])]
    return encode(Graph(Block([*lists, Iterations(0, 0, None, 1, 1, Block(body))])))


class Cache(Mapping[str, "Cache"]):
    """Values by module path. Of one module: `.output`, and if asked for `.input` and `.inputs`, lists with a value an iteration.

    Each value is what the module's `.output` is in a trace: a tensor, or a tuple of it. With several samples each list
    is one of the samples' lists.
    """

    def __init__(self, recorder: Recorder, sites: list[SiteInfo], path: str = "") -> None:
        self._recorder = recorder
        self._sites = sites
        self._path = path
        self._line = user_line()

    def __getitem__(self, key: Any) -> Cache:
        name = key.path if isinstance(key, Envoy) else str(key)
        return self._at(f"{self._path}.{name}" if self._path else name)

    def __getattr__(self, name: str) -> Cache:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        start = f"{self._path}." if self._path else ""
        return iter(dict.fromkeys(s.path[len(start) :] for s in self._sites if s.path.startswith(start)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return (key.path if isinstance(key, Envoy) else key) in list(iter(self))

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except UnknownModuleError:
            return default

    def __repr__(self) -> str:
        return f"<cache of {len(self)} modules{f' in {self._path}' if self._path else ''}>"

    @property
    def output(self) -> list[Any]:
        """The module's output in each iteration."""
        site = self._site("output")
        return _wrapped(self._values(site), self._depth, lambda v: (v,) if site.structure == "tuple" else v)

    @property
    def input(self) -> list[Any]:
        """The module's input in each iteration."""
        return self._values(self._site("input"))

    @property
    def inputs(self) -> list[Any]:
        """`((input,), {})` for each iteration."""
        return _wrapped(self.input, self._depth, lambda value: ((value,), {}))

    @property
    def _depth(self) -> int:
        return 2 if self._recorder.num_samples > 1 else 1

    def _at(self, path: str) -> Cache:
        if not any(site.path == path or site.path.startswith(f"{path}.") for site in self._sites):
            self._recorder.tree.module(path)  # no such module at all
            raise UnknownModuleError(f"{path} isn't in the cache of {self._line}; {user_line()}")
        return Cache(self._recorder, self._sites, path)

    def _site(self, port: Port) -> SiteInfo:
        for site in self._sites:
            if (site.path, site.port) == (self._path, port):
                return site
        hint = "; ask for cache(include_inputs=True)" if port == "input" else ""
        raise RefusedError(f"{self._path or 'the model'}.{port} isn't in the cache{hint}; {user_line()}")

    def _values(self, site: SiteInfo) -> list[Any]:
        if self._recorder.state in {"recording", "closed"}:
            raise ValueNotSetError(
                f"a cache has its values when the block is over, and not if it was only scanned; {user_line()}"
            )
        values = self._recorder.values.get(slot_of(site.name))
        if not isinstance(values, list):
            raise ValueNotSetError(f"{site.name} was never computed: the request failed before; {user_line()}")
        return values


def _wrapped(values: list[Any], depth: int, wrap: Any) -> list[Any]:
    return [_wrapped(value or [], depth - 1, wrap) if depth > 1 else wrap(value) for value in values]
