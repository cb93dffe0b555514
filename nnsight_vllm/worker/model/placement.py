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

from nnsight_vllm.worker.layers import layer_kinds
from nnsight_vllm.worker.layers.functions import leaf_function
from nnsight_vllm.worker.layers.layer_kinds import first_tensor
from nnsight_vllm.worker.model.fused_modules import find_gated, find_normed, place_gated, place_normed
from nnsight_vllm.worker.model.hooks import Source, Tap
from nnsight_vllm.worker.model.modules import HFModule
from nnsight_vllm.worker.model.site_plan import SHARED_INPUT, SitePlan, first_output, given_as, site_info, slice_of
from nnsight_vllm.worker.model.sites import Argument, Direct, TensorSlice
from nnsight_vllm.worker.model.survey import Firing, is_same

CHANGED_BY_INPUT = "{path}.output is what {other}.input is; assign that one"


class Placement(SitePlan):
    """The walk. Its result: `taps` and `sites` in firing order, `refusals` by site name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gated = find_gated(self.survey, self.by_host, self.model)
        self.normed = find_normed(self.survey, self.by_host, self.model)
        self.wanted = self._wanted_hosts()
        self.scaled: list[HFModule] = []
        self.is_paired = self._keeps_pairs()

    def walk(self) -> None:
        """Place the sites of every selected module that fires once."""
        for hf in (hf for host in self.wanted if len(self.survey.of(host)) > 1 for hf in self.by_host[host]):
            self.refuse(hf.path, f"{hf.path} runs several times in one forward")
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
        wanted = {host for host, modules in self.by_host.items() if any(self.selected(hf.path) for hf in modules)}
        wanted |= {host for path, host in self.raw.items() if self.selected(path) and host in self.by_host}
        if any(_is_scaled(hf.module) for host in wanted for hf in self.by_host[host]):
            wanted.add(self.modules[self.blocks[0]].host or "")
        groups = [{activation, linear} for activation, linear in self.gated.items()]
        groups += [{linear, *(norm.firing.path for norm in norms)} for linear, norms in self.normed.values()]
        return wanted.union(*(group for group in groups if group & wanted))

    def _is_grouped(self, host: str) -> bool:
        """Whether a later module's tap serves this one."""
        in_normed = any(host == linear or host in [n.firing.path for n in ns] for linear, ns in self.normed.values())
        return in_normed or host in self.gated.values()

    def _keeps_pairs(self) -> bool:
        """Whether blocks hand on the stream in two parts: the second thing they return is used after them."""
        fired = self.survey.of(self.modules[self.blocks[0]].host or "")
        residual = self._residual_of(fired[0].output) if fired else None
        return residual is not None and not self.survey.is_exclusive(residual, fired[0].end, fired[0].path)

    # -- moments

    def _enter(self, firing: Firing) -> None:
        hf = self.by_host[firing.path][0]
        if self._is_container(hf) and not layer_kinds.is_experts(hf.module):
            self._container_input(hf, firing)

    def _leave(self, firing: Firing) -> None:
        modules = self.by_host[firing.path]
        if self._is_container(modules[0]):
            self._container_output(modules[0], firing)
        elif firing.path in self.gated:
            place_gated(self, firing, self.survey.of(self.gated[firing.path])[0])
        elif firing.path in self.normed:
            linear, norms = self.normed[firing.path]
            place_normed(self, firing, self.survey.of(linear)[0], norms)
        elif layer_kinds.is_gated(self.model.get_submodule(firing.path)):
            self.refuse(modules[0].path, f"vLLM fuses {modules[0].path} in a way that can't be told apart")
        elif not layer_kinds.is_leaf(self.model.get_submodule(firing.path), modules[0].module):
            return
        elif not self._is_grouped(firing.path):
            self._leaf(sorted(modules, key=lambda hf: hf.columns or (0, 0)), firing)

    def _is_container(self, hf: HFModule) -> bool:
        return layer_kinds.is_experts(hf.module) or any(hf.module.children())

    # -- containers

    def _container_input(self, hf: HFModule, firing: Firing) -> None:
        pairs = [(where, t) for where, t in firing.tensors() if t.is_floating_point() and self.is_rows(t)]
        if not pairs:
            self.refusals[f"{hf.path}.input"] = f"vLLM calls {hf.path} without one tensor of rows"
            return
        pairs = pairs[:2] if hf.path in self.blocks and self.is_paired else pairs[:1]
        values = [t for _, t in pairs]
        shared = not all(self.survey.is_exclusive(t, self.since(t, firing.start), firing.path) for t in values)
        found = None if shared else self.find(values, firing.start)
        if found is None:
            tap = self.new_tap(firing.path, [], [given_as(where) for where, _ in pairs], before=True, copies=shared)
            found = (tap, self.hold(tap, 0, values, firing.start))
        self._scaled_outputs(*found)
        inplace = SHARED_INPUT.format(path=hf.path) if shared and hf.path not in self.blocks else ""
        self.add_value(hf.path, "input", found, refuse_inplace=inplace)

    def _container_output(self, hf: HFModule, firing: Firing) -> None:
        value = first_tensor(firing.output)
        if value is None or not self.is_rows(value):
            self.refusals[f"{hf.path}.output"] = f"vLLM's {hf.path} doesn't return one tensor of rows"
            return
        residual = self._residual_of(firing.output) if hf.path in self.blocks and self.is_paired else None
        values = [value] if residual is None else [value, residual]
        found = self.find(values, firing.end)
        if found is None:
            moved = self._absorb(value, firing.end) if len(values) == 2 else []
            sources = [first_output(firing), Source("output", 1)]
            tap = self.new_tap(firing.path, [], sources[: len(values)])
            found = (tap, self.hold(tap, 0, values, firing.end))
            for site in moved:
                site.tap = tap.number
        self.add_value(hf.path, "output", found, structure=self._structure(hf))

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
        if not all(isinstance(s, Direct) and s.value.index == len(last.read) and not s.value.columns for s in served):
            return []
        moved = [site for site in served if isinstance(site, Direct)]
        for site in moved:
            site.value = TensorSlice(0, site.value.batched)
        self.taps.pop()
        return moved

    # -- leaves

    def _leaf(self, modules: list[HFModule], firing: Firing) -> None:
        value = firing.tensors()[0][1]
        output = first_tensor(firing.output)
        host = self.model.get_submodule(firing.path)
        if output is None or not self.is_rows(output) or not self.is_rows(value):
            for hf in modules:
                self.refuse(hf.path, f"vLLM's {firing.path} doesn't work row by row")
            return
        residual = self._fused_residual(firing) if layer_kinds.is_norm(host) else None
        only = modules[0] if len(modules) == 1 else None
        if only is not None and residual is None and self._plain_leaf(only, value, output, firing):
            return
        source = given_as(firing.tensors()[0][0]) if residual is None else Source("output", 1)
        tap = self.new_tap(firing.path, [source], [first_output(firing)])
        given = slice_of(0, value)
        (result,) = self.hold(tap, 1, [output], firing.end)
        self._raw_outputs(modules[0], value if residual is None else None, tap, given)
        for hf in modules:
            is_shared = only is None or not self._is_own(residual, value, firing, hf)
            share = result.part(hf.columns)
            apply = leaf_function(host, hf.module, hf.columns)
            argument = Argument(site_info(hf.path, "input"), tap.number, given, share, apply)
            self.add_argument(hf, argument, is_shared)
            self._output(hf, tap, share)
        self.add_raw_fused(firing.path, tap, result)

    def _plain_leaf(self, hf: HFModule, value: Tensor, output: Tensor, firing: Firing) -> bool:
        """Serve the input where the last tap holds it, if this module alone reads it. The output gets a tap."""
        found = self.find([value], firing.start)
        is_own = self.survey.is_exclusive(value, self.since(value, firing.start), firing.path)
        if found is None or not is_own or not value.is_floating_point():
            return False
        self.add_value(hf.path, "input", found)
        tap = self.new_tap(firing.path, [], [first_output(firing)])
        (result,) = self.hold(tap, 0, [output], firing.end)
        self._output(hf, tap, result)
        return True

    def _is_own(self, residual: Tensor | None, value: Tensor, firing: Firing, hf: HFModule) -> bool:
        """Whether, in Hugging Face's model, no other module reads this module's input tensor."""
        if residual is not None:
            return not any(hf.path.startswith(f"{block}.") for block in self.blocks)
        return self.survey.is_exclusive(value, firing.start, firing.path)

    def _output(self, hf: HFModule, tap: Tap, where: TensorSlice) -> None:
        if _is_scaled(hf.module):
            self.scaled.append(hf)
        else:
            self.add_value(hf.path, "output", (tap, [where]), structure=self._structure(hf))

    def _scaled_outputs(self, tap: Tap, slices: list[TensorSlice]) -> None:
        """An embedding that scales inside in Hugging Face and outside in vLLM: what enters the first block."""
        for hf in self.scaled:
            self.add_value(hf.path, "output", (tap, slices[:1]))
        self.scaled = []

    # -- vLLM's own modules and the base model

    def _raw_outputs(self, hf: HFModule, value: Tensor | None, tap: Tap, where: TensorSlice) -> None:
        """The output of a vLLM module that is a leaf's input: the attention operator before `o_proj`."""
        for path, host in self.raw.items():
            if value is None or not self.selected(path) or path.rpartition(".")[0] != hf.path.rpartition(".")[0]:
                continue
            fired = self.survey.of(host)
            output = first_tensor(fired[0].output) if len(fired) == 1 else None
            if output is not None and is_same(output, value):
                reason = CHANGED_BY_INPUT.format(path=path, other=hf.path)
                self.add_value(path, "output", (tap, [where]), refuse_write=reason)

    def _base_outputs(self) -> None:
        """The base model returns the final norm's output; vLLM compiles it as a whole, so its own hooks don't fire."""
        value = first_tensor(self.survey.output)
        found = None if value is None else self.find([value], self.survey.firings[0].end)
        for path in reversed(self.bases):
            if found is not None:
                self.add_value(path, "output", found, structure="tuple")

    def _structure(self, hf: HFModule) -> Literal["tensor", "tuple"]:
        return "tuple" if hf.path in self.blocks or layer_kinds.returns_tuple(hf.module) else "tensor"


def _is_scaled(module: nn.Module) -> bool:
    return getattr(module, "embed_scale", None) is not None
