"""A model of three blocks that exists only as a catalogue, and a backend that keeps requests instead of running them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from nnsight_vllm.graph.catalogue import Catalogue, ModuleInfo, SiteInfo
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.text import render
from nnsight_vllm.trace.backend import Completion, Outcome, Prompt, Request, Result, Sample
from nnsight_vllm.trace.editable import Editable
from nnsight_vllm.trace.tracer import Tracer
from nnsight_vllm.trace.tree import Tree

HIDDEN, VOCAB, LAYERS = 8, 32, 3


def catalogue() -> Catalogue:
    """Blocks with attention, q_proj and mlp; final norm; head; logits and samples."""
    sites: list[SiteInfo] = []

    def site(
        path: str, port: Literal["input", "output"], shape: tuple[int | None, ...] = (None, HIDDEN), **more: Any
    ) -> None:
        dtype = more.pop("dtype", "float32")
        sites.append(SiteInfo(f"{path}.{port}", path, port, len(sites), shape, dtype, **more))

    modules = [ModuleInfo("", "Model", refusals={"output": "use model.logits"}, refuse_call="it is the whole model")]
    modules += [
        ModuleInfo("model", "Base"),
        ModuleInfo("model.embed_tokens", "Embedding", call_out=HIDDEN, call_dtype="float32"),
    ]
    site("model.embed_tokens", "output")
    modules.append(ModuleInfo("model.layers", "ModuleList", refuse_call="it is a list"))
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        modules += [
            ModuleInfo(block, "Block", refuse_call="a block passes a residual"),
            ModuleInfo(f"{block}.self_attn", "Attention"),
            ModuleInfo(f"{block}.self_attn.q_proj", "Linear", call_in=HIDDEN, call_out=HIDDEN, call_dtype="float32"),
            ModuleInfo(f"{block}.mlp", "MLP", call_in=HIDDEN, call_out=HIDDEN, call_dtype="float32"),
        ]
        site(block, "input")
        site(f"{block}.self_attn.q_proj", "input", refuse_inplace="k and v see it too; assign by value")
        site(f"{block}.self_attn.q_proj", "output")
        site(f"{block}.self_attn", "output", structure="tuple")
        site(f"{block}.mlp", "output")
        site(block, "output", structure="tuple")
    modules.append(ModuleInfo("model.norm", "RMSNorm", call_in=HIDDEN, call_out=HIDDEN, call_dtype="float32"))
    site("model.norm", "output")
    modules.append(ModuleInfo("lm_head", "Linear", call_in=HIDDEN, call_out=VOCAB, call_dtype="float32"))
    modules += [ModuleInfo("logits", "Logits"), ModuleInfo("samples", "Samples")]
    site("logits", "output", (None, VOCAB))
    site("samples", "output", (None,), dtype="int64")
    return Catalogue(modules, sites, VOCAB, "float32", 64, 64, "all")


@dataclass
class FakeBackend:
    """Keeps requests; answers each with `values` (by save name) and a fixed completion."""

    tree: Tree = field(default_factory=lambda: Tree(catalogue()))
    values: dict[str, object] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def prompt(self, inputs: tuple[object, ...]) -> Prompt:
        (prompt,) = inputs
        return Prompt(len(str(prompt).split()), str(prompt), prompt)

    def sampling(self, arguments: dict[str, object]) -> Any:
        return SimpleNamespace(n=1, max_tokens=arguments.get("max_tokens", 16))

    def admit(self, request: Request, tensors: object) -> None:
        pass

    def run(self, requests: list[Request], tensors: dict[str, bytes]) -> list[Outcome]:
        self.requests = requests
        return [Outcome(Result([Completion("text", [1], "stop")]), [Sample(dict(self.values))]) for _ in requests]

    def printed(self) -> str:
        """The graphs that came, one line a node, requests apart by a blank line."""
        return "\n\n".join(render(decode(r.graph)) for r in self.requests if r.graph)


class FakeModel(Editable):
    """What `VLLM` is to the user, on the fake backend."""

    def __init__(self, **values: object) -> None:
        backend = FakeBackend(values=dict(values))
        super().__init__(backend.tree, "")
        self.__dict__["backend"] = backend

    def trace(self, *inputs: object, **arguments: object) -> Tracer:
        return Tracer(self.__dict__["backend"], inputs, arguments, standing=self._standing)

    def scan(self, *inputs: object, **arguments: object) -> Tracer:
        return Tracer(self.__dict__["backend"], inputs, arguments, runs=False, standing=self._standing)

    @property
    def printed(self) -> str:
        backend: FakeBackend = self.__dict__["backend"]
        return backend.printed()
