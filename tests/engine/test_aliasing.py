"""Places alias the model as tensors in a forward hook do: the same Python on both sides, compared by saves and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from nnsight_vllm.errors import RefusedError

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM

PROMPT = [5, 17, 33, 90, 41, 7, 8]
V = torch.linspace(-1, 1, 128)
ATOL = 2e-4  # float32, two blocks, two implementations of attention and of the norms


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], str]) -> str:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def model(engines: Engines, checkpoint: str) -> Iterator[VLLM]:
    engine = engines(checkpoint, enforce_eager=True, max_model_len=128, max_num_batched_tokens=64, max_num_seqs=32)
    yield engine
    engine.check_integrity()


def by_hook(reference: Any, path: str, edit: Callable[[Any], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers with `edit` in a forward hook: the value after it, and the last logits."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        value = (output[0] if isinstance(output, tuple) else output)[0]
        edit(value)
        seen.append(value.clone())

    handle = reference.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPT])).logits[0, -1]
    handle.remove()
    return seen[0], logits


def by_trace(model: VLLM, path: str, edit: Callable[[Any], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        output = model.get(path).output
        edit(output[0] if isinstance(output, tuple) else output)
        after = model.get(path).output
        after = (after[0] if isinstance(after, tuple) else after).save()
        logits = model.logits.output.save()
    return after, logits[0]


def add_to_the_row_of_the_largest(h: Any) -> None:
    i = h.norm(dim=-1).argmax()
    h[i] += V


def change_a_part_of_that_row(h: Any) -> None:
    row = h[h.norm(dim=-1).argmax()]
    row[:5] = 0
    row *= 2


def change_rows_up_to_a_computed_one(h: Any) -> None:
    n = (h[:, 0] > 0).sum()
    h[:n] += 1
    h[n:].zero_()


def change_every_row_in_turn(h: Any) -> None:
    for i, row in enumerate(h):
        row += i
        row[:3] = 0


def change_by_a_mask(h: Any) -> None:
    h[h > 0.5] = 0
    h[h[:, 0] > 0] += 1
    h.masked_fill_(h < -1, value=0.25)


def change_through_views_of_views(h: Any) -> None:
    h.view(7, 4, 32)[:, 1].transpose(0, 1)[3:] -= 2
    h.T[5] = V[:7]
    h.chunk(2, dim=-1)[1].mul_(0.5)
    h.unbind(0)[2].add_(V)
    h[None, 1:3, ...][0, 1, ::2] = 3


def change_by_index_lists(h: Any) -> None:
    h[[0, 2]] += V
    h[torch.tensor([1, 3]), 4:8] = 7
    h.index_fill_(1, torch.tensor([2, 9]), 1.5)
    h.scatter_(1, torch.tensor([[0], [1]]), 5.0)


def write_with_out(h: Any) -> None:
    torch.add(h[0], 1, out=h[1])
    torch.mul(h[2], h[3], out=h[2])


def copies_do_not_write(h: Any) -> None:
    c = h.clone()
    c[:] = 0
    (h + 1).zero_()
    h[[0, 1]].zero_()
    h.to("cpu", copy=True).zero_()
    h.float().mul(0)


def swap_rows(h: Any) -> None:
    h[[0, 1]] = h[[1, 0]]
    h[2], h[3] = h[3].clone(), h[2].clone()


def use_the_value_in_its_own_change(h: Any) -> None:
    h -= h.mean(0)
    h[:] = F.relu(h) + torch.where(h > 0, h, h * 0.5)
    h[-1] = h[:-1].sum(0) / h.shape[0]


EDITS = [
    value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).get("h")
]


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_place_is_what_a_forward_hook_does(
    model: VLLM, reference: Any, path: str, edit: Callable[[Any], Any]
) -> None:
    value, logits = by_trace(model, path, edit)
    expected_value, expected_logits = by_hook(reference, path, edit)
    torch.testing.assert_close(value, expected_value, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(logits, expected_logits, atol=ATOL, rtol=1e-4)


def test_branches_and_loops_give_places(model: VLLM, reference: Any) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        h = model.model.layers[0].output[0]
        if h[0, 0] > h[1, 0]:  # noqa: SIM108
            row = h[0]
        else:
            row = h[1]
        row[:5] = 0
        for i in h.norm(dim=-1).topk(3).indices:
            h[i] += V
        after = model.model.layers[0].output[0].save()
        logits = model.logits.output.save()

    def edit(h: torch.Tensor) -> None:
        row = h[0] if h[0, 0] > h[1, 0] else h[1]
        row[:5] = 0
        for i in h.norm(dim=-1).topk(3).indices:
            h[i] += V

    value, expected = by_hook(reference, "model.layers.0", edit)
    torch.testing.assert_close(after, value, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(logits[0], expected, atol=ATOL, rtol=1e-4)


def test_views_of_merged_values_and_of_loop_items_are_places(model: VLLM, reference: Any) -> None:
    with model.trace(PROMPT, temperature=0.0, max_tokens=1):
        h = model.model.layers[0].output[0]
        x = h[1:] if h[0, 0] > h[1, 0] else h[:-1]
        x[1:].T[0] += 4
        for row in h:
            for part in row.view(4, 32)[:2]:
                part *= 0.5
        v = h[h.norm(dim=-1).argmax()]
        v += V
        v[:2] = 0
        after = model.model.layers[0].output[0].save()
        logits = model.logits.output.save()

    def edit(h: torch.Tensor) -> None:
        x = h[1:] if h[0, 0] > h[1, 0] else h[:-1]
        x[1:].T[0] += 4
        for row in h:
            for part in row.view(4, 32)[:2]:
                part *= 0.5
        v = h[h.norm(dim=-1).argmax()]
        v += V
        v[:2] = 0

    value, expected = by_hook(reference, "model.layers.0", edit)
    torch.testing.assert_close(after, value, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(logits[0], expected, atol=ATOL, rtol=1e-4)


def test_a_constant_that_a_branch_chose_is_changed_in_the_request_only(model: VLLM) -> None:
    for _ in range(2):
        with model.trace(PROMPT, temperature=0.0, max_tokens=1):
            h = model.model.layers[0].output[0]
            x: Any = h[0] if h.sum() > 1e9 else V
            x += 1
            changed = x.save()
        assert torch.equal(changed, V + 1)


@pytest.mark.parametrize(
    "code",
    [
        "c.__setitem__(0, h[0])",
        "c.add_(h[0])",
        "torch.add(h[0], 1, out=c)",
        "F.relu(h, inplace=True)",
        "F.relu(h, True)",
        "torch.max(h, -1, out=(h[:, 0], c))",
        "setattr(h, 'data', c)",
    ],
)
def test_changes_that_could_not_reach_the_model_are_refused(model: VLLM, code: str) -> None:
    with pytest.raises(RefusedError, match="<string>:1"), model.trace(PROMPT, max_tokens=1):
        eval(code, {"h": model.model.layers[0].output[0], "c": torch.zeros(128), "torch": torch, "F": F})
