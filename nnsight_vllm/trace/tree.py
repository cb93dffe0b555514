"""The module tree as the client knows it: an index over the engine's catalogue, with pointed errors."""

from __future__ import annotations

import difflib

from nnsight_vllm.errors import RefusedError, UnknownModuleError
from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo, Port, SiteInfo
from nnsight_vllm.trace.source import user_line


class Tree:
    """Modules by path and by parent, sites by module and port."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.modules: dict[str, ModuleInfo] = {module.path: module for module in catalogue.modules}
        for site in catalogue.sites:  # logits and samples are sites without a module
            self.modules.setdefault(
                site.path, ModuleInfo(site.path, site.path.capitalize(), refuse_call="it isn't a module")
            )
        self.sites: dict[tuple[str, str], SiteInfo] = {(site.path, site.port): site for site in catalogue.sites}
        self._by_order = {site.order: site for site in catalogue.sites}
        self._children: dict[str, list[str]] = {}
        for path in self.modules:
            if path:
                parent, _, name = path.rpartition(".")
                self._children.setdefault(parent, []).append(name)

    def children(self, path: str) -> list[str]:
        """Names of the direct children, in the model's order."""
        return self._children.get(path, [])

    def site_at(self, order: int) -> SiteInfo | None:
        return self._by_order.get(order)

    def module(self, path: str) -> ModuleInfo:
        """The module at `path`. Raises `UnknownModuleError` with the nearest names."""
        if not isinstance(path, str):
            raise UnknownModuleError(f"a module's path is text, such as 'model.layers.0', got {path!r}; {user_line()}")
        known = self.modules.get(path)
        if known is not None:
            return known
        parent, _, name = path.rpartition(".")
        while parent and parent not in self.modules:
            parent, _, name = parent.rpartition(".")
        raise UnknownModuleError(
            f"{parent or 'the model'} has no module {name!r}{self._near(parent, path)}; {user_line()}"
        )

    def site(self, path: str, port: Port) -> SiteInfo:
        """The site at a module's port. Raises with the reason if there is none."""
        known = self.sites.get((path, port))
        if known is not None:
            return known
        module = self.module(path)
        reason = module.refusals.get(port) or "the module doesn't fire on its own"
        raise RefusedError(
            f"{f'{path}.' if path else 'the model, .'}{port} can't be read or set: {reason}; {user_line()}"
        )

    def _near(self, parent: str, path: str) -> str:
        name = path.removeprefix(parent + ".").split(".")[0] if parent else path.split(".")[0]
        children = self.children(parent)
        near = difflib.get_close_matches(name, children, n=3, cutoff=0.4) or children[:8]
        return f" (nearest: {', '.join(near)})" if near else ""

    def render(self) -> str:
        """The tree as text, one module a line."""
        return "\n".join(self._render("", self.modules[""].kind if "" in self.modules else "Model", 0))

    def _render(self, path: str, label: str, depth: int) -> list[str]:
        children = self.children(path)
        detail = self.modules[path].detail if path in self.modules else ""
        if not children:
            return [f"{'  ' * depth}{label}({detail})"]
        lines = [f"{'  ' * depth}{label}("]
        for first, last, name in self._grouped(path, children):
            child = f"{path}.{name}" if path else name
            kind = self.modules[child].kind
            number = f"({first})" if first == last else f"({first}-{last}): {int(last) - int(first) + 1} x"
            text = f"{number}: {kind}" if first == last else f"{number} {kind}"
            lines += self._render(child, text, depth + 1)
        return [*lines, f"{'  ' * depth})"]

    def _grouped(self, path: str, children: list[str]) -> list[tuple[str, str, str]]:
        """Children as (first, last, representative): equal neighbours of a list are told once."""
        groups: list[tuple[str, str, str]] = []
        shape_before: list[str] = []
        for name in children:
            child = f"{path}.{name}" if path else name
            shape = self._render(child, self.modules[child].kind, 0)
            if groups and name.isdigit() and groups[-1][1].isdigit() and shape == shape_before:
                groups[-1] = (groups[-1][0], name, groups[-1][2])
            else:
                groups.append((name, name, name))
            shape_before = shape
        return groups
