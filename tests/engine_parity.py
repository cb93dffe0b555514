"""Run the same reads and edits through vLLM's model with taps and through transformers with hooks.

`Engine` is an in-process `vllm.LLM` whose worker instruments the model; `Reference` the transformers model. Both take
`edits` (site name -> function of the value [tokens, ...]) and give every site's value, by name, in one prompt's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_worker import CPUWorker

from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.calls import Calls
from nnsight_vllm.worker.model.catalogue import describe
from nnsight_vllm.worker.model.instrument import instrument
from nnsight_vllm.worker.model.instrumented import Instrumented

Edit = Callable[[Tensor], Tensor]
Values = dict[str, Tensor]

_HERE = "nnsight_vllm_parity_worker"
_INSTRUMENTED: list[Instrumented] = []
_SELECTION: list[Any] = ["all"]


class Worker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, with taps put in right after the weights are loaded."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        done = instrument(runner.get_model(), runner.vllm_config, _SELECTION[0])
        runner.vllm_config.additional_config = {"nnsight_vllm": done.fingerprint}
        _INSTRUMENTED.append(done)


sys.modules.setdefault(_HERE, sys.modules[__name__])


class Engine:
    """vLLM with taps on one checkpoint."""

    def __init__(self, checkpoint: str, eager: bool = True, selection: Any = "all", dtype: str = "float32") -> None:
        self.owner: Any = sys.modules[_HERE]
        self.owner._SELECTION[0] = selection
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the handlers live in this process
            self.llm = LLM(
                checkpoint,
                dtype=dtype,
                max_model_len=128,
                max_num_seqs=8,
                enforce_eager=eager,
                enable_prefix_caching=False,
                worker_cls=f"{_HERE}.Worker",
            )
        self.instrumented: Instrumented = self.owner._INSTRUMENTED.pop()
        self.instrumented.probe(lambda: self.generate([1, 2, 3]))
        self.catalogue = describe(self.instrumented)
        self.calls = Calls(self.instrumented)
        self.order = [site.name for site in self.catalogue.sites]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, *prompts: list[int], max_tokens: int = 1) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(out.outputs[0].token_ids) for out in self.llm.generate(given, sampling, use_tqdm=False)]

    def run(self, prompts: list[list[int]], edits: dict[str, Edit], edited: int = 0, watched: int = 0) -> Values:
        """Every site's value for prompt number `watched`, with the edits on the rows of number `edited` alone."""
        values: Values = {}
        sites = [self.instrumented.sites[name] for name in self.order]
        for number in {site.tap for site in sites}:
            served = [site for site in sites if site.tap == number]
            is_head = number in self.instrumented.logits_taps
            change, look = (_rows(prompts, i, is_head) for i in (edited, watched))
            taps.ACTIVE[number] = _handler(served, change, edits, look, values)
        try:
            self.generate(*prompts)
        finally:
            taps.ACTIVE.clear()
        for error in taps.take_failures():
            raise error
        return values


def _rows(prompts: list[list[int]], number: int, is_head: bool) -> slice:
    start = number if is_head else sum(len(prompt) for prompt in prompts[:number])
    return slice(start, start + (1 if is_head else len(prompts[number])))


def _handler(served: list[Any], change: slice, edits: dict[str, Edit], look: slice, values: Values) -> taps.Handler:
    def handle(tensors: taps.Tensors) -> None:
        for site in served:
            name = site.info.name
            if name in edits:
                old = site.read(tensors, change)
                new = edits[name](old.clone())
                site.write(tensors, change, old, new)
            values[name] = new if name in edits and change == look else site.read(tensors, look)

    return handle


class Reference:
    """transformers on the same checkpoint with forward hooks.

    Make it before the engine: vLLM's transformers backend patches some of transformers' classes, `__init__` included.
    """

    def __init__(self, checkpoint: str, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.fired: list[str] = []

    def run(self, prompt: list[int], edits: dict[str, Edit], names: list[str], inplace: bool = False) -> Values:
        """Values of the named sites (those that transformers has), and in `fired` the order they came in.

        An edit gives the module another tensor, or with `inplace` changes the one it was given.
        """
        values: Values = {}
        self.fired = []
        handles = []
        for name in names:
            path, _, port = name.rpartition(".")
            if path not in dict(self.model.named_modules()):
                continue
            module = self.model.get_submodule(path)
            keep = _Keep(name, len(prompt), edits.get(name), inplace, values, self.fired)
            if port == "input":
                handles.append(module.register_forward_pre_hook(keep.input, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(keep.output, with_kwargs=True))
        try:
            with torch.no_grad(), _without_patches(self.model):
                self.model(torch.tensor([prompt]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return values


@contextmanager
def _without_patches(model: nn.Module) -> Iterator[None]:
    """Call modules as torch does, also those whose class vLLM has given a `__call__` of its own."""
    patched = {type(module) for module in model.modules() if "__call__" in vars(type(module))}
    kept = {kind: kind.__call__ for kind in patched}
    for kind in patched:
        kind.__call__ = nn.Module.__call__  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, call in kept.items():
            kind.__call__ = call  # type: ignore[method-assign]


class _Keep:
    def __init__(
        self, name: str, rows: int, edit: Edit | None, inplace: bool, values: Values, fired: list[str]
    ) -> None:
        self.name, self.rows, self.edit, self.inplace = name, rows, edit, inplace
        self.values, self.fired = values, fired

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (self._take(args[0]), *args[1:]), kwargs
        name = next(n for n in ("hidden_states", "input_ids", "position_ids", "x") if kwargs.get(n) is not None)
        return args, {**kwargs, name: self._take(kwargs[name])}

    def output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._take(output)
        if isinstance(output, tuple):
            return (self._take(output[0]), *output[1:])
        output["last_hidden_state"] = self._take(output["last_hidden_state"])
        return output

    def _take(self, value: Tensor) -> Tensor:
        """Note the value as [tokens, ...] and give back what goes on, in transformers' own layout."""
        plain = value[0] if value.shape[0] == 1 else value
        turned = plain.ndim == 3 and plain.shape[0] != self.rows and plain.shape[1] == self.rows
        plain = plain.transpose(0, 1) if turned else plain
        new = plain if self.edit is None else self.edit(plain.clone())
        self.values[self.name] = new.clone()
        self.fired.append(self.name)
        if self.inplace and self.edit is not None:
            plain.copy_(new)
        if self.inplace or self.edit is None:
            return value
        back = new.transpose(0, 1) if turned else new
        return back[None] if value.shape[0] == 1 else back


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the largest value (at least one)."""
    if ours.shape != theirs.shape:
        return float("inf")
    scale = max(1.0, float(theirs.abs().max()))
    return float((ours.double() - theirs.double()).abs().max()) / scale
