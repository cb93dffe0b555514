"""The field `intervention` of a request's body. Closed: a name that isn't told here is an error.

Only shapes and types are judged here. What the model, the prompt's length and the tenant's tensors decide, `short.py` does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

MAX_ACTIONS = 1024  # edits, saves, positions of a list
MAX_INLINE = 8 << 20  # characters of base64 in an inline tensor

_NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]+$"

Word = Literal["all", "prompt", "generated", "last"]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenPosition = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PositionRange(Closed):
    """Positions `start, start + step, ...` below `stop`."""

    start: TokenPosition = Field(default=0, description="The first position.")
    stop: TokenPosition | None = Field(
        default=None, description="The end, not included; none: as long as the request runs."
    )
    step: Annotated[int, Field(ge=1, lt=2**31, strict=True)] = Field(
        default=1, description="The distance between positions."
    )

    @model_validator(mode="after")
    def _is_not_empty(self) -> PositionRange:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"the range from {self.start} to {self.stop} holds no position")
        return self


class InlineTensor(Closed):
    """A small tensor in the body itself."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="What its bytes are.")
    shape: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]] = Field(max_length=2, description="Its sizes.")
    data: str = Field(max_length=MAX_INLINE, description="Base64 of its elements, row by row, little-endian.")


def _kind_of(value: object) -> str:
    """The branch of a union, by the JSON type, so that an error is about one branch only."""
    if isinstance(value, list | tuple):
        return "(list)"
    return "(object)" if isinstance(value, dict | BaseModel) else "(text)"


Reference = Annotated[str, Field(min_length=1, max_length=256)]
Tensor = Annotated[
    Annotated[Reference, Tag("(text)")] | Annotated[InlineTensor, Tag("(object)")],
    Discriminator(lambda value: _kind_of(value).replace("(list)", "(text)")),
]
Positions = Annotated[
    Annotated[Word, Tag("(text)")]
    | Annotated[list[TokenPosition], Field(min_length=1, max_length=MAX_ACTIONS), Tag("(list)")]
    | Annotated[PositionRange, Tag("(object)")],
    Discriminator(_kind_of),
]
_SITE = Field(
    max_length=512,
    description="`<module>.output[0]`, `<module>.output` (of a block the same), `<module>.input`, `logits` or `samples`.",
)
_POSITIONS: Any = Field(
    default="all",
    description="`all`, `prompt`, `generated`, `last` (the prompt's last row, then each generated one), a list of absolute "
    "positions, or a range. Logits and samples have one row an iteration: that of the last token so far.",
)
_TENSOR = "Digest (sha256) or name of a stored tensor, or a small one inline."


class _Edit(Closed):
    site: str = _SITE
    positions: Positions = _POSITIONS


class Add(_Edit):
    """`h += scale * tensor`"""

    op: Literal["add"]
    tensor: Tensor = Field(description=f"[hidden]. {_TENSOR}")
    scale: Number = Field(default=1.0, description="How much of it.")


class Scale(_Edit):
    """`h *= scale`"""

    op: Literal["scale"]
    scale: Number = Field(description="The factor.")


class Set(_Edit):
    """`h = tensor`"""

    op: Literal["set"]
    tensor: Tensor = Field(description=f"[hidden]. {_TENSOR}")


class Ablate(_Edit):
    """`h = 0`"""

    op: Literal["ablate"]


class ProjectOut(_Edit):
    """`h -= scale * (h·d) / (d·d) * d`"""

    op: Literal["project_out"]
    tensor: Tensor = Field(description=f"The direction d, [hidden]. {_TENSOR}")
    scale: Number = Field(default=1.0, description="With 1 nothing is left along d.")


