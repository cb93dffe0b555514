"""The cases that the throughput table holds, each written as a user would write it.

Every work draws its constants from the job's seed, outside of the clock: a round's vectors are as new to the engine as its
prompts. What is saved is looked at inside of the clock: the length of each saved value, and an element of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from messages import Delivered, Host, Job, Sites
from torch import Tensor

Run = Callable[[], Delivered]


@dataclass(frozen=True)
class Case:
    """`is_saving`: every request brings values home; `is_editing`: it changes what the engine generates."""

    name: str
    title: str
    bar: float | None
    sites: Sites = "all"
    is_saving: bool = False
    is_editing: bool = True
    options: dict[str, int] = field(default_factory=dict)
    function: str = ""

    @property
    def work(self) -> str:
        return f"cases:{self.function or self.name}"

    @property
    def num_rounds(self) -> int:
        """A high bar is close to the noise and needs more rounds."""
        return 15 if self.bar is not None and self.bar >= 0.95 else 5


CASES = [
    Case("idle", 'idle, `sites="all"`', 0.98, is_editing=False),
    Case("idle_blocks", 'idle, `sites="blocks"`', None, sites="blocks", is_editing=False, function="idle"),
    Case("add_1", "add a different vector at one block, every token", 0.96),
    Case("add_30", "add a different vector at all 30 blocks, every token", 0.90),
    Case("save_30", "save the last token's state at 30 blocks, every step", 0.88, is_saving=True, is_editing=False),
    Case("gated", "gated projection and top-8 of a 4,096-feature encoder saved, one structure", 0.85, is_saving=True),
    Case("structures", "32 different structures at one site", 0.80, options={"structures": 32, "operations": 5}),
    Case("logits", "logits: ban list, bias and saved top-5, every step", 0.93, is_saving=True),
]

NUM_FEATURES = 4096


def plain(host: Host, job: Job) -> Run:
    """Stock vLLM, the baseline of every case."""
    return _generate(host.engine, job)


def idle(host: Host, job: Job) -> Run:
    """The same call on our engine."""
    return _generate(host.engine.llm, job)


def add_1(host: Host, job: Job) -> Run:
    """A vector of the request's own into the residual stream of one block."""
    return _steer(host, job, [host.num_layers // 3])


def add_30(host: Host, job: Job) -> Run:
    """A vector of the request's own into the residual stream of every block."""
    return _steer(host, job, list(range(host.num_layers)))


def save_30(host: Host, job: Job) -> Run:
    """The last token's residual stream after every block, at every step."""
    model = host.engine

    def run() -> Delivered:
        done, states = [], []
        with model.trace(**job.sampling) as tracer:
            for prompt in job.prompts:
                with tracer.invoke(prompt):
                    saved: list[Any] = [_nv().list().save() for _ in model.model.layers]
                    with tracer.all():
                        for state, layer in zip(saved, model.model.layers, strict=True):
                            state.append(layer.output[0][-1])
                    states.append(saved)
                    done.append(tracer.result.save())
        complete = [all(look(state, job.num_tokens, lambda row: row[0]) for state in saved) for saved in states]
        return Delivered(_tokens(done), sum(complete))

    return run


def gated(host: Host, job: Job) -> Run:
    """Project a direction out where another one is active; save the strongest features of a shared encoder."""
    draw = Draw(job)
    directions, probes = draw.vectors(host), draw.vectors(host)
    thresholds = (torch.randn(len(job.prompts), generator=draw.generator) * 0.01).tolist()
    features = encoder(host)
    model, block = host.engine, host.num_layers // 3

    def run() -> Delivered:
        done, found = [], []
        with model.trace(**job.sampling) as tracer:
            for prompt, d, p, t in zip(job.prompts, directions, probes, thresholds, strict=True):
                with tracer.invoke(prompt):
                    tops: Any = _nv().list().save()
                    with tracer.all():
                        h = model.model.layers[block].output[0]
                        gate = (h @ p) > t
                        h -= ((h @ d) * gate)[:, None] * d
                        tops.append((h @ features).topk(8))
                    found.append(tops)
                    done.append(tracer.result.save())
        return Delivered(_tokens(done), sum(look(tops, job.num_tokens, lambda top: top[0][-1, 0]) for tops in found))

    return run


def structures(host: Host, job: Job) -> Run:
    """Programs that differ in their operations, not only in their constants; `structures` of them, in turn."""
    vectors = Draw(job).vectors(host) * 0.1
    model, block = host.engine, host.num_layers // 3
    num_structures, num_operations = job.options["structures"], job.options["operations"]

    def run() -> Delivered:
        done = []
        with model.trace(**job.sampling) as tracer:
            for i, (prompt, vector) in enumerate(zip(job.prompts, vectors, strict=True)):
                with tracer.invoke(prompt):
                    with tracer.all():
                        apply_structure(i % num_structures, num_operations, model.model.layers[block].output[0], vector)
                    done.append(tracer.result.save())
        return Delivered(_tokens(done))

    return run


def logits(host: Host, job: Job) -> Run:
    """Ban 100 tokens, bias 20, save the five best: different ones for every request."""
    draw = Draw(job)
    banned, biased = draw.ids(host.vocab, 100), draw.ids(host.vocab, 20)
    biases = torch.randn(len(job.prompts), 20, generator=draw.generator) * 4
    model = host.engine

    def run() -> Delivered:
        done, found = [], []
        with model.trace(**job.sampling) as tracer:
            for prompt, ban, ids, bias in zip(job.prompts, banned, biased, biases, strict=True):
                with tracer.invoke(prompt):
                    tops: Any = _nv().list().save()
                    with tracer.all():
                        scores = model.logits.output
                        scores[:, ban] = float("-inf")
                        scores[:, ids] += bias
                        tops.append(scores.topk(5))
                    found.append(tops)
                    done.append(tracer.result.save())
        return Delivered(_tokens(done), sum(look(tops, job.num_tokens, lambda top: top[0][0, 0]) for tops in found))

    return run


# Pairs of like cost. A structure's number says, bit by bit, which of each pair it has.
_PAIRS: list[tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any]]] = [
    (lambda h, v: h.add_(v), lambda h, v: h.sub_(v)),
    (lambda h, v: h.mul_(0.99), lambda h, v: h.div_(1.01)),
    (lambda h, v: h.clamp_min_(-900.0), lambda h, v: h.clamp_max_(900.0)),
    (lambda h, v: h.add_((h @ v)[:, None] * v), lambda h, v: h.sub_((h @ v)[:, None] * v)),
    (lambda h, v: h.add_(h.tanh() * 0.1), lambda h, v: h.add_(h.sigmoid() * 0.1)),
    (lambda h, v: h.add_(h.mean(-1, keepdim=True)), lambda h, v: h.add_(h.std(-1, keepdim=True))),
    (lambda h, v: h.add_(h.sin() * 0.1), lambda h, v: h.add_(h.cos() * 0.1)),
    (lambda h, v: h.add_(h.relu() * 0.01), lambda h, v: h.add_(h.abs() * 0.01)),
]


