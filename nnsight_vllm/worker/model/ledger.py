"""The record that placing sites fills: taps and sites in firing order, and which values lie in which tap's slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs
from torch import Tensor, nn

from nnsight_vllm.graph.catalogue import Port, SiteInfo
from nnsight_vllm.worker.model.hooks import Source, Tap
from nnsight_vllm.worker.model.modules import Part
from nnsight_vllm.worker.model.sites import Apply, Argument, Direct, Refresh, Site, Stream, TensorSlice
from nnsight_vllm.worker.model.survey import Survey, is_same

SHARED_INPUT = (
    "{path}.input is a tensor that other modules use too, and Hugging Face's in-place edit would reach them all; "
    "assign it by value ({path}.input = x.clone() ...), which changes what this module sees and nothing else"
)


@dataclass(frozen=True)
class TapValue:
    """A value that lies in a slot of a tap since some moment of the survey."""

    tap: Tap
    slot: TensorSlice
    value: Tensor
    since: int


@dataclass
class Ledger:
    """`refusals` are reasons by site name. `reference` is the order in which transformers runs its modules."""

    parts: dict[str, Part]
    raw: dict[str, str]
    blocks: list[str]
    model: nn.Module
    survey: Survey
    reference: list[str]
    selected: Callable[[str], bool]
    taps: list[Tap] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    held: list[TapValue] = field(default_factory=list)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.bases = [path for path in self.parts if path and self._is_base(path)]
        self.by_host: dict[str, list[Part]] = {}
        for part in self.parts.values():
            if part.host and part.path not in self.bases:
                self.by_host.setdefault(part.host, []).append(part)

    def _is_base(self, path: str) -> bool:
        """Whether the module contains all blocks: the base model, or its decoder."""
        inside = any(block.startswith(f"{path}.") for block in self.blocks)
        return inside and not isinstance(self.parts[path].module, nn.ModuleList)

    def new_tap(self, host: str, read: list[Source], write: list[Source], **more: Any) -> Tap:
        """One more tap, after all others. `more` are `Tap`'s other fields."""
        tap = Tap(self.numbers, host, read, write, **more)
        self.numbers += 1
        self.taps.append(tap)
        return tap

    def hold(self, tap: Tap, first: int, values: list[Tensor], since: int) -> list[TensorSlice]:
        slots = [self.slot(first + i, value) for i, value in enumerate(values)]
        self.held += [TapValue(tap, slot, value, since) for slot, value in zip(slots, values, strict=True)]
        return slots

    def slot(self, index: int, value: Tensor) -> TensorSlice:
        return TensorSlice(index, batched=value.shape[0] == 1 and value.ndim > 1)

    def find(self, values: list[Tensor], now: int) -> tuple[Tap, list[TensorSlice]] | None:
        """Slots of the last tap where the values still lie, untouched."""
        if not self.taps:
            return None
        slots = []
        for value in values:
            held = next((h for h in self.held if h.tap is self.taps[-1] and is_same(h.value, value)), None)
            if held is None or not self.survey.is_untouched(value, held.since, now):
                return None
            slots.append(held.slot)
        return self.taps[-1], slots

    def since(self, value: Tensor, now: int) -> int:
        """When the value was made, as far as a tap holds it; else now."""
        return next((h.since for h in reversed(self.held) if is_same(h.value, value) and h.since < now), now)

    def is_rows(self, value: Tensor) -> bool:
        rows = value.shape[1] if value.ndim > 1 and value.shape[0] == 1 else value.shape[0]
        return rows == self.survey.num_tokens

    def add_argument(
        self,
        part: Part,
        tap: Tap,
        given: TensorSlice,
        output: TensorSlice,
        apply: Apply,
        shared: bool,
        refresh: Refresh | None = None,
    ) -> None:
        reason = _input_refusal(part.module)
        if reason:
            self.refusals[f"{part.path}.input"] = reason
            return
        inplace = SHARED_INPUT.format(path=part.path) if shared else ""
        info = self.info(part.path, "input", refuse_inplace=inplace)
        self.add(Argument(info, tap.number, given, output, apply, refresh))

    def add_value(self, path: str, port: Port, place: tuple[Tap, list[TensorSlice]], **more: Any) -> None:
        tap, slots = place
        info = self.info(path, port, **more)
        site = Direct(info, tap.number, slots[0]) if len(slots) == 1 else Stream(info, tap.number, *slots)
        self.add(site)

    def add(self, site: Site) -> None:
        """Place a site after all others, if it is wanted."""
        if self.selected(site.info.path):
            site.info = structs.replace(site.info, order=len(self.sites))
            self.sites.append(site)

    def in_reference_order(self, paths: list[str]) -> list[str]:
        """Sorted as Hugging Face's model runs them, as far as that is known; the others as they come."""
        known = {path: i for i, path in enumerate(self.reference)}
        alike = {path: self._in_first_block(path) for path in paths}
        return sorted(paths, key=lambda path: known[alike[path]]) if set(alike.values()) <= set(known) else paths

    def _in_first_block(self, path: str) -> str:
        """The same module in the first block: all blocks run their modules in the same order."""
        block = next((block for block in self.blocks if path.startswith(f"{block}.")), "")
        return self.blocks[0] + path.removeprefix(block) if block else path

    def info(self, path: str, port: Port, **more: Any) -> SiteInfo:
        return SiteInfo(f"{path}.{port}", path, port, 0, (), "", **more)

    def refuse(self, path: str, reason: str) -> None:
        self.refusals |= {f"{path}.{port}": reason for port in ("input", "output")}

    def add_raw_fused(self, host: str, tap: Tap, slot: TensorSlice, refresh: Refresh | None = None) -> None:
        """The whole output of a linear that Hugging Face has in parts."""
        for path in (path for path, raw in self.raw.items() if raw == host):
            self.add(Direct(self.info(path, "output"), tap.number, slot, refresh))


def _input_refusal(module: nn.Module) -> str:
    """Why a module's input can't be had in Hugging Face's terms, empty where it can."""
    names = module.forward.__code__.co_varnames if hasattr(module.forward, "__code__") else ()
    if len(names) > 1 and names[1] == "attention_mask":
        return "Hugging Face passes an attention mask here, which vLLM doesn't have"
    return ""
