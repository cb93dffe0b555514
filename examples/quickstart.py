"""Read and edit a model while vLLM serves it: `make demo`, or `python examples/quickstart.py`.

Three small traces on SmolLM2-135M: what a residual stream looks like, what the model would say after every layer, and
one batch in which each request carries an edit of its own beside plain ones.
"""

from __future__ import annotations

import os

# A small model needs little memory for its cache, and vLLM's own log would drown the tables.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")

import torch
from rich.console import Console
from rich.table import Table

from nnsight_vllm import VLLM, demo_model

EIFFEL = "The Eiffel Tower is located in the city of"
COLOSSEUM = "The Colosseum is located in the city of"
PATCHED = 24  # the block after which the model knows the city

console = Console()


def saved_activations(model: VLLM) -> None:
    """One request, one forward: values from all over the model, saved as ordinary tensors."""
    with model.trace(EIFFEL, temperature=0.0, max_tokens=1):
        query = model.model.layers[5].self_attn.q_proj.output.save()
        stream = model.model.layers[5].output[0].save()
        mlp = model.model.layers[7].mlp.output.save()
        logits = model.logits.output.save()
        token = model.samples.output.save()

    table = Table("site", "shape", "type", title="Saved from one request")
    saved = {
        "model.layers.5.self_attn.q_proj.output": query,
        "model.layers.5.output[0]": stream,
        "model.layers.7.mlp.output": mlp,
        "logits.output": logits,
        "samples.output": token,
    }
    for site, tensor in saved.items():
        table.add_row(site, str(list(tensor.shape)), str(tensor.dtype))
    console.print(table)


def logit_lens(model: VLLM) -> None:
    """What the model would say if it stopped after each layer: the final norm and the head, called inside the run."""
    tops = []
    with model.trace(EIFFEL, temperature=0.0, max_tokens=1):
        for layer in model.model.layers:
            last = layer.output[0][-1:]
            tops.append(model.lm_head(model.model.norm(last)).softmax(-1).max(-1).save())

    table = Table("after layer", "top token", "probability", title=f"Logit lens: {EIFFEL} ...")
    for number, top in enumerate(tops):
        probability, token = top.value
        table.add_row(str(number), repr(model.tokenizer.decode(token.tolist())), f"{probability.item():.2f}")
    console.print(table)


def many_edits_in_one_batch(model: VLLM) -> None:
    """Six requests in one continuous batch; each edit touches its own request and nothing else."""
    paris = model.tokenizer.encode(" Paris")[0]
    with model.trace(COLOSSEUM, temperature=0.0, max_tokens=1):
        rome = model.model.layers[PATCHED].output[0][-1].save()

    with model.trace(temperature=0.0, max_tokens=6) as tracer:
        with tracer.invoke(EIFFEL):
            plain = tracer.result.save()
        with tracer.invoke(EIFFEL):
            model.model.layers[PATCHED].output[0][-1] = rome
            patched = tracer.result.save()
        with tracer.invoke(EIFFEL):
            for layer in model.model.layers[24:28]:
                layer.mlp.output[:] = 0
            ablated = tracer.result.save()
        with tracer.invoke(EIFFEL):
            model.logits.output[:, paris] = -torch.inf
            forbidden = tracer.result.save()
        with tracer.invoke(COLOSSEUM):
            model.samples.output[:] = paris
            forced = tracer.result.save()
        with tracer.invoke(COLOSSEUM):
            neighbour = tracer.result.save()

    table = Table("prompt", "edit", "completion", title="Six requests, one batch")
    table.add_row(EIFFEL, "none", repr(plain.text))
    table.add_row(EIFFEL, f"the stream after block {PATCHED} from the Colosseum prompt", repr(patched.text))
    table.add_row(EIFFEL, "MLPs 24 to 27 zeroed at the prompt", repr(ablated.text))
    table.add_row(EIFFEL, "' Paris' forbidden in the first logits", repr(forbidden.text))
    table.add_row(COLOSSEUM, "first token set to ' Paris'", repr(forced.text))
    table.add_row(COLOSSEUM, "none", repr(neighbour.text))
    console.print(table)


def fast_dtype() -> str:
    """The checkpoint's own, bfloat16, unless this processor has no means to multiply it: then a step takes ten times as long."""
    has_means = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bw", True)
    return "auto" if has_means else "float32"


def main() -> None:
    with console.status("making the demo model (once) and starting vLLM ..."):
        model = VLLM(demo_model(), max_model_len=256, dtype=fast_dtype(), dispatch=True)
    with model:
        saved_activations(model)
        logit_lens(model)
        many_edits_in_one_batch(model)


if __name__ == "__main__":
    main()