class Clamp(_Edit):
    """Move h along d, as little as needed, so that `h·d / |d|` is from `low` to `high`."""

    op: Literal["clamp"]
    tensor: Tensor = Field(description=f"The direction d, [hidden]. {_TENSOR}")
    low: Number | None = Field(default=None, description="The lower bound, if any.")
    high: Number | None = Field(default=None, description="The upper bound, if any.")

    @model_validator(mode="after")
    def _has_bounds(self) -> Clamp:
        if self.low is None and self.high is None:
            raise ValueError("a clamp has `low`, `high` or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"expected low <= high; got {self.low} and {self.high}")
        return self


class NormAdd(_Edit):
    """`h + scale * tensor`, scaled back to the length of h."""

    op: Literal["norm_add"]
    tensor: Tensor = Field(description=f"[hidden]. {_TENSOR}")
    scale: Number = Field(default=1.0, description="How much of it.")


class LowRank(_Edit):
    """`h += scale * up @ (down @ h)`"""

    op: Literal["low_rank"]
    down: Tensor = Field(description=f"[rank, hidden]. {_TENSOR}")
    up: Tensor = Field(description=f"[hidden, rank]. {_TENSOR}")
    scale: Number = Field(default=1.0, description="How much of it.")


class SaeClamp(_Edit):
    """Set one feature of a sparse autoencoder: `h += (value - relu(encoder·h + bias)) * decoder`"""

    op: Literal["sae_clamp"]
    encoder: Tensor = Field(description=f"The feature's encoder row, [hidden]. {_TENSOR}")
    decoder: Tensor = Field(description=f"The feature's decoder row, [hidden]. {_TENSOR}")
    bias: Number = Field(default=0.0, description="The encoder's bias.")
    value: Number = Field(description="What the feature is set to.")


EditSpec = Annotated[
    Add | Scale | Set | Ablate | ProjectOut | Clamp | NormAdd | LowRank | SaeClamp, Field(discriminator="op")
]
OPERATIONS = ("add", "scale", "set", "ablate", "project_out", "clamp", "norm_add", "low_rank", "sae_clamp")


class SaveSpec(Closed):
    """A value to send home, as it is after all edits of its site."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=_NO_CONTROLS)] = Field(
        description="Its name in the answer."
    )
    site: str = _SITE
    positions: Positions = _POSITIONS
    stream: bool = Field(default=False, description="When streaming: in the chunk of the token that it belongs to.")


_EXAMPLES: list[JsonValue] = [
    {
        "edits": [
            {"site": "model.layers.15.output[0]", "op": "add", "tensor": "happy", "scale": 4.0, "positions": "all"}
        ],
        "save": [{"name": "h", "site": "model.layers.20.output[0]", "positions": "last", "stream": True}],
    },
    {
        "edits": [
            {
                "site": "logits",
                "op": "add",
                "tensor": {"dtype": "float32", "shape": [2], "data": "AACAPwAAAAA="},
                "positions": "generated",
            }
        ],
    },
    {"save": [{"name": "mlp", "site": "model.layers.3.mlp.output", "positions": {"start": 4, "stop": 20, "step": 2}}]},
]


class Intervention(Closed):
    """What to read and edit while a request runs: the short form (`edits`, `save`) or the full one (`graph`)."""

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})

    edits: list[EditSpec] = Field(default=[], max_length=MAX_ACTIONS, description="Applied in this order.")
    save: list[SaveSpec] = Field(default=[], max_length=MAX_ACTIONS, description="Values to send home.")
    graph: dict[str, Any] | None = Field(
        default=None, description="A whole graph, as `nv.record` and `to_json` print it."
    )
    tensors: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=MAX_INLINE)]] = Field(
        default={}, description="By digest: base64 of safetensors bytes with one tensor named `tensor`."
    )
    stream: list[str] = Field(
        default=[], max_length=MAX_ACTIONS, description="Names that a graph saves, to be streamed with their tokens."
    )

    @model_validator(mode="after")
    def _is_one_form(self) -> Intervention:
        if self.graph is not None and (self.edits or self.save):
            raise ValueError("`graph` is the full form: put edits and saves into it, without `edits` and `save`")
        if self.graph is None and not (self.edits or self.save):
            raise ValueError("it is empty: expected `edits`, `save` or `graph`")
        if self.graph is None and self.stream:
            raise ValueError("`stream` is for the names of a `graph`; an entry of `save` has its own")
        return self
