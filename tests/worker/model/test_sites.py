"""Sites and taps on plain tensors, and what an engine with fewer sites has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from engine_parity import Engine

from nnsight_vllm.errors import EngineSettingError, RefusedError
from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.modules import unshare
from nnsight_vllm.worker.model.sites import Activation, Argument, Direct, Gate, ResidualStream, TensorSlice
from nnsight_vllm.worker.model.taps import Tensors

ROWS = slice(2, 5)
INFO = SiteInfo("m.output", "m", "output", 0, (None, 4), "float32")


@pytest.fixture(autouse=True)
def no_handlers() -> Iterator[None]:
    yield
    taps.ACTIVE.clear()
    taps.SCRATCH.clear()
    taps.take_failures()


def _tensors(*widths: int) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(7, width, generator=draw) for width in widths)


def _others(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:2], tensor[5:]]).clone()


def test_a_read_is_a_copy_of_the_requests_rows() -> None:
    tensors = _tensors(4)
    value = Direct(INFO, 0, TensorSlice(0)).read(tensors, ROWS)
    assert torch.equal(value, tensors[0][ROWS])
    value.zero_()
    assert not torch.equal(value, tensors[0][ROWS])


def test_a_shared_activation_is_another_object_in_every_place_and_the_shared_one_is_left_alone() -> None:
    shared = torch.nn.ReLU()
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "own": torch.nn.Tanh()})
    own = model["own"]
    unshare(model)
    assert len({id(shared), id(model["a"]), id(model["b"])}) == 3
    assert model["own"] is own


def test_a_tensor_with_a_batch_of_one_reads_and_writes_without_it() -> None:
    (plain,) = _tensors(4)
    tensors = (plain[None].clone(),)
    site = Direct(INFO, 0, TensorSlice(0, batched=True))
    old = site.read(tensors, ROWS)
    site.write(tensors, ROWS, old, old + 1)
    assert torch.equal(tensors[0][0, ROWS], plain[ROWS] + 1)
    assert torch.equal(_others(tensors[0][0]), _others(plain))


def test_a_stream_is_the_sum_and_an_untouched_element_keeps_its_two_parts() -> None:
    tensors = _tensors(4, 4)
    hidden, residual = (tensor.clone() for tensor in tensors)
    site = ResidualStream(INFO, 0, TensorSlice(0), TensorSlice(1))
    old = site.read(tensors, ROWS)
    assert torch.equal(old, (hidden + residual)[ROWS])
    new = old.clone()
    new[1, 2] = 9.0
    site.write(tensors, ROWS, old, new)
    residual[3, 2], hidden[3, 2] = 9.0, 0.0
    assert torch.equal(tensors[0], hidden)
    assert torch.equal(tensors[1], residual)


def test_a_nan_written_into_a_stream_counts_as_a_change() -> None:
    tensors = _tensors(4, 4)
    site = ResidualStream(INFO, 0, TensorSlice(0), TensorSlice(1))
    old = site.read(tensors, ROWS)
    new = old.clone()
    new[0, 0] = float("nan")
    site.write(tensors, ROWS, old, new)
    assert site.read(tensors, ROWS)[0, 0].isnan()
    assert int(site.read(tensors, ROWS).isnan().sum()) == 1


def test_what_is_added_to_a_streams_addend_shows_in_its_value() -> None:
    tensors = _tensors(4, 4)
    site = ResidualStream(INFO, 0, TensorSlice(0), TensorSlice(1))
    old = site.read(tensors, ROWS)
    addend = site.addend(tensors, ROWS)
    assert addend is not None
    addend += 1.0
    assert torch.allclose(site.read(tensors, ROWS), old + 1.0)


def test_an_assigned_input_recomputes_the_output_of_changed_rows_only() -> None:
    tensors = _tensors(4, 6)
    given, output = (tensor.clone() for tensor in tensors)
    weight = torch.randn(4, 3)
    site = Argument(INFO, 0, TensorSlice(0), TensorSlice(1, columns=(3, 6)), lambda value: value @ weight)
    old = site.read(tensors, ROWS)
    new = old.clone()
    new[2] += 1
    site.write(tensors, ROWS, old, new)
    output[4, 3:] = new[2] @ weight
    assert torch.equal(tensors[0], given)
    assert torch.allclose(tensors[1], output)
    assert torch.equal(tensors[1][:4], output[:4])


def _gate() -> tuple[Gate, Tensors]:
    (gate_up,) = _tensors(8)
    product = torch.nn.functional.silu(gate_up[:, :4]) * gate_up[:, 4:]
    gate = Gate(
        "m", TensorSlice(0, columns=(0, 4)), TensorSlice(0, columns=(4, 8)), TensorSlice(1), torch.nn.functional.silu
    )
    return gate, (gate_up, product)


def test_an_activation_reads_without_up_and_a_write_scales_up() -> None:
    gate, tensors = _gate()
    site = Activation(INFO, 0, gate)
    old = site.read(tensors, ROWS)
    assert torch.equal(old, torch.nn.functional.silu(tensors[0][ROWS, :4]))
    site.write(tensors, ROWS, old, torch.ones_like(old))
    assert torch.equal(tensors[1][ROWS], tensors[0][ROWS, 4:])


def test_up_written_after_the_activation_multiplies_the_written_activation() -> None:
    gate, tensors = _gate()
    activation = Activation(INFO, 0, gate)
    up = Direct(INFO, 0, gate.up, gate.recompute)
    before = _others(tensors[1])
    old = activation.read(tensors, ROWS)
    activation.write(tensors, ROWS, old, torch.full_like(old, 2.0))
    old = up.read(tensors, ROWS)
    up.write(tensors, ROWS, old, torch.full_like(old, 3.0))
    assert torch.equal(tensors[1][ROWS], torch.full((3, 4), 6.0))
    assert torch.equal(_others(tensors[1]), before)


def test_a_tap_is_silent_without_a_handler_and_while_suspended() -> None:
    seen: list[int] = []
    operator = taps.operator(1, 1)
    operator(*_tensors(2, 2), 5)
    taps.ACTIVE[5] = lambda tensors: seen.append(len(tensors))
    operator(*_tensors(2, 2), 5)
    operator(*_tensors(2, 2), 6)
    with taps.suspended():
        operator(*_tensors(2, 2), 5)
    assert seen == [2]


def test_a_handlers_exception_stays_inside_the_tap() -> None:
    def fail(tensors: Tensors) -> None:
        raise ValueError("ours")

    taps.ACTIVE[5] = fail
    taps.operator(0, 1)(*_tensors(2), 5)
    assert [str(error) for error in taps.take_failures()] == ["ours"]
    assert taps.take_failures() == []


def test_a_compiled_function_keeps_the_edits_of_a_tap() -> None:
    operator = taps.operator(0, 1)

    def function(x: Tensor) -> Tensor:
        y = x * 2
        operator(y, 5)
        return y + 1

    def zero_one_row(tensors: Tensors) -> None:
        tensors[0][1:2].zero_()

    taps.ACTIVE[5] = zero_one_row
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.tensor([3.0, 1.0, 3.0]))


@pytest.fixture
def start(tiny_checkpoint: Callable[[str], str]) -> Iterator[Callable[..., Engine]]:
    """`start(selection, arch)`: an engine that the test needn't close."""
    started: list[Engine] = []

    def start(selection: str | list[str], arch: str = "llama") -> Engine:
        started.append(Engine(tiny_checkpoint(arch), selection=selection))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt"])
