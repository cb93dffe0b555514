"""Modules that vLLM runs in another grouping than Hugging Face: gated MLPs, and norms after a fused q/k/v linear.

Their sites share one tap that fires when the last of them has run, so that they can stand in Hugging Face's order
(`gate_proj`, `act_fn`, `up_proj`). What the tap's later values derive from its earlier ones is recomputed on a write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsight_vllm.worker.layers.functions import Apply, Columns, function_of
from nnsight_vllm.worker.layers.layer_kinds import first_tensor, is_gated, is_norm
from nnsight_vllm.worker.model.hooks import Kept, Source, Tap
from nnsight_vllm.worker.model.modules import HFModule
from nnsight_vllm.worker.model.site_plan import SitePlan, first_output, site_info, slice_of
from nnsight_vllm.worker.model.sites import Activation, Argument, Direct, Gate, Recompute, TensorSlice
from nnsight_vllm.worker.model.survey import Firing, Survey, is_same
from nnsight_vllm.worker.model.taps import Tensors

ByHost = dict[str, list[HFModule]]


@dataclass(frozen=True)
class Normed:
    """A norm right after a share of a fused linear: its input lies in that linear's output."""

    hf: HFModule
    firing: Firing
    columns: Columns


@dataclass(frozen=True)
class Derived:
    """`result = apply(source)`, recomputed for the rows that changed."""

    source: TensorSlice
    result: TensorSlice
    apply: Apply

    def recompute(self, tensors: Tensors, rows: slice, changed: Tensor) -> None:
        if changed.numel():
            result = self.result.live(tensors, rows)
            result[changed] = self.apply(self.source.live(tensors, rows)[changed]).to(result.dtype)


def find_gated(survey: Survey, hosts: ByHost, model: nn.Module) -> dict[str, str]:
    """Gated activation -> the fused linear before it, where it alone reads that linear's output."""
    pairs = {}
    for host in hosts:
        fired = survey.of(host)
        if len(fired) != 1 or not is_gated(model.get_submodule(host)):
            continue
        fused = next((f for f in survey.firings if f.end == fired[0].start - 1), None)
        if fused is None or fused.path not in hosts or not _follows(survey, fired[0], fused):
            continue
        if _multiplies(model.get_submodule(host), hosts[host][0], fired[0].tensors()[0][1]):
            pairs[host] = fused.path
    return pairs


def _follows(survey: Survey, fired: Firing, fused: Firing) -> bool:
    """Whether a module takes another's whole output, and nothing else does."""
    output = first_tensor(fused.output)
    if output is None or not is_same(output, fired.tensors()[0][1]):
        return False
    return survey.is_exclusive(output, fused.end, fired.path)


def _multiplies(host: nn.Module, activation: HFModule, like: Tensor) -> bool:
    """Whether the module is `activation(gate) * up` with transformers' activation, on numbers of our own.

    The survey's are no use: without a cache, attention leaves its output as the memory was.
    """
    half = like.shape[-1] // 2
    gate = torch.linspace(-4, 4, half, dtype=like.dtype, device=like.device)[None]
    up = torch.linspace(1, 3, half, dtype=like.dtype, device=like.device)[None]
    with torch.inference_mode():
        product = host.forward(torch.cat([gate, up], -1))
        expected = activation.module(gate) * up
    return bool(torch.allclose(expected.float(), product.float(), rtol=0.02, atol=1e-3))


def find_normed(survey: Survey, hosts: ByHost, model: nn.Module) -> dict[str, tuple[str, list[Normed]]]:
    """Last norm of a group -> the fused linear, and the norms on its shares."""
    groups = {}
    for host, linears in hosts.items():
        fired = survey.of(host)
        if len(fired) != 1 or len(linears) < 2:
            continue
        norms = _norms_after(survey, hosts, model, fired[0])
        output = first_tensor(fired[0].output)
        if not norms or output is None:
            continue
        last = norms[-1].firing
        outputs = [(output, fired[0].end), *((first_tensor(n.firing.output), n.firing.end) for n in norms)]
        if all(t is not None and survey.is_untouched(t, since, last.end) for t, since in outputs):
            groups[last.path] = (host, norms)
    return groups


def _norms_after(survey: Survey, hosts: ByHost, model: nn.Module, fused: Firing) -> list[Normed]:
    home = fused.path.rpartition(".")[0]
    output = first_tensor(fused.output)
    if output is None:
        return []
    shares = {hf.columns: output[..., hf.columns[0] : hf.columns[1]] for hf in hosts[fused.path] if hf.columns}
    return [
        Normed(hosts[firing.path][0], firing, columns)
        for firing in survey.firings
        if firing.start >= fused.end and firing.path.rpartition(".")[0] == home and firing.path in hosts
        if is_norm(model.get_submodule(firing.path))
        for columns, share in shares.items()
        if is_same(share, firing.tensors()[0][1])
    ]


