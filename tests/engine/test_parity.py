"""Every site of every architecture against transformers with forward hooks, in float32; the streams in bfloat16 too.

Tolerance: 2e-5 of a site's largest value. Both sides sum float32 products in another order; over four layers that gives
1e-6 to 1e-5 here, edits included, and every mistake that these tests were seen to catch gave more than 1e-3.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec
import pytest
import torch
from checkpoints import CONFIGS
from torch import Tensor

pytest.importorskip("vllm")

from engine_parity import Edit, Engine, Reference, Values, error

from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo, SiteInfo

TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 0.08
"""Over four layers the roundings of both sides add up to 0.06 here; a residual stream that isn't whole gives 0.5."""
PROMPT = [int(i) for i in torch.randint(5, 400, (11,), generator=torch.Generator().manual_seed(3))]
OTHER = [int(i) for i in torch.randint(5, 400, (7,), generator=torch.Generator().manual_seed(4))]

ROUTER_OUTPUT = ".mlp.gate.output"
"""Read only here: vLLM routes by it, Hugging Face by the other elements of the same tuple."""

CASES = [*((arch, True) for arch in CONFIGS), ("llama", False), ("qwen3_moe", False)]


@dataclass
class Halves:
    """The same checkpoint on both sides in bfloat16: our catalogue, and the streams after each block."""

    catalogue: Catalogue
    ours: Values
    theirs: Values


@dataclass
class Pair:
    """The same checkpoint on both sides."""

    ours: Engine
    theirs: Reference
    halves: Halves
    number: int

    def reference(self, edits: dict[str, Edit], inplace: bool = False) -> Values:
        """transformers' values; the head's only for the last row, which is all that vLLM computes."""
        edits = {name: _last_row(edit) if name.startswith("lm_head.") else edit for name, edit in edits.items()}
        values = self.theirs.run(PROMPT, edits, self.ours.order, inplace)
        return {name: v[-1:] if name.startswith("lm_head.") else v for name, v in values.items()}

    @cached_property
    def sample(self) -> list[str]:
        """Sites that both have: one block's, and all outside of blocks."""
        blocks, theirs = self.ours.instrumented.blocks, self.reference({})
        shared = [name for name in self.ours.order if name in theirs]
        outside = [name for name in shared if not any(name.startswith(f"{block}.") for block in blocks)]
        names = [*outside, *(name for name in shared if name.startswith(f"{blocks[1]}."))]
        return [name for name in names if not name.endswith(ROUTER_OUTPUT)]

    @cached_property
    def third(self) -> list[str]:
        """Every third site of the sample, another third for each architecture: all kinds in turn, in a third of the time."""
        return self.sample[self.number % 3 :: 3]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'eager' if case[1] else 'compiled'}")
def pair(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], str]) -> Iterator[Pair]:
    arch, eager = request.param
    checkpoint = tiny_checkpoint(arch)
    theirs = Reference(checkpoint)
    halves = _halves(checkpoint)
    ours = Engine(checkpoint, eager)
    yield Pair(ours, theirs, halves, CASES.index(request.param))
    ours.close()
    gc.collect()


def _halves(checkpoint: str) -> Halves:
    """From an engine that is gone again: only one can be alive in a process."""
    reference = Reference(checkpoint, torch.bfloat16)
    engine = Engine(checkpoint, dtype="bfloat16")
    names = [f"{block}.output" for block in engine.instrumented.blocks]
    values = engine.run([PROMPT], {})
    halves = Halves(engine.catalogue, {name: values[name] for name in names}, reference.run(PROMPT, {}, names))
    engine.close()
    gc.collect()
    return halves


def test_every_site_reads_what_a_hook_sees(pair: Pair) -> None:
    ours, theirs = pair.ours.run([PROMPT], {}), pair.reference({})
    extra = {site.path for site in pair.ours.catalogue.sites if site.name not in theirs}
    around_decoder = (
        {"model"} if "model.decoder.output" in ours else set()
    )  # transformers' OPT calls the decoder itself
    assert extra - around_decoder <= set(pair.ours.instrumented.raw)
    assert _wrong(ours, theirs) == {}


def test_every_module_of_the_block_has_sites_or_a_reason(pair: Pair) -> None:
    known = {site.name for site in pair.ours.catalogue.sites}
    for module in pair.ours.catalogue.modules:
        for port in ("input", "output"):
            assert (f"{module.path}.{port}" in known) != bool(module.refusals.get(port)), (module.path, port)