def test_the_blocks_setting_has_blocks_embeddings_final_norm_and_head(start: Callable[..., Engine], arch: str) -> None:
    engine = start("blocks", arch)
    paths = {site.path for site in engine.catalogue.sites}
    blocks = set(engine.instrumented.blocks)
    assert blocks < paths
    assert {path.rpartition(".")[2] for path in paths - blocks} <= {
        *("model", "decoder", "norm", "final_layer_norm", "lm_head", "embed_tokens", "embed_positions")
    }
    inside = next(m for m in engine.catalogue.modules if m.path.endswith("0.self_attn"))
    assert "start it with sites='all'" in inside.refusals["output"]


def test_patterns_choose_modules(start: Callable[..., Engine]) -> None:
    engine = start(["model.layers.[12].mlp.up_proj"])
    names = [site.name for site in engine.catalogue.sites]
    assert names == [f"model.layers.{i}.mlp.up_proj.{port}" for i in (1, 2) for port in ("input", "output")]
    assert engine.instrumented.num_taps == 2


def test_a_pattern_that_matches_no_module_is_refused(start: Callable[..., Engine]) -> None:
    with pytest.raises(EngineSettingError, match=r"'model\.layer\.\*' matches no module.*'model\.layers\.0' is one"):
        start(["model.layer.*"])


def test_calls_take_any_leading_dimensions_cast_and_refuse_what_does_not_fit(start: Callable[..., Engine]) -> None:
    call = start("all").calls.call
    assert call("model.layers.0.self_attn.k_proj", [torch.zeros(2, 3, 128)]).shape == (2, 3, 64)
    assert call("model.norm", [torch.ones(128, dtype=torch.float64)]).dtype == torch.float32
    assert call("lm_head", [torch.zeros(128)]).shape == (500,)
    with pytest.raises(RefusedError, match=r"takes \[\.\.\., 128\], not \[3, 64\]"):
        call("lm_head", [torch.zeros(3, 64)])
    with pytest.raises(RefusedError, match="attention reads the request's cache"):
        call("model.layers.0.self_attn", [torch.zeros(3, 128)])
    with pytest.raises(IndexError, match="the table has 500"):
        call("model.embed_tokens", [torch.tensor([500])])