def apply_structure(number: int, num_operations: int, h: Any, vector: Tensor) -> None:
    """The operations of one structure, on a place; [tokens, hidden] and [hidden]."""
    for bit, pair in enumerate(_PAIRS[:num_operations]):
        pair[number >> bit & 1](h, vector)


class Draw:
    """A round's constants."""

    def __init__(self, job: Job) -> None:
        self.generator = torch.Generator().manual_seed(job.seed)
        self._num = len(job.prompts)

    def vectors(self, host: Host) -> Tensor:
        """[requests, hidden], unit length, in the model's dtype."""
        drawn = torch.randn(self._num, host.hidden, generator=self.generator)
        unit: Tensor = drawn / drawn.norm(dim=-1, keepdim=True)
        return unit.to(getattr(torch, host.dtype))

    def ids(self, vocab: int, count: int) -> Tensor:
        """[requests, count], without repeats in a row."""
        return torch.stack([torch.randperm(vocab, generator=self.generator)[:count] for _ in range(self._num)])


_ENCODERS: dict[int, Tensor] = {}


def encoder(host: Host) -> Tensor:
    """[hidden, features]: the same in every round, as a trained one would be."""
    if host.hidden not in _ENCODERS:
        drawn = torch.randn(host.hidden, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
        _ENCODERS[host.hidden] = (drawn / host.hidden**0.5).to(getattr(torch, host.dtype))
    return _ENCODERS[host.hidden]


def _steer(host: Host, job: Job, blocks: list[int]) -> Run:
    vectors = Draw(job).vectors(host) * 4
    model = host.engine

    def run() -> Delivered:
        done = []
        with model.trace(**job.sampling) as tracer:
            for prompt, vector in zip(job.prompts, vectors, strict=True):
                with tracer.invoke(prompt):
                    with tracer.all():
                        for block in blocks:
                            model.model.layers[block].output[0][:] += vector
                    done.append(tracer.result.save())
        return Delivered(_tokens(done))

    return run


def _generate(llm: Any, job: Job) -> Run:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]

    def run() -> Delivered:
        outputs = llm.generate(prompts, SamplingParams(**job.sampling), use_tqdm=False)
        return Delivered([list(output.outputs[0].token_ids) for output in outputs])

    return run


def _tokens(done: list[Any]) -> list[list[int]]:
    return [list(result.token_ids) for result in done]


def look(saved: Any, length: int, element: Callable[[Any], Any]) -> bool:
    """Look at a saved list as its user would. Returns whether everything is there."""
    number = float(element(saved[length // 2]))
    return len(saved) == length and number == number


def _nv() -> Any:
    """Our package; stock's process never imports it."""
    import nnsight_vllm

    return nnsight_vllm
