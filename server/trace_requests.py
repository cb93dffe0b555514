"""A stranger's trace as requests for the engine: read, counted against the limits, and found legal before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from nnsight_vllm.frontend.served_engine import ServedEngine
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import decode
from nnsight_vllm.graph.nodes import Graph
from nnsight_vllm.graph.walk import constants_of, count_nodes
from nnsight_vllm.server import metrics
from nnsight_vllm.server.errors import Refused, refusing, require_at_most
from nnsight_vllm.server.limits import ServerLimits
from nnsight_vllm.server.links import Linked, check_links
from nnsight_vllm.server.tensor_bytes import check_tensor
from nnsight_vllm.trace.backend import Prompt, Request
from nnsight_vllm.wire.extras import KEY
from nnsight_vllm.wire.trace import MISSING, Asked, Prepared, SentRequest, SentTrace, Settled

FindTensor = Callable[[str], bytes | None]
"""A tensor's safetensors bytes by its digest, None where the tenant has none."""

_trace_decoder = msgspec.msgpack.Decoder(SentTrace)
_asked_decoder = msgspec.json.Decoder(Asked)
_OURS = frozenset({"output_kind", "skip_clone"})


class MissingTensors(Refused):
    """Tensors that the client has to upload."""

    def __init__(self, digests: list[str]) -> None:
        super().__init__(
            f"{len(digests)} tensors of the trace aren't stored", "tensors", status=HTTPStatus.CONFLICT, kind=MISSING
        )
        self.digests = digests


class TraceReader:
    """Makes requests of one tenant's traces. `find` is for the tensors that don't come with them."""

    def __init__(self, engine: ServedEngine, limits: ServerLimits, tenant: str, find: FindTensor) -> None:
        self._engine, self._limits, self._tenant, self._find = engine, limits, tenant, find

    def prepared(self, body: bytes) -> Prepared:
        """What a client asks before it records. Raises `Refused`."""
        asked = _read(_asked_decoder, body)
        require_at_most(self._limits.trace_requests, len(asked.prompts), "prompts", "prompts")
        require_at_most(self._limits.trace_requests, len(asked.samplings), "samplings", "samplings")
        prompts = [self._prompt((text,), f"prompts[{i}]") for i, text in enumerate(asked.prompts)]
        samplings = [self._sampling(one, f"samplings[{i}]") for i, one in enumerate(asked.samplings)]
        return Prepared(
            [prompt.engine["prompt_token_ids"] for prompt in prompts],
            [Settled(one.max_tokens, one.n) for one in samplings],
        )

    def trace(self, body: bytes) -> tuple[list[Request], dict[str, bytes]]:
        """The requests and their tensors. Raises `Refused`."""
        sent = _read(_trace_decoder, body)
        require_at_most(self._limits.trace_requests, len(sent.requests), "requests", "requests")
        if not sent.requests:
            raise Refused("a trace has at least one request", "requests")
        require_at_most(self._limits.trace_requests, len(sent.samplings), "samplings", "samplings")
        samplings = [self._sampling(one, f"samplings[{i}]") for i, one in enumerate(sent.samplings)]
        graphs = self._graphs(sent)
        tensors = self._tensors(sent.tensors, {digest for one in graphs.values() for digest in constants_of(one.body)})
        requests = [self._request(one, samplings, graphs, f"requests[{i}]") for i, one in enumerate(sent.requests)]
        require_at_most(self._limits.trace_requests, sum(one.sampling.n for one in requests), "samples", "requests")
        pairs = zip(requests, sent.requests, strict=True)
        check_links([Linked([graphs[data] for data in one.graphs], raw.links, one.sampling.n) for one, raw in pairs])
        for i, request in enumerate(requests):
            with refusing(f"requests[{i}]"):
                self._engine.admit(request, {name: tensors[name] for name in request.constants})
        return requests, tensors

    # -- parts -----------------------------------------------------------------------------------------------------------

    def _graphs(self, sent: SentTrace) -> dict[bytes, Graph]:
        """All graphs by their bytes, each read and checked once, however many requests have it."""
        found: dict[bytes, Graph] = {}
        num_nodes = 0
        places = ((data, f"requests[{i}].{name}") for i, one in enumerate(sent.requests) for data, name in _named(one))
        for data, param in places:
            if data not in found:
                found[data], num_nodes = self._graph(data, num_nodes, param)
        metrics.nodes.inc(num_nodes)
        return found

    def _graph(self, data: bytes, num_nodes: int, param: str) -> tuple[Graph, int]:
        """A graph, and the nodes of all up to it. They are counted before the check, whose time grows with them."""
        with refusing(param):
            graph = decode(data)
            one = count_nodes(graph, self._limits.graph_nodes)
            require_at_most(self._limits.graph_nodes, one, "nodes in a graph", param)
            require_at_most(self._limits.trace_nodes, num_nodes + one, "nodes in graphs that differ", param)
            check(graph, self._engine.tree.catalogue)
        return graph, num_nodes + one

    def _tensors(self, sent: Mapping[str, bytes], needed: set[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        missing = []
        size = 0
        for name in sorted(needed):
            data = sent.get(name)
            if data is not None:
                check_tensor(name, data, f"tensors[{name!r}]")
            else:
                data = self._find(name)
            if data is None:
                missing.append(name)
                continue
            size += len(data)
            require_at_most(self._limits.constant_bytes, size, "bytes of constants", "tensors")
            found[name] = data
        unused = sent.keys() - needed
        if unused:
            raise Refused("no graph of the trace names it", f"tensors[{sorted(unused)[0][:64]!r}]")
        if missing:
            raise MissingTensors(missing)
        return found

    def _request(self, sent: SentRequest, samplings: list[Any], graphs: Mapping[bytes, Graph], param: str) -> Request:
        if not 0 <= sent.sampling < len(samplings):
            raise Refused(f"there are {len(samplings)} samplings, no number {sent.sampling}", f"{param}.sampling")
        prompt: dict[str, object] = {"prompt_token_ids": sent.token_ids}
        if sent.text is not None:
            prompt["prompt"] = sent.text
        if sent.cache_salt:
            prompt["cache_salt"] = sent.cache_salt
        constants = [constants_of(graphs[data].body) for data, _ in _named(sent)]
        return Request(
            self._prompt((prompt,), f"{param}.token_ids"),
            samplings[sent.sampling],
            sent.graph,
            frozenset().union(*constants),
            tuple(sent.edits),
            tuple(sent.after),
            sent.links,
            self._engine.tenant(self._tenant),
        )

    def _prompt(self, inputs: tuple[object, ...], param: str) -> Prompt:
        with refusing(param):
            return self._engine.prompt(inputs)

    def _sampling(self, arguments: dict[str, Any], param: str) -> Any:
        extra = arguments.get("extra_args")
        names = [*arguments, *(extra if isinstance(extra, dict) else ())]
        ours = next((name for name in names if name in _OURS or name.startswith(("_", KEY))), None)
        if ours is not None:
            raise Refused(f"the server sets {ours!r} itself", param, kind="AdmissionError")
        with refusing(param):
            return self._engine.sampling(arguments)


def _named(request: SentRequest) -> Iterator[tuple[bytes, str]]:
    """A request's graphs in the order in which they run, and where they are in it."""
    for i, data in enumerate(request.edits):
        yield data, f"edits[{i}]"
    if request.graph is not None:
        yield request.graph, "graph"
    for i, data in enumerate(request.after):
        yield data, f"after[{i}]"


def _read(decoder: Any, body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        raise Refused(message, param) from None