def place_gated(plan: SitePlan, firing: Firing, fused: Firing) -> None:
    """Gate, activation and up, at one tap after the product. The linear's input is kept for it."""
    gate_up, product = first_tensor(fused.output), first_tensor(firing.output)
    assert gate_up is not None and product is not None
    kept = [Kept(fused.path, Source("argument", 0))]
    tap = plan.new_tap(firing.path, [Source("kept", 0)], [Source("argument", 0), Source("output")], kept=kept)
    given = slice_of(0, fused.tensors()[0][1])
    whole, result = plan.hold(tap, 1, [gate_up, product], firing.end)
    half = gate_up.shape[-1] // 2
    activation = plan.by_host[firing.path][0]
    gate = Gate(firing.path, whole.part((0, half)), whole.part((half, 2 * half)), result, activation.module)
    linears = sorted(plan.by_host[fused.path], key=lambda hf: hf.columns or (0, 0))
    for i, linear in enumerate(linears):
        _place_share(plan, linear, tap, given, whole, gate.recompute)
        if i == 0:
            plan.add(Direct(site_info(activation.path, "input"), tap.number, gate.gate, gate.recompute))
            plan.add(Activation(site_info(activation.path, "output"), tap.number, gate))
    plan.add_raw_fused(fused.path, tap, whole, gate.recompute)


def place_normed(plan: SitePlan, firing: Firing, fused: Firing, norms: list[Normed]) -> None:
    """Shares of a fused linear and the norms on them, at one tap after the last norm."""
    outputs = [first_tensor(fused.output), *(first_tensor(norm.firing.output) for norm in norms)]
    values = [value for value in outputs if value is not None]
    kept = [Kept(fused.path, Source("argument", 0)), Kept(fused.path, first_output(fused))]
    kept += [Kept(norm.firing.path, Source("output")) for norm in norms[:-1]]
    write = [*(Source("kept", i) for i in range(1, len(kept))), Source("output")]
    tap = plan.new_tap(firing.path, [Source("kept", 0)], write, kept=kept)
    given = slice_of(0, fused.tensors()[0][1])
    whole, *results = plan.hold(tap, 1, values, firing.end)
    derived = {norm.columns: _derived(plan, norm, whole, result) for norm, result in zip(norms, results, strict=True)}
    by_path = {norm.hf.path: norm for norm in norms}
    linears = {hf.path: hf for hf in plan.by_host[fused.path]}
    for path in plan.in_reference_order([*linears, *by_path]):
        if path in linears:
            after = derived.get(linears[path].columns or (0, 0))
            _place_share(plan, linears[path], tap, given, whole, None if after is None else after.recompute)
        else:
            norm = derived[by_path[path].columns]
            plan.add(Direct(site_info(path, "input"), tap.number, norm.source, norm.recompute))
            plan.add(Direct(site_info(path, "output"), tap.number, norm.result))
    plan.add_raw_fused(fused.path, tap, whole, _all_of(list(derived.values())))


def _place_share(
    plan: SitePlan, hf: HFModule, tap: Tap, given: TensorSlice, whole: TensorSlice, recompute: Recompute | None
) -> None:
    """Input and output of one linear, which is some columns of a fused one."""
    assert hf.host is not None
    share = whole.part(hf.columns)
    apply = function_of(plan.model.get_submodule(hf.host), hf.columns)
    argument = Argument(site_info(hf.path, "input"), tap.number, given, share, apply, recompute)
    plan.add_argument(hf, argument, is_shared=len(plan.by_host[hf.host]) > 1)
    plan.add(Direct(site_info(hf.path, "output"), tap.number, share, recompute))


def _derived(plan: SitePlan, norm: Normed, whole: TensorSlice, result: TensorSlice) -> Derived:
    value = norm.firing.tensors()[0][1]
    heads = value.shape[2:] if whole.batched else value.shape[1:]
    source = whole.part(norm.columns).shaped((int(heads[0]), int(heads[1])) if len(heads) == 2 else None)
    return Derived(source, result, function_of(plan.model.get_submodule(norm.firing.path)))


def _all_of(derived: list[Derived]) -> Recompute:
    def recompute(tensors: Tensors, rows: slice, changed: Tensor) -> None:
        for one in derived:
            one.recompute(tensors, rows, changed)

    return recompute
