"""The row algebra: how each operation of the table treats the rows of a request.

A request's value at a site is [rows, ...]. A group's is [all rows of all requests, ...], and what a request has once is
stacked to [requests, ...]. Whether an operation may run on those at once depends on its kind:

    POINTWISE   element by element, with broadcasting
    LAST        along the dimensions that it names, which must not be the rows'
    MATMUL      a product over the last dimension of the left
    INDEX       takes a part; an index into the rows is each request's own
    OPAQUE      anything else: runs for each request by itself

What a kind means for the group is in `worker/batch/group_nodes.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nnsight_vllm.graph.ops import OPS


class Kind(enum.Enum):
    POINTWISE = "pointwise"
    LAST = "last"
    MATMUL = "matmul"
    INDEX = "index"
    OPAQUE = "opaque"


@dataclass(frozen=True)
class Rule:
    """`dim`: where an operation of kind LAST takes its dimension by position; `default`: the one it has without (None: all)."""

    kind: Kind
    dim: int = 1
    default: int | None = None


_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arcsin arctan asin asinh atan atan2 atanh bitwise_and
bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min clip clone contiguous copysign cos cosh deg2rad
detach digamma div divide eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge
greater greater_equal gt heaviside hypot isclose isfinite isinf isnan isneginf isposinf ldexp le less less_equal lerp
lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill
maximum minimum mul multiply nan_to_num ne neg negative nextafter not_equal positive pow rad2deg reciprocal relu
remainder round rsqrt sigmoid sign signbit sin sinc sinh sqrt square sub subtract tan tanh true_divide trunc where
xlogy float half double bfloat16 int long short bool to type_as zero_ fill_ copy_ relu_ zeros_like ones_like full_like
"""
_ACTIVATIONS = """
celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu softplus
softshrink softsign tanh tanhshrink threshold
"""
_OPERATORS = """
add sub mul truediv floordiv mod pow and or xor lshift rshift neg pos invert abs eq ne lt le gt ge
iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift
"""
_WHOLE = """
sum mean amax amin argmax argmin prod all any max min median std var nansum softmax log_softmax cumsum cumprod logsumexp
logcumsumexp flip count_nonzero
"""
# name -> (position of the dimension among the arguments, its default)
_ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(_WHOLE.split(), (1, None)),
    **dict.fromkeys(["sort", "argsort", "msort", "softmin"], (1, -1)),
    **dict.fromkeys(["topk", "kthvalue"], (2, -1)),
    "norm": (2, None),
    "vector_norm": (2, None),
    "normalize": (2, 1),
}


def _table() -> dict[str, Rule]:
    pointwise = Rule(Kind.POINTWISE)
    rules = {f"py.{name}": pointwise for name in _OPERATORS.split()}
    for space in ("tensor", "torch", "special"):
        for name in _POINTWISE.split():
            rules[f"{space}.{name}"] = rules[f"{space}.{name}_"] = pointwise
    rules.update({f"nn.{name}": pointwise for name in _ACTIVATIONS.split()})
    for space in ("tensor", "torch", "nn", "linalg", "special"):
        for name, (dim, default) in _ALONG.items():
            rules[f"{space}.{name}"] = Rule(Kind.LAST, dim, default)
    for name in ("py.matmul", "tensor.matmul", "torch.matmul", "tensor.mm", "torch.mm", "tensor.mv", "torch.mv"):
        rules[name] = Rule(Kind.MATMUL)
    rules["py.getitem"] = rules["py.setitem"] = Rule(Kind.INDEX)
    return {name: rule for name, rule in rules.items() if name in OPS}


RULES: dict[str, Rule] = _table()
OPAQUE = Rule(Kind.OPAQUE)
# These may hand their argument on as it is, or a view of it.
_ALIASING = frozenset(
    f"{space}.{name}"
    for space in ("tensor", "torch", "py")
    for name in [
        "contiguous",
        "detach",
        "to",
        "type_as",
        "float",
        "half",
        "double",
        "bfloat16",
        "int",
        "long",
        "short",
        "bool",
        "pos",
        "positive",
        "relu_",
    ]
)


def rule_of(name: str) -> Rule:
    """How an operation treats rows."""
    return RULES.get(name, OPAQUE)


def is_fresh(name: str) -> bool:
    """Whether an operation's result surely shares no memory with its arguments."""
    kind = rule_of(name).kind
    if name.endswith("_") or name.startswith("py.i") or name in _ALIASING:
        return False
    return kind in {Kind.POINTWISE, Kind.LAST, Kind.MATMUL}
