"""Modules that vLLM runs in another grouping than Hugging Face: gated MLPs, and norms after a fused q/k/v linear.

Their sites share one tap that fires when the last of them has run, so that they can stand in Hugging Face's order
(`gate_proj`, `act_fn`, `up_proj`). What the tap's later values derive from its earlier ones is recomputed on a write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnsight_vllm.worker.layers import views
from nnsight_vllm.worker.model.hooks import Kept, Source, Tap
from nnsight_vllm.worker.model.modules import Part
from nnsight_vllm.worker.model.sites import Activation, Apply, Direct, Gate, Refresh, TensorSlice
from nnsight_vllm.worker.model.survey import Firing, Survey, is_same
from nnsight_vllm.worker.model.taps import Tensors

if TYPE_CHECKING:
    from nnsight_vllm.worker.model.placement import Placement

Hosts = dict[str, list[Part]]


@dataclass(frozen=True)
class Normed:
    """A norm right after a share of a fused linear: its input lies in that linear's output."""

    part: Part
    firing: Firing
    columns: tuple[int, int]


@dataclass(frozen=True)
class Refreshed:
    """`result = apply(source)` for the rows that changed."""

    source: TensorSlice
    result: TensorSlice
    apply: Apply

    def __call__(self, tensors: Tensors, rows: slice, changed: Tensor) -> None:
        if changed.numel():
            result = self.result.live(tensors, rows)
            result[changed] = self.apply(self.source.live(tensors, rows)[changed]).to(result.dtype)


def find_gated(survey: Survey, hosts: Hosts, model: nn.Module) -> dict[str, str]:
    """Gated activation -> the fused linear before it, where it alone reads that linear's output."""
    pairs = {}
    for host in hosts:
        fired = survey.of(host)
        if len(fired) != 1 or not views.is_gated(model.get_submodule(host)):
            continue
        fused = next((f for f in survey.firings if f.end == fired[0].start - 1), None)
        if fused is None or fused.path not in hosts or not _follows(survey, fired[0], fused):
            continue
        if _multiplies(model.get_submodule(host), hosts[host][0], fired[0].tensors()[0][1]):
            pairs[host] = fused.path
    return pairs


def _follows(survey: Survey, fired: Firing, fused: Firing) -> bool:
    """Whether a module takes another's whole output, and nothing else does."""
    output = views.first_tensor(fused.output)
    if output is None or not is_same(output, fired.tensors()[0][1]):
        return False
    return survey.is_exclusive(output, fused.end, fired.path)


def _multiplies(host: nn.Module, part: Part, like: Tensor) -> bool:
    """Whether the module is `activation(gate) * up` with transformers' activation, on numbers of our own.

    The survey's are no use: without a cache, attention leaves its output as the memory was.
    """
    half = like.shape[-1] // 2
    gate = torch.linspace(-4, 4, half, dtype=like.dtype, device=like.device)[None]
    up = torch.linspace(1, 3, half, dtype=like.dtype, device=like.device)[None]
    with torch.inference_mode():
        product = host.forward(torch.cat([gate, up], -1))
        expected = views.activation_of(part.module)(gate) * up
    return bool(torch.allclose(expected.float(), product.float(), rtol=0.02, atol=1e-3))


def find_normed(survey: Survey, hosts: Hosts, model: nn.Module) -> dict[str, tuple[str, list[Normed]]]:
    """Last norm of a group -> the fused linear, and the norms on its shares."""
    groups = {}
    for host, parts in hosts.items():
        fired = survey.of(host)
        if len(fired) != 1 or len(parts) < 2:
            continue
        norms = _norms_after(survey, hosts, model, fired[0])
        output = views.first_tensor(fired[0].output)
        if not norms or output is None:
            continue
        last = norms[-1].firing
        outputs = [(output, fired[0].end), *((views.first_tensor(n.firing.output), n.firing.end) for n in norms)]
        if all(t is not None and survey.is_untouched(t, since, last.end) for t, since in outputs):
            groups[last.path] = (host, norms)
    return groups


def _norms_after(survey: Survey, hosts: Hosts, model: nn.Module, fused: Firing) -> list[Normed]:
    home = fused.path.rpartition(".")[0]
    output = views.first_tensor(fused.output)
    found = []
    for firing in survey.firings:
        if firing.start < fused.end or firing.path.rpartition(".")[0] != home or firing.path not in hosts:
            continue
        if output is None or not views.is_norm(model.get_submodule(firing.path)):
            continue
        value = firing.tensors()[0][1]
        for columns in (part.columns for part in hosts[fused.path] if part.columns is not None):
            if is_same(output[..., columns[0] : columns[1]], value):
                found.append(Normed(hosts[firing.path][0], firing, columns))
    return found


