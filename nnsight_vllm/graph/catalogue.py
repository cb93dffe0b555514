"""What a graph may touch: the model's modules and sites, as the engine reports them after load.

The engine makes the catalogue with one probing forward, so sites stand in the order in which they fire and carry
real shapes. The client reads it to build the module tree and to check order and shapes while recording.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Port = Literal["input", "output"]


class SiteInfo(Struct, frozen=True):
    """One place where a graph can touch the model.

    `name` is `path + "." + port`. `order` counts firing order: sites that share an `order` fire together, a smaller
    one fires earlier. `shape` has None for the request's rows. `structure` is what `.output` is to the user: the
    tensor itself, or a tuple whose element 0 it is. The refusals are reasons, empty where the thing is allowed.
    """

    name: str
    path: str
    port: Port
    order: int
    shape: tuple[int | None, ...]
    dtype: str
    structure: Literal["tensor", "tuple"] = "tensor"
    refuse_write: str = ""
    refuse_inplace: str = ""


class ModuleInfo(Struct, frozen=True):
    """One module of the tree, under Hugging Face's name where it has one.

    `kind` is the class name to print, `detail` what stands in the brackets. `refusals` has, for a port without a
    site, the reason. `refuse_call` says why the module can't be called ad hoc, empty where it can; `call_shape` is
    then the last dimension it takes and gives (None: any, or an index tensor).
    """

    path: str
    kind: str
    detail: str = ""
    refusals: dict[str, str] = {}
    refuse_call: str = ""
    call_in: int | None = None
    call_out: int | None = None
    call_dtype: str = ""


class Catalogue(Struct, frozen=True):
    """The whole model: modules in tree order (parents first), sites in firing order, and a few numbers."""

    modules: list[ModuleInfo]
    sites: list[SiteInfo]
    vocab_size: int
    dtype: str
    max_model_len: int
    max_num_batched_tokens: int
    instrumented: str
