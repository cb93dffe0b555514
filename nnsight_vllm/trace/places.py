"""Sites while recording: where the program stands in the model, and which proxies are places.

A site's value at one iteration is a *root*. Proxies whose meta tensors share a root's storage are places: in-place
operations on them change the site, as long as the program stands there. Once the cursor moves on, the root is only a
value, and changing it in place is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnsight_vllm.errors import OutOfOrderError, RecordError, RefusedError
from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.graph.nodes import Read, Write
from nnsight_vllm.graph.order import OrderCursor, ProgramPoint
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.encode import resolve
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recording import Recording, RunValue, values_in
from nnsight_vllm.trace.scope import IterationsHandle, Root, Scope
from nnsight_vllm.trace.source import user_line
from nnsight_vllm.trace.tree import Tree

# These see the row whose token is drawn next, whatever the number of rows in the step.
SINGLE_ROW = ("lm_head.", "logits.", "samples.")


@dataclass(eq=False)
class Draw:
    """Where an iteration's token was drawn in the program: reads of its logits go before."""

    at: ProgramPoint
    block: int | None
    scope: Scope
    index: int
    logits: Root | None


class Places:
    """The sites of one recorder."""

    def __init__(self, recorder: Recording, tree: Tree, rows: int | None, max_tokens: int | None) -> None:
        self.cursor = OrderCursor()
        self.block: IterationsHandle | None = None
        self.max_tokens = max_tokens
        self._recorder = recorder
        self._tree = tree
        self._is_known = rows is not None
        self._rows = tree.catalogue.max_model_len if rows is None else rows
        self._next: dict[str, int] = {}
        self._by_storage: dict[int, Root] = {}
        self._here: dict[str, Root] = {}
        self._draw: Draw | None = None

    # -- what envoys ask for -------------------------------------------------------------------------------------------

    def read(self, site: SiteInfo) -> Proxy:
        """The site's value at the current iteration, as a place."""
        if site.name == "logits.output" and self._is_drawn():
            return self._drawn_logits(site)
        self._go(site)
        root = self._here.get(site.name)
        if root is None or root.is_stale:
            root = self._new_root(site)
        if root.node is None or root.scope is None or not root.scope.is_visible():
            root.node, root.scope = self._recorder.new_id(), self._recorder.scope
            self._recorder.add(Read(root.node, site.name, self._iteration()))
        return Proxy(self._recorder, root.node, root.values, root.scope)

    def write(self, site: SiteInfo, value: object) -> None:
        """Assign the site by value."""
        value = self._recorder.localized(value)
        if isinstance(value, RunValue) and self._is_whole(site, value):
            return  # `x.output += v` ends with assigning the place to itself
        if site.refuse_write:
            raise RefusedError(f"{site.name} can't be assigned: {site.refuse_write}; {user_line()}")
        if site.name == "logits.output" and self._is_drawn():
            raise OutOfOrderError(f"logits can't be changed after the iteration's token was drawn; {user_line()}")
        self._go(site)
        encoded = self._recorder.encode(value)
        before, root = self._here.get(site.name), self._new_root(site)
        self._check_fits(site, value, root)
        if before is not None:
            before.is_stale = True
        self._recorder.add(Write(self._recorder.new_id(), site.name, encoded, self._iteration()))

    def written_by(self, proxy: RunValue) -> str | None:
        """The site that an in-place operation on `proxy` may change, None for a private value. Raises if it has passed."""
        names = {self._writable_now(root) for root in self.possible_roots((proxy,))}
        return names.pop() if names else None

    def possible_roots(self, args: object) -> frozenset[Root]:
        """The sites that any of these values is, or may be, a view of."""
        own = [proxy for proxy in values_in(args) if proxy._recorder is self._recorder]
        roots = {root for proxy in own if (root := self._root_of(proxy)) is not None}
        return frozenset(roots).union(*(proxy._maybe for proxy in own))

    def _writable_now(self, root: Root) -> str:
        site, line = root.site, user_line()
        reason = site.refuse_write or site.refuse_inplace
        if reason:
            raise RefusedError(f"{site.name} can't be changed in place: {reason}; {line}")
        if root.is_stale:
            raise OutOfOrderError(f"{site.name} was assigned anew since this value was read: read it again; {line}")
        if self._here.get(site.name) is not root:
            raise OutOfOrderError(
                f"this changes {site.name} in place, but the model has passed it; use .clone() for a value of your own; {line}"
            )
        return site.name

    def bump(self, path: str) -> None:
        """`module.next()`: this module and those below mean their next iteration from here on."""
        if self.block is not None:
            raise RefusedError(f".next() inside an iteration block, which moves on by itself; {user_line()}")
        self._next[path] = self._effective(path) + 1

    def moved(self) -> None:
        """The cursor was moved by a block: no site is current any more."""
        self._here = {}

    def here(self) -> dict[str, Root]:
        """The roots of the site where the program stands."""
        return dict(self._here)

    def go_back(self, start: ProgramPoint, here: dict[str, Root]) -> None:
        """The other branch starts where the first one started."""
        self.cursor.at, self._here = start, dict(here)

    def join(self, end: ProgramPoint, start: ProgramPoint, here: dict[str, Root]) -> None:
        """After both branches: the later of their ends; where neither moved, the program stands where it stood."""
        self.cursor.join(end)
        self._here = dict(here) if self.cursor.at == start else {}

    # -- order -----------------------------------------------------------------------------------------------------------

    def _go(self, site: SiteInfo) -> None:
        self._check_within(site)
        target = None if self.block is not None else self._effective(site.path)
        if target is not None and self.max_tokens is not None and target >= self.max_tokens:
            raise RecordError(
                f"{site.name}: iteration {target} never runs, max_tokens is {self.max_tokens}; {user_line()}"
            )
        before = self.cursor.at
        try:
            self.cursor.touch(site.name, site.order, target)
        except OutOfOrderError as error:
            raise OutOfOrderError(f"{self._explain(site, before, error)}; {user_line()}") from None
        if self.cursor.at != before:
            self._enter(site)

    def _enter(self, site: SiteInfo) -> None:
        logits = self._here.get("logits.output")
        self._here = {}
        if site.name == "samples.output":
            scope = self._recorder.scope
            self._draw = Draw(self.cursor.at, self._block_id(), scope, len(scope.nodes), logits)

    def _explain(self, site: SiteInfo, at: ProgramPoint, error: OutOfOrderError) -> str:
        here = self._tree.site_at(at.order)
        if here is None or at.ended or "loop" in str(error):
            return str(error)
        return f"{site.name} comes before {here.name} in the model, which the program has already reached"

    def _check_within(self, site: SiteInfo) -> None:
        within = self.block.within if self.block is not None else None
        if within and site.path != within and not site.path.startswith(within + "."):
            raise RefusedError(
                f"{site.name} isn't part of {within}, whose .all() is open: open tracer.all() to touch both; {user_line()}"
            )

    def _effective(self, path: str) -> int:
        """The iteration that a module means: never behind the cursor, ahead of it after `next()`."""
        parts = path.split(".")
        prefixes = ["", *(".".join(parts[:n]) for n in range(1, len(parts) + 1))]
        return max(self.cursor.at.iteration, *(self._next.get(prefix, 0) for prefix in prefixes))

    def _iteration(self) -> int | None:
        return None if self.block is not None else self.cursor.at.iteration

    def iteration_now(self) -> int:
        """The iteration that a value of another invoke has to be there for, if it's used here. Raises if none follows."""
        if self.cursor.at.ended:
            raise OutOfOrderError(f"after an unbounded iteration block only tracer.result can be read; {user_line()}")
        return self.cursor.at.iteration if self.block is None else self.block.start

    def _block_id(self) -> int | None:
        return self.block.id if self.block is not None else None

    # -- logits after samples --------------------------------------------------------------------------------------------

    def _is_drawn(self) -> bool:
        draw = self._draw
        if draw is None or draw.block != self._block_id() or draw.at != self.cursor.at:
            return False
        return self.block is not None or self._effective("logits") == draw.at.iteration

    def _drawn_logits(self, site: SiteInfo) -> Proxy:
        """An iteration's logits after its token was drawn: the read is put before the draw."""
        draw = self._draw
        assert draw is not None
        if not draw.scope.is_visible():
            raise OutOfOrderError(f"the token was drawn inside a branch; read the logits before it; {user_line()}")
        root = draw.logits
        if root is None or root.scope is None or not root.scope.is_visible():
            root = self._new_root(site, is_here=False)
            root.node, root.scope, draw.logits = self._recorder.new_id(), draw.scope, root
            draw.scope.nodes.insert(draw.index, Read(root.node, site.name, self._iteration()))
        return Proxy(self._recorder, root.node, root.values, root.scope)

    # -- roots -----------------------------------------------------------------------------------------------------------

    def _new_root(self, site: SiteInfo, is_here: bool = True) -> Root:
        dtype: torch.dtype = getattr(torch, site.dtype)
        shapes = [[rows if size is None else size for size in site.shape] for rows in self._row_counts(site)]
        root = Root(tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), site)
        for value in root.values:
            self._by_storage[meta.storage(value) or 0] = root
        if is_here:
            self._here[site.name] = root
        return root

    def _row_counts(self, site: SiteInfo) -> tuple[int, ...]:
        if site.name.startswith(SINGLE_ROW):
            return (1,)
        if self.block is None:
            return (self._rows,) if self.cursor.at.iteration == 0 else (1,)
        if self.block.start > 0:
            return (1,)
        is_only_prompt = self.block.stop is not None and self.block.stop <= self.block.step
        if is_only_prompt:  # of two lengths, so that what depends on it is left open
            return (self._rows,) if self._is_known else (self._rows, self._rows + 1)
        return (self._rows, 1)

    def _root_of(self, proxy: RunValue) -> Root | None:
        keys = [meta.storage(value) for value in proxy._metas]
        return next((self._by_storage[key] for key in keys if key is not None and key in self._by_storage), None)

    def _is_whole(self, site: SiteInfo, proxy: RunValue) -> bool:
        root = self._here.get(site.name)
        return root is not None and any(value is own for value in proxy._metas for own in root.values)

    def _check_fits(self, site: SiteInfo, value: object, root: Root) -> None:
        for i, own in enumerate(root.values):
            given = resolve(value, i)
            if isinstance(given, torch.Tensor) and not _fits(given.shape, own.shape):
                shapes = f"got {list(given.shape)}, expected {list(own.shape)}"
                raise RecordError(f"{site.name} can't hold this value: {shapes}; {user_line()}")
            if isinstance(given, bool) or not isinstance(given, torch.Tensor | int | float | meta.Unknown):
                raise RecordError(f"{site.name} holds a tensor, got {type(given).__name__}; {user_line()}")
            refuse_complex(given, own)


def refuse_complex(given: object, own: object) -> None:
    """Raise where writing `given` into `own` would drop an imaginary part, which torch only warns of."""
    if (
        isinstance(given, torch.Tensor)
        and isinstance(own, torch.Tensor)
        and given.is_complex()
        and not own.is_complex()
    ):
        name, into = (str(value.dtype).removeprefix("torch.") for value in (given, own))
        raise RecordError(f"{name} can't be written into {into}: its imaginary part would be lost; {user_line()}")


def _fits(given: torch.Size, own: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(given, own) == own)
    except RuntimeError:
        return False
