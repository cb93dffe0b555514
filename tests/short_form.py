"""Short forms for tests: lowered for two models that are none, and run through the executor that the engine has."""

from __future__ import annotations

from typing import Any

import fake_model
import safetensors.torch
import torch
from torch import Tensor
from toy import HIDDEN, Toy, toy_catalogue

from nnsight_vllm.graph.codec import digest, encode
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.full import Lowered
from nnsight_vllm.server.schema import Intervention
from nnsight_vllm.server.short import lower
from nnsight_vllm.trace.tree import Tree

ROWS, STEPS = 3, 5
VECTOR, OTHER = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, -1.0, 2.0])
DOWN, UP = torch.stack([VECTOR, OTHER]), torch.stack([OTHER, VECTOR], 1)
TENSORS = {"v": VECTOR, "w": OTHER, "down": DOWN, "up": UP, "long": torch.ones(7), "whole": torch.ones(4).long()}
STORED = {name: safetensors.torch.save({"tensor": tensor}) for name, tensor in TENSORS.items()}
TOY, FAKE = Tree(toy_catalogue()), Tree(fake_model.catalogue())


def tensor_of(reference: str, param: str) -> tuple[str, bytes]:
    if reference not in STORED:
        raise Refused(f"no tensor {reference!r}", param)
    return digest(STORED[reference]), STORED[reference]


def lowered(tree: Tree = TOY, rows: int = ROWS, max_tokens: int | None = STEPS, **body: Any) -> Lowered:
    return lower(Intervention(**body), tree, rows, max_tokens, tensor_of)


class Rows(Toy):
    """The toy, with rows that differ."""

    def _increments(self, rows: int) -> Tensor:
        return increments(rows)


def increments(rows: int) -> Tensor:
    return torch.arange(1.0, rows * HIDDEN + 1).reshape(rows, HIDDEN) / 4


def run(sent: Lowered, rows: int = ROWS, steps: int = STEPS) -> dict[str, Any]:
    toy = Rows()
    toy.store.put(sent.tensors.values())
    saved = toy.run(encode(sent.graph), steps, rows)
    assert not [delta.failure for delta in toy.received.get("r", ()) if delta.failure]
    return saved


def unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


OPS: list[tuple[dict[str, Any], Any]] = [
    ({"op": "add", "tensor": "v", "scale": 4.0}, lambda h: h + 4 * VECTOR),
    ({"op": "add", "tensor": "v"}, lambda h: h + VECTOR),
    ({"op": "scale", "scale": -2}, lambda h: h * -2),
    ({"op": "set", "tensor": "v"}, lambda h: VECTOR.clone()),
    ({"op": "ablate"}, lambda h: h * 0),
    (
        {"op": "project_out", "tensor": "v", "scale": 0.5},
        lambda h: h - 0.5 * (h @ VECTOR) / (VECTOR @ VECTOR) * VECTOR,
    ),
    (
        {"op": "clamp", "tensor": "v", "low": 3.0, "high": 4.0},
        lambda h: h + ((h @ unit(VECTOR)).clamp(3.0, 4.0) - h @ unit(VECTOR)) * unit(VECTOR),
    ),
    (
        {"op": "clamp", "tensor": "v", "high": 1.0},
        lambda h: h + ((h @ unit(VECTOR)).clamp(max=1.0) - h @ unit(VECTOR)) * unit(VECTOR),
    ),
    ({"op": "norm_add", "tensor": "v", "scale": 2.0}, lambda h: unit(h + 2 * VECTOR) * h.norm()),
    ({"op": "low_rank", "down": "down", "up": "up", "scale": 0.5}, lambda h: h + 0.5 * UP @ (DOWN @ h)),
    (
        {"op": "sae_clamp", "encoder": "v", "decoder": "w", "bias": 0.25, "value": 2.0},
        lambda h: h + (2.0 - (VECTOR @ h + 0.25).relu()) * OTHER,
    ),
]


def sent_save(positions: Any) -> list[dict[str, Any]]:
    return [{"name": "h", "site": "2.output", "positions": positions}]
