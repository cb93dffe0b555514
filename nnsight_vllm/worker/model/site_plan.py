"""The plan that placing sites fills: taps and sites in firing order, and which values lie in which tap's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs
from torch import Tensor, nn

from nnsight_vllm.graph.catalogue import Port, SiteInfo
from nnsight_vllm.worker.model.hooks import Source, Tap
from nnsight_vllm.worker.model.modules import HFModule
from nnsight_vllm.worker.model.sites import Argument, Direct, Recompute, ResidualStream, Site, TensorSlice
from nnsight_vllm.worker.model.survey import Firing, Survey, is_same

SHARED_INPUT = (
    "{path}.input is a tensor that other modules use too, and Hugging Face's in-place edit would reach them all; "
    "assign it by value ({path}.input = x.clone() ...), which changes what this module sees and nothing else"
)


@dataclass(frozen=True)
class TapValue:
    """A value that lies in a tensor of a tap since some moment of the survey."""

    tap: Tap
    where: TensorSlice
    value: Tensor
    since: int


@dataclass
class SitePlan:
    """`refusals` are reasons by site name. `reference` is the order in which transformers runs its modules."""

    modules: dict[str, HFModule]
    raw: dict[str, str]
    blocks: list[str]
    model: nn.Module
    survey: Survey
    reference: list[str]
    selected: Callable[[str], bool]
    taps: list[Tap] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    values: list[TapValue] = field(default_factory=list)
    next_tap: int = 0

    def __post_init__(self) -> None:
        self.bases = [path for path in self.modules if path and self._is_base(path)]
        self.by_host: dict[str, list[HFModule]] = {}
        for hf in self.modules.values():
            if hf.host and hf.path not in self.bases:
                self.by_host.setdefault(hf.host, []).append(hf)

    def _is_base(self, path: str) -> bool:
        """Whether the module contains all blocks: the base model, or its decoder."""
        inside = any(block.startswith(f"{path}.") for block in self.blocks)
        return inside and not isinstance(self.modules[path].module, nn.ModuleList)

    def new_tap(self, host: str, read: list[Source], write: list[Source], **more: Any) -> Tap:
        """One more tap, after all others. `more` are `Tap`'s other fields."""
        tap = Tap(self.next_tap, host, read, write, **more)
        self.next_tap += 1
        self.taps.append(tap)
        return tap

    def hold(self, tap: Tap, first: int, values: list[Tensor], since: int) -> list[TensorSlice]:
        """The tap's tensors from number `first` on are these values."""
        slices = [slice_of(first + i, value) for i, value in enumerate(values)]
        self.values += [TapValue(tap, where, value, since) for where, value in zip(slices, values, strict=True)]
        return slices

    def find(self, values: list[Tensor], now: int) -> tuple[Tap, list[TensorSlice]] | None:
        """Where the values still lie in the last tap's tensors, untouched."""
        if not self.taps:
            return None
        slices = []
        for value in values:
            known = next((k for k in self.values if k.tap is self.taps[-1] and is_same(k.value, value)), None)
            if known is None or not self.survey.is_untouched(value, known.since, now):
                return None
            slices.append(known.where)
        return self.taps[-1], slices

    def since(self, value: Tensor, now: int) -> int:
        """When the value was made, as far as a tap holds it; else now."""
        return next((k.since for k in reversed(self.values) if is_same(k.value, value) and k.since < now), now)

    def is_rows(self, value: Tensor) -> bool:
        rows = value.shape[1] if value.ndim > 1 and value.shape[0] == 1 else value.shape[0]
        return rows == self.survey.num_tokens

    def add_argument(self, hf: HFModule, site: Argument, is_shared: bool) -> None:
        """Place a module's input. `is_shared`: other modules use the tensor too."""
        if reason := _input_refusal(hf.module):
            self.refusals[site.info.name] = reason
            return
        if is_shared:
            site.info = structs.replace(site.info, refuse_inplace=SHARED_INPUT.format(path=hf.path))
        self.add(site)

    def add_value(self, path: str, port: Port, at: tuple[Tap, list[TensorSlice]], **more: Any) -> None:
        tap, slices = at
        info = site_info(path, port, **more)
        self.add(Direct(info, tap.number, slices[0]) if len(slices) == 1 else ResidualStream(info, tap.number, *slices))

    def add_raw_fused(self, host: str, tap: Tap, whole: TensorSlice, recompute: Recompute | None = None) -> None:
        """The whole output of a linear that Hugging Face has in parts."""
        for path in (path for path, raw in self.raw.items() if raw == host):
            self.add(Direct(site_info(path, "output"), tap.number, whole, recompute))

    def add(self, site: Site) -> None:
        """Place a site after all others, if it is wanted."""
        if self.selected(site.info.path):
            site.info = structs.replace(site.info, order=len(self.sites))
            self.sites.append(site)

    def refuse(self, path: str, reason: str) -> None:
        self.refusals |= {f"{path}.{port}": reason for port in ("input", "output")}

    def in_reference_order(self, paths: list[str]) -> list[str]:
        """Sorted as Hugging Face's model runs them, as far as that is known; the others as they come."""
        known = {path: i for i, path in enumerate(self.reference)}
        alike = {path: self._in_first_block(path) for path in paths}
        return sorted(paths, key=lambda path: known[alike[path]]) if set(alike.values()) <= set(known) else paths

    def _in_first_block(self, path: str) -> str:
        """The same module in the first block: all blocks run their modules in the same order."""
        block = next((block for block in self.blocks if path.startswith(f"{block}.")), "")
        return self.blocks[0] + path.removeprefix(block) if block else path


def site_info(path: str, port: Port, **more: Any) -> SiteInfo:
    """Order, shape and dtype are filled in later."""
    return SiteInfo(f"{path}.{port}", path, port, 0, (), "", **more)


def slice_of(index: int, value: Tensor) -> TensorSlice:
    """All columns of a tap's tensor number `index`, which looks like `value`."""
    return TensorSlice(index, batched=value.shape[0] == 1 and value.ndim > 1)


def given_as(where: int | str) -> Source:
    """A module's argument, by its position or keyword."""
    return Source("argument" if isinstance(where, int) else "keyword", where)


def first_output(firing: Firing) -> Source:
    """What a module returns, or the first thing of it."""
    return Source("output", 0 if isinstance(firing.output, tuple) else None)


def _input_refusal(module: nn.Module) -> str:
    """Why a module's input can't be had in Hugging Face's terms, empty where it can."""
    names = module.forward.__code__.co_varnames if hasattr(module.forward, "__code__") else ()
    if len(names) > 1 and names[1] == "attention_mask":
        return "Hugging Face passes an attention mask here, which vLLM doesn't have"
    return ""