def place_gated(place: Placement, firing: Firing, fused: Firing) -> None:
    """Gate, activation and up, at one tap after the product. The linear's input is kept for it."""
    gate_up, product = views.first_tensor(fused.output), views.first_tensor(firing.output)
    assert gate_up is not None and product is not None
    kept = [Kept(fused.path, Source("argument", 0))]
    tap = place.new_tap(firing.path, [Source("kept", 0)], [Source("argument", 0), Source("output")], kept=kept)
    given = place.slot(0, fused.tensors()[0][1])
    whole, result = place.hold(tap, 1, [gate_up, product], firing.end)
    half = gate_up.shape[-1] // 2
    activation = place.by_host[firing.path][0]
    apply = views.activation_of(activation.module)
    gate = Gate(firing.path, whole.part((0, half)), whole.part((half, 2 * half)), result, apply)
    linears = sorted(place.by_host[fused.path], key=lambda part: part.columns or (0, 0))
    for i, part in enumerate(linears):
        _share(place, part, tap, given, whole, len(linears) > 1, gate.refresh)
        if i == 0:
            place.add(Direct(place.info(activation.path, "input"), tap.number, gate.gate, gate.refresh))
            place.add(Activation(place.info(activation.path, "output"), tap.number, gate))
    place.add_raw_fused(fused.path, tap, whole, gate.refresh)


def place_normed(place: Placement, firing: Firing, fused: Firing, norms: list[Normed]) -> None:
    """Shares of a fused linear and the norms on them, at one tap after the last norm."""
    outputs = [views.first_tensor(fused.output), *(views.first_tensor(norm.firing.output) for norm in norms)]
    values = [value for value in outputs if value is not None]
    where = Source("output", 0 if isinstance(fused.output, tuple) else None)
    kept = [Kept(fused.path, Source("argument", 0)), Kept(fused.path, where)]
    kept += [Kept(norm.firing.path, Source("output")) for norm in norms[:-1]]
    write = [*(Source("kept", i) for i in range(1, len(kept))), Source("output")]
    tap = place.new_tap(firing.path, [Source("kept", 0)], write, kept=kept)
    given = place.slot(0, fused.tensors()[0][1])
    whole, *results = place.hold(tap, 1, values, firing.end)
    after = {norm.columns: _refreshed(place, norm, whole, slot) for norm, slot in zip(norms, results, strict=True)}
    by_path = {norm.part.path: norm for norm in norms}
    linears = {part.path: part for part in place.by_host[fused.path]}
    for path in place.in_reference_order([*linears, *by_path]):
        if path in linears:
            part = linears[path]
            _share(place, part, tap, given, whole, True, after.get(part.columns or (0, 0)))
        else:
            refreshed = after[by_path[path].columns]
            place.add(Direct(place.info(path, "input"), tap.number, refreshed.source, refreshed))
            place.add(Direct(place.info(path, "output"), tap.number, refreshed.result))
    place.add_raw_fused(fused.path, tap, whole, _all_of(list(after.values())))


def _share(
    place: Placement,
    part: Part,
    tap: Tap,
    given: TensorSlice,
    whole: TensorSlice,
    shared: bool,
    refresh: Refresh | None,
) -> None:
    """Input and output of one linear, which is some columns of a fused one."""
    assert part.host is not None
    slot = whole.part(part.columns)
    apply = views.columns_of(place.model.get_submodule(part.host), part.columns)
    place.add_argument(part, tap, given, slot, apply, shared, refresh)
    place.add(Direct(place.info(part.path, "output"), tap.number, slot, refresh))


def _refreshed(place: Placement, norm: Normed, whole: TensorSlice, result: TensorSlice) -> Refreshed:
    value = norm.firing.tensors()[0][1]
    heads = value.shape[2:] if whole.batched else value.shape[1:]
    source = whole.part(norm.columns).shaped((int(heads[0]), int(heads[1])) if len(heads) == 2 else None)
    return Refreshed(source, result, views.columns_of(place.model.get_submodule(norm.firing.path)))


def _all_of(refreshes: list[Refreshed]) -> Refresh:
    def refresh(tensors: Tensors, rows: slice, changed: Tensor) -> None:
        for one in refreshes:
            one(tensors, rows, changed)

    return refresh
