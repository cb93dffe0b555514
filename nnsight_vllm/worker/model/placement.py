"""Decide the taps: walk through the survey in firing order and put every site where its value lies.

A site joins the tap that fired last if its value still lies there untouched (an attention's output is its `o_proj`'s);
else it gets a tap of its own. Inputs of leaf modules are served after the module ran, so that assigning one recomputes
that module's output and nothing else. A container's input is changed before the container runs: in place if nobody else
reads the tensor, else in a copy made for the container.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from nnsight_vllm.worker.layers import views
from nnsight_vllm.worker.model.fused_modules import find_gated, find_normed, place_gated, place_normed
from nnsight_vllm.worker.model.hooks import Source, Tap
from nnsight_vllm.worker.model.ledger import SHARED_INPUT, Ledger
from nnsight_vllm.worker.model.modules import Part
from nnsight_vllm.worker.model.sites import Apply, Direct, TensorSlice
from nnsight_vllm.worker.model.survey import Firing, is_same

CHANGED_BY_INPUT = "{path}.output is what {other}.input is; assign that one"


class Placement(Ledger):
    """The walk. Its result: `taps` and `sites` in firing order, `refusals` by site name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gated = find_gated(self.survey, self.by_host, self.model)
        self.normed = find_normed(self.survey, self.by_host, self.model)
        self.wanted = self._wanted_hosts()
        self.scaled: list[Part] = []
        self.is_paired = self._keeps_pairs()

    def walk(self) -> None:
        """Place the sites of every selected module that fires once."""
        for host in self.wanted:
            if len(self.survey.of(host)) > 1:
                for part in self.by_host[host]:
                    self.refuse(part.path, f"{part.path} runs several times in one forward")
        once = [f for f in self.survey.firings if f.path in self.wanted and len(self.survey.of(f.path)) == 1]
        moments: list[tuple[int, Callable[[Firing], None], Firing]] = []
        for firing in once:
            moments += [(firing.start, self._enter, firing), (firing.end, self._leave, firing)]
        for _, act, firing in sorted(moments, key=lambda moment: moment[0]):
            act(firing)
        self._base_outputs()
        used = {site.tap for site in self.sites}
        self.taps = [tap for tap in self.taps if tap.number in used]

    def _wanted_hosts(self) -> set[str]:
        """vLLM modules with something selected on them; a gated activation and its linear go together."""
        wanted = {host for host, parts in self.by_host.items() if any(self.selected(p.path) for p in parts)}
        wanted |= {host for path, host in self.raw.items() if self.selected(path) and host in self.by_host}
        if any(_is_scaled(part.module) for host in wanted for part in self.by_host[host]):
            wanted.add(self.parts[self.blocks[0]].host or "")
        groups = [{activation, linear} for activation, linear in self.gated.items()]
        groups += [{linear, *(norm.firing.path for norm in norms)} for linear, norms in self.normed.values()]
        return wanted.union(*(group for group in groups if group & wanted))

    def _is_grouped(self, host: str) -> bool:
        """Whether a later module's tap serves this one."""
        in_normed = any(host == linear or host in [n.firing.path for n in ns] for linear, ns in self.normed.values())
        return in_normed or host in self.gated.values()

    def _keeps_pairs(self) -> bool:
        """Whether blocks hand on the stream in two parts: the second thing they return is used after them."""
        fired = self.survey.of(self.parts[self.blocks[0]].host or "")
        residual = self._residual_of(fired[0].output) if fired else None
        return residual is not None and not self.survey.is_exclusive(residual, fired[0].end, fired[0].path)

    # -- moments

    def _enter(self, firing: Firing) -> None:
        part = self.by_host[firing.path][0]
        if self._is_container(part) and not views.is_experts(part.module):
            self._container_input(part, firing)

    def _leave(self, firing: Firing) -> None:
        parts = self.by_host[firing.path]
        if self._is_container(parts[0]):
            self._container_output(parts[0], firing)
        elif firing.path in self.gated:
            place_gated(self, firing, self.survey.of(self.gated[firing.path])[0])
        elif firing.path in self.normed:
            linear, norms = self.normed[firing.path]
            place_normed(self, firing, self.survey.of(linear)[0], norms)
        elif views.is_gated(self.model.get_submodule(firing.path)):
            self.refuse(parts[0].path, f"vLLM fuses {parts[0].path} in a way that can't be told apart")
        elif not views.is_leaf(self.model.get_submodule(firing.path), parts[0].module):
            return
        elif not self._is_grouped(firing.path):
            self._leaf(sorted(parts, key=lambda part: part.columns or (0, 0)), firing)

    def _is_container(self, part: Part) -> bool:
        assert part.host is not None
        return views.is_experts(part.module) or any(part.module.children())

    # -- containers

    def _container_input(self, part: Part, firing: Firing) -> None:
        pairs = [(where, t) for where, t in firing.tensors() if t.is_floating_point() and self.is_rows(t)]
        if not pairs:
            self.refusals[f"{part.path}.input"] = f"vLLM calls {part.path} without one tensor of rows"
            return
        pairs = pairs[:2] if part.path in self.blocks and self.is_paired else pairs[:1]
        values = [t for _, t in pairs]
        shared = not all(self.survey.is_exclusive(t, self.since(t, firing.start), firing.path) for t in values)
        slots = None if shared else self.find(values, firing.start)
        if slots is None:
            sources = [Source("argument" if isinstance(where, int) else "keyword", where) for where, _ in pairs]
            tap = self.new_tap(firing.path, [], sources, before=True, copies=shared)
            slots = (tap, self.hold(tap, 0, values, firing.start))
        self._scaled_outputs(*slots)
        inplace = SHARED_INPUT.format(path=part.path) if shared and part.path not in self.blocks else ""
        self.add_value(part.path, "input", slots, refuse_inplace=inplace)

    def _container_output(self, part: Part, firing: Firing) -> None:
        value = views.first_tensor(firing.output)
        if value is None or not self.is_rows(value):
            self.refusals[f"{part.path}.output"] = f"vLLM's {part.path} doesn't return one tensor of rows"
            return
        residual = self._residual_of(firing.output) if part.path in self.blocks and self.is_paired else None
        values = [value] if residual is None else [value, residual]
        slots = self.find(values, firing.end)
        if slots is None:
            where = [Source("output", i if isinstance(firing.output, tuple) else None) for i in range(len(values))]
            moved = self._absorb(value, firing.end) if len(values) == 2 else []
            tap = self.new_tap(firing.path, [], where)
            slots = (tap, self.hold(tap, 0, values, firing.end))
            for site in moved:
                site.tap = tap.number
        self.add_value(part.path, "output", slots, structure=self._structure(part))

    def _residual_of(self, output: Any) -> Tensor | None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            return output[1] if output[1].shape == output[0].shape else None
        return None

    def _fused_residual(self, firing: Firing) -> Tensor | None:
        """What a norm that adds a residual first has normed: its second output, if it did use its second argument."""
        given = [tensor for _, tensor in firing.tensors()]
        adds = len(given) > 1 and self.survey.is_used(given[1], firing)
        return self._residual_of(firing.output) if adds else None

    def _absorb(self, hidden: Tensor, now: int) -> list[Direct]:
        """Take away the last tap if all it served is `hidden`, which the caller's new tap serves too."""
        last = self.taps[-1] if self.taps else None
        if last is None or len(last.write) != 1 or self.find([hidden], now) is None:
            return []
        served = [site for site in self.sites if site.tap == last.number]
        if not all(isinstance(s, Direct) and s.slot.index == len(last.read) and not s.slot.columns for s in served):
            return []
        moved = [site for site in served if isinstance(site, Direct)]
        for site in moved:
            site.slot = TensorSlice(0, site.slot.batched)
        self.taps.pop()
        return moved

    # -- leaves

    def _leaf(self, parts: list[Part], firing: Firing) -> None:
        value = firing.tensors()[0][1]
        output = views.first_tensor(firing.output)
        host = self.model.get_submodule(firing.path)
        if output is None or not self.is_rows(output) or not self.is_rows(value):
            for part in parts:
                self.refuse(part.path, f"vLLM's {firing.path} doesn't work row by row")
            return
        residual = self._fused_residual(firing) if views.is_norm(host) else None
        only = parts[0] if len(parts) == 1 else None
        if only is not None and residual is None and self._plain_leaf(only, value, output, firing):
            return
        source = self._argument(firing) if residual is None else Source("output", 1)
        index = 0 if isinstance(firing.output, tuple) else None
        tap = self.new_tap(firing.path, [source], [Source("output", index)])
        given = self.slot(0, value)
        (result,) = self.hold(tap, 1, [output], firing.end)
        self._raw_outputs(parts[0], value if residual is None else None, tap, given)
        for part in parts:
            shared = only is None or not self._is_own(residual, value, firing, part)
            columns = part.columns
            self.add_argument(part, tap, given, result.part(columns), self._apply(part, host), shared)
            self._output(part, tap, result.part(columns))
        self.add_raw_fused(firing.path, tap, result)

    def _plain_leaf(self, part: Part, value: Tensor, output: Tensor, firing: Firing) -> bool:
        """Serve the input where the last tap holds it, if this module alone reads it. The output gets a tap."""
        found = self.find([value], firing.start)
        if found is None or not self.survey.is_exclusive(value, self.since(value, firing.start), firing.path):
            return False
        if not value.is_floating_point():
            return False
        self.add_value(part.path, "input", found)
        index = 0 if isinstance(firing.output, tuple) else None
        tap = self.new_tap(firing.path, [], [Source("output", index)])
        (result,) = self.hold(tap, 0, [output], firing.end)
        self._output(part, tap, result)
        return True

    def _is_own(self, residual: Tensor | None, value: Tensor, firing: Firing, part: Part) -> bool:
        """Whether, in Hugging Face's model, no other module reads this module's input tensor."""
        if residual is not None:
            return not any(part.path.startswith(f"{block}.") for block in self.blocks)
        return self.survey.is_exclusive(value, firing.start, firing.path)

    def _apply(self, part: Part, host: nn.Module) -> Apply:
        if views.is_activation(part.module):
            return views.activation_of(part.module)
        return views.columns_of(host, part.columns)

    def _output(self, part: Part, tap: Tap, slot: TensorSlice) -> None:
        if _is_scaled(part.module):
            self.scaled.append(part)
        else:
            info = self.info(part.path, "output", structure=self._structure(part))
            self.add(Direct(info, tap.number, slot))

    def _scaled_outputs(self, tap: Tap, slots: list[TensorSlice]) -> None:
        """An embedding that scales inside in Hugging Face and outside in vLLM: what enters the first block."""
        for part in self.scaled:
            self.add(Direct(self.info(part.path, "output"), tap.number, slots[0]))
        self.scaled = []

    # -- vLLM's own modules and the base model

    def _raw_outputs(self, part: Part, value: Tensor | None, tap: Tap, slot: TensorSlice) -> None:
        """The output of a vLLM module that is a leaf's input: the attention operator before `o_proj`."""
        for path, host in self.raw.items():
            if value is None or not self.selected(path) or path.rpartition(".")[0] != part.path.rpartition(".")[0]:
                continue
            fired = self.survey.of(host)
            output = views.first_tensor(fired[0].output) if len(fired) == 1 else None
            if output is not None and is_same(output, value):
                reason = CHANGED_BY_INPUT.format(path=path, other=part.path)
                self.add(Direct(self.info(path, "output", refuse_write=reason), tap.number, slot))

    def _base_outputs(self) -> None:
        """The base model returns the final norm's output; vLLM compiles it as a whole, so its own hooks don't fire."""
        value = views.first_tensor(self.survey.output)
        found = None if value is None else self.find([value], self.survey.firings[0].end)
        for path in reversed(self.bases):
            if found is not None:
                self.add_value(path, "output", found, structure="tuple")

    def _argument(self, firing: Firing) -> Source:
        where = firing.tensors()[0][0]
        return Source("argument" if isinstance(where, int) else "keyword", where)

    def _structure(self, part: Part) -> Literal["tensor", "tuple"]:
        return "tuple" if part.path in self.blocks or views.returns_tuple(part.module) else "tensor"


def _is_scaled(module: nn.Module) -> bool:
    return getattr(module, "embed_scale", None) is not None
