"""The names of sites in the short form."""

from __future__ import annotations

from typing import cast

from nnsight_vllm.errors import NNsightError
from nnsight_vllm.graph.catalogue import Port, SiteInfo
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.names import nearest
from nnsight_vllm.trace.tree import Tree

_DRAWN = ("logits", "samples")
_ITEM = "[0]"


def find_site(tree: Tree, name: str, param: str) -> SiteInfo:
    """The site of `<module>.output[0]`, `<module>.output`, `<module>.input`, `logits` or `samples`. Raises `Refused`."""
    path, _, port = name.removesuffix(_ITEM).rpartition(".")
    if name in _DRAWN:
        path, port = name, "output"
    if port not in ("input", "output") or (port == "input" and name.endswith(_ITEM)):
        message = f"a site is `<module>.output[0]`, `<module>.output`, `<module>.input`, `logits` or `samples`; got {name[:80]!r}"
        raise Refused(message + _near(tree, name), param)
    site = tree.sites.get((path, cast(Port, port)))
    if site is None:
        raise Refused(_reason(tree, path, cast(Port, port)) + _near(tree, name), param)
    if name.endswith(_ITEM) and site.structure != "tuple":
        raise Refused(f"{site.name} is a tensor and no tuple: leave out the {_ITEM}", param)
    return site


def site_name(site: SiteInfo) -> str:
    """A site's name as it is written in the short form."""
    if site.path in _DRAWN:
        return site.path
    return f"{site.name}{_ITEM}" if site.port == "output" and site.structure == "tuple" else site.name


def _reason(tree: Tree, path: str, port: Port) -> str:
    """Why there is no such site."""
    try:
        tree.site(path, port)
    except NNsightError as error:
        return str(error).removesuffix("; in the request").partition(" (nearest: ")[0]
    raise AssertionError("the site exists")


def _near(tree: Tree, name: str) -> str:
    return nearest(name, map(site_name, tree.catalogue.sites), 200)
