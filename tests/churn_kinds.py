"""What graphs of a scenario do: a function a kind, in the language. Programs of the operation table are in churn_table.py.

To add a kind: a function of the model, the tracer and the graph's literal, with `@kind`. Where a value decides by its sign
what happens next, return it saved: a judge must know that rounding decided if it was next to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from churn_scenario import Graph
from torch import Tensor

import nnsight_vllm as nv
from nnsight_vllm import edits

HIDDEN = 128
EOS = 2
Body = Callable[[Any, Any, Graph], Any]


@dataclass(frozen=True)
class Kind:
    """`tokens`: how many a request must ask for at least, for all iterations that it names."""

    body: Body
    tokens: int = 1


KINDS: dict[str, Kind] = {}


def kind(tokens: int = 1) -> Callable[[Body], Body]:
    def register(body: Body) -> Body:
        KINDS[body.__name__.replace("_", " ")] = Kind(body, tokens)
        return body

    return register


def _block(tracer: Any, graph: Graph) -> Any:
    return tracer.iter[graph.first : graph.last : graph.step]


def _stream(model: Any, graph: Graph) -> Any:
    return model.model.layers[graph.layer].output[0]


def _mlp(model: Any, graph: Graph) -> Any:
    return model.model.layers[graph.layer].mlp


def _vector(graph: Graph, number: int = 0) -> Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(10 * graph.seed + number))


# -- reads ---------------------------------------------------------------------------------------------------------------


@kind()
def reads_the_prompt(model: Any, tracer: Any, graph: Graph) -> None:
    _stream(model, graph).save()
    model.model.norm.output.save()
    model.logits.output.save()


@kind()
def reads_last_rows(model: Any, tracer: Any, graph: Graph) -> None:
    rows = nv.list().save()
    with _block(tracer, graph):
        rows.append(_stream(model, graph)[-1])


@kind()
def reads_all_rows(model: Any, tracer: Any, graph: Graph) -> None:
    rows = nv.list().save()
    with _block(tracer, graph):
        rows.append(_mlp(model, graph).input)
        rows.append(_stream(model, graph))


@kind()
def reads_a_view(model: Any, tracer: Any, graph: Graph) -> None:
    rows = nv.list().save()
    with _block(tracer, graph):
        rows.append(model.model.layers[graph.layer].self_attn.q_proj.output[:, :3])
        rows.append(_mlp(model, graph).gate_proj.output.mean(0))


@kind()
def reads_logits_and_tokens(model: Any, tracer: Any, graph: Graph) -> None:
    found = nv.list().save()
    with _block(tracer, graph):
        found.append(model.logits.output)
        found.append(model.samples.output)


@kind()
def reads_through_the_head(model: Any, tracer: Any, graph: Graph) -> None:
    lens = nv.list().save()
    with _block(tracer, graph):
        lens.append(model.lm_head(model.model.norm(_stream(model, graph)[-1:])))


@kind()
def keeps_a_dict(model: Any, tracer: Any, graph: Graph) -> None:
    kept = nv.dict().save()
    with _block(tracer, graph) as index:
        kept[index] = _stream(model, graph)[0]


@kind()
def logs(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph) as index:
        _stream(model, graph)[:] *= 1.1
        tracer.log("at", index)


# -- edits of rows -------------------------------------------------------------------------------------------------------


@kind()
def adds(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        _stream(model, graph)[:] += _vector(graph)


@kind()
def adds_and_saves(model: Any, tracer: Any, graph: Graph) -> None:
    rows = nv.list().save()
    with _block(tracer, graph):
        stream = _stream(model, graph)
        stream += _vector(graph)
        rows.append(stream)
        rows.append(model.logits.output)


@kind()
def adds_to_the_last_row(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        _stream(model, graph)[-1] += _vector(graph)


@kind()
def sets_the_last_row(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        _stream(model, graph)[-1] = _vector(graph)


@kind()
def sets_the_first_row(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        _mlp(model, graph).output[0] = _vector(graph)


@kind()
def ablates(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        _mlp(model, graph).output[:] = 0


@kind()
def scales_a_view(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        model.model.layers[graph.layer].self_attn.q_proj.output[:, ::2] *= 2
        model.model.layers[graph.layer].self_attn.v_proj.output[:, 1:9] *= -1


@kind()
def gives_a_norm_another_input(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        norm = model.model.layers[graph.layer].input_layernorm
        norm.input = norm.input + 0.3


@kind()
def edits_in_a_row(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        edits.project_out(_mlp(model, graph).output, _vector(graph, 1))
        edits.norm_matched_add(_stream(model, graph), _vector(graph, 2), 0.5)


@kind()
def spreads_a_mean(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        stream = _stream(model, graph)
        stream += stream.mean(0)


@kind()
def overflows(model: Any, tracer: Any, graph: Graph) -> None:
    _mlp(model, graph).output[0] = float("inf")
    _stream(model, graph).save()


# -- state, branches, chance ---------------------------------------------------------------------------------------------


@kind(tokens=2)
def carries_state(model: Any, tracer: Any, graph: Graph) -> None:
    state = _stream(model, graph)[-1].clone()
    sums = nv.list().save()
    with tracer.iter[1:]:
        stream = _stream(model, graph)
        state += stream[-1]
        stream += state * 0.01
        sums.append(state.clone())


@kind(tokens=3)
def patches_a_later_iteration(model: Any, tracer: Any, graph: Graph) -> None:
    kept = _stream(model, graph)[-1].clone()
    with tracer.iter[2]:
        _stream(model, graph)[-1] = kept


@kind()
def branches(model: Any, tracer: Any, graph: Graph) -> Any:
    margins = nv.list().save()
    taken = nv.list().save()
    with _block(tracer, graph):
        stream = _stream(model, graph)
        margin = stream[-1, graph.seed] - 0.1
        margins.append(margin)
        with tracer.cond(margin > 0) as condition:
            stream *= 0.5
            taken.append(stream[-1])
        with condition.else_():
            stream[0] += 1
    return margins


@kind()
def gates(model: Any, tracer: Any, graph: Graph) -> Any:
    margins = nv.list().save()
    with _block(tracer, graph):
        stream = _stream(model, graph)
        margin = (stream @ _vector(graph)) - 3
        margins.append(margin)
        stream[:] += (margin > 0)[:, None] * _vector(graph, 1)
    return margins


@kind()
def draws(model: Any, tracer: Any, graph: Graph) -> None:
    noise = nv.list().save()
    with _block(tracer, graph):
        stream = _stream(model, graph)
        stream += torch.randn_like(stream) * 0.1
        noise.append(stream[-1])


@kind()
def draws_tokens(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        model.samples.output = torch.randint(3, 499, (1,))


# -- logits, samples -----------------------------------------------------------------------------------------------------


@kind()
def bans(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        model.logits.output[:, graph.seed :: 3] = float("-inf")


@kind()
def biases(model: Any, tracer: Any, graph: Graph) -> None:
    best = nv.list().save()
    with _block(tracer, graph):
        logits = model.logits.output
        logits[:, 7:90] += 3.0
        best.append(logits.topk(3).values)


@kind()
def chooses(model: Any, tracer: Any, graph: Graph) -> None:
    with _block(tracer, graph):
        model.samples.output[0] = 11 + graph.seed


@kind()
def ends_the_text(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        model.samples.output[0] = EOS


# -- ends ----------------------------------------------------------------------------------------------------------------


@kind()
def stops(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        _stream(model, graph)[-1].save()
        tracer.stop()


@kind()
def stops_after_its_token(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        _stream(model, graph)[:] += _vector(graph)
        model.samples.output.save()
        tracer.stop()


@kind()
def stops_at_a_value(model: Any, tracer: Any, graph: Graph) -> Any:
    margins = nv.list().save()
    with _block(tracer, graph):
        margin = _stream(model, graph)[-1, graph.seed]
        margins.append(margin)
        with tracer.cond(margin > 0):
            tracer.stop()
    return margins


@kind()
def fails(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        stream = _stream(model, graph)
        stream += _vector(graph)
        stream[(stream[:, 0] > 1e9).nonzero()[0]] = 0


@kind()
def fails_in_the_logits(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        _stream(model, graph)[-1].save()
        logits = model.logits.output
        logits[:, (logits[0] > 1e30).nonzero()[0]] = 0


@kind()
def fails_by_its_token(model: Any, tracer: Any, graph: Graph) -> None:
    with tracer.iter[graph.first]:
        model.samples.output[0] = 10_000
