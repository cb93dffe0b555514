"""A model with taps: what its sites are, and one probing forward that says what they carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs
from torch import Tensor, nn

from nnsight_vllm.worker.layers.forwards import Config
from nnsight_vllm.worker.layers.head import Head
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.modules import HFModule
from nnsight_vllm.worker.model.sites import Site

Selection = str | list[str]


@dataclass
class Instrumented:
    """`refusals` are reasons by site name. `logits_taps` fire outside the model's forward, on rows that get logits."""

    model: nn.Module
    config: Config
    selection: Selection
    modules: dict[str, HFModule]
    raw: dict[str, str]
    blocks: list[str]
    sites: dict[str, Site]
    refusals: dict[str, str]
    selected: Callable[[str], bool]
    num_taps: int
    logits_taps: frozenset[int]
    head: Head
    fingerprint: str

    def host_of(self, hf: HFModule) -> nn.Module:
        """The vLLM module that computes a Hugging Face module."""
        assert hf.host is not None
        return self.model.get_submodule(hf.host)

    def probe(self, run: Callable[[], None]) -> None:
        """Learn shapes and dtypes from one real forward: `run` does it. Sites whose tap stays silent are dropped and refused."""
        seen: dict[str, Tensor] = {}
        by_tap: dict[int, list[Site]] = {}
        for site in self.sites.values():
            by_tap.setdefault(site.tap, []).append(site)
        taps.ACTIVE.update({tap: _recorder(served, seen) for tap, served in by_tap.items()})
        try:
            run()
        finally:
            for tap in by_tap:
                taps.ACTIVE.pop(tap, None)
        failures = taps.take_failures()
        if failures:
            raise failures[0]
        self._settle(seen)

    def _settle(self, seen: dict[str, Tensor]) -> None:
        orders = [self.sites[name].info.order for name in seen]
        assert orders == sorted(orders), "taps fired in another order than their sites have"
        for name, site in list(self.sites.items()):
            if name in seen:
                shape, dtype = seen[name].shape, str(seen[name].dtype).removeprefix("torch.")
                site.info = structs.replace(site.info, shape=(None, *shape[1:]), dtype=dtype)
            elif site.tap not in self.logits_taps:
                del self.sites[name]
                self.refusals[name] = f"{site.info.path} didn't run in the engine's probing forward"


def _recorder(served: list[Site], seen: dict[str, Tensor]) -> taps.Handler:
    def record(tensors: taps.Tensors) -> None:
        for site in served:
            seen.setdefault(site.info.name, site.read(tensors, slice(0, 1)))

    return record