def test_sites_stand_in_the_order_in_which_transformers_runs(pair: Pair) -> None:
    theirs = pair.reference({})
    assert [name for name in pair.ours.order if name in theirs] == pair.theirs.fired


def test_a_bfloat16_engine_has_the_sites_of_a_float32_one(pair: Pair) -> None:
    half, full = pair.halves.catalogue, pair.ours.catalogue
    assert [_but_dtype(site) for site in half.sites] == [_but_dtype(site) for site in full.sites]
    assert [_but_dtype(module) for module in half.modules] == [_but_dtype(module) for module in full.modules]


def test_the_residual_stream_in_bfloat16_is_transformers(pair: Pair) -> None:
    errors = {name: error(pair.halves.ours[name], value) for name, value in pair.halves.theirs.items()}
    assert len(errors) == len(pair.ours.instrumented.blocks)
    assert {name: e for name, e in errors.items() if not e < BFLOAT16_TOLERANCE} == {}


@pytest.mark.parametrize("change", ["all_rows", "last_row"])
def test_an_assignment_has_the_effect_of_a_hook_that_returns_the_value(pair: Pair, change: str) -> None:
    edit = _all_rows if change == "all_rows" else _last
    for name in pair.sample if change == "all_rows" else pair.third:
        ours, theirs = pair.ours.run([PROMPT], {name: edit}), pair.reference({name: edit})
        assert _wrong(ours, theirs) == {}, name


def test_an_edit_in_place_has_the_effect_of_one_in_a_hook_or_is_refused(pair: Pair) -> None:
    for name in pair.third:
        if name.startswith("lm_head.") or pair.ours.instrumented.sites[name].info.refuse_inplace:
            continue
        ours, theirs = pair.ours.run([PROMPT], {name: _all_rows}), pair.reference({name: _all_rows}, inplace=True)
        later = pair.ours.order[pair.ours.order.index(name) :]
        assert _wrong(ours, {n: value for n, value in theirs.items() if n in later}) == {}, name


def test_an_edit_leaves_a_neighbours_rows_bit_for_bit(pair: Pair) -> None:
    plain = pair.ours.run([OTHER, PROMPT], {})
    for name in pair.third:
        values = pair.ours.run([OTHER, PROMPT], {name: _all_rows}, edited=1, watched=0)
        assert all(torch.equal(values[n], plain[n]) for n in plain), name


def test_an_assignment_of_the_same_value_changes_no_bit(pair: Pair) -> None:
    plain = pair.ours.run([PROMPT], {})
    same = pair.ours.run([PROMPT], dict.fromkeys(pair.sample, torch.clone))
    assert all(torch.equal(same[name], plain[name]) for name in plain)


def test_an_ad_hoc_call_is_transformers_module(pair: Pair) -> None:
    modules = dict(pair.theirs.model.named_modules())
    draw = torch.Generator().manual_seed(6)
    for info in pair.ours.catalogue.modules:
        if info.refuse_call or info.path not in modules or info.path.endswith("embed_positions"):
            continue
        ids = torch.randint(0, 400, (1, 5), generator=draw)
        value = ids if info.call_dtype == "int64" else torch.randn(1, 5, info.call_in or 32, generator=draw)
        given = value.clone()
        ours = pair.ours.calls.call(info.path, [value])
        with torch.no_grad():
            theirs = modules[info.path](given)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        assert torch.equal(value, given), info.path
        assert error(ours.reshape(theirs.shape), theirs) < TOLERANCE, info.path


def _but_dtype(info: SiteInfo | ModuleInfo) -> SiteInfo | ModuleInfo:
    if isinstance(info, SiteInfo):
        return msgspec.structs.replace(info, dtype="")
    return msgspec.structs.replace(info, call_dtype="")


def _wrong(ours: Values, theirs: Values) -> dict[str, float]:
    errors = {name: error(ours[name], value) for name, value in theirs.items()}
    return {name: e for name, e in errors.items() if not e < TOLERANCE}


def _all_rows(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return (value + 7) % 400
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return value * 0.5 + 0.5 * value.abs().mean() * noise


def _last(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[-1] = changed[-1] * 1.5 + 0.1 if value.is_floating_point() else 9
    return changed


def _last_row(edit: Edit) -> Edit:
    return lambda value: torch.cat([value[:-1], edit(value[-1:])])
