"""A value of the run, while it is recorded and afterwards.

Inside the block every operator, method and torch function on a proxy records a node and gives a new proxy. After the
block a saved proxy stands for its value: the same operators work on the value itself.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight_vllm.errors import ControlFlowError, GradientsUnavailable, RefusedError
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.trace import meta
from nnsight_vllm.trace.operators import Operators
from nnsight_vllm.trace.recording import unwrap, values_in
from nnsight_vllm.trace.source import user_frame, user_line
from nnsight_vllm.trace.torch_calls import Method, torch_op

_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real"})
_FIELDS = frozenset(
    {"values", "indices", "eigenvalues", "eigenvectors", "Q", "R", "U", "S", "Vh", "V", "sign", "logabsdet"}
)
_MOVES = frozenset({"cpu", "cuda"})
_CONTAINER_METHODS = frozenset({"append", "extend", "insert", "pop", "update", "keys", "values", "items"})
_GRADIENTS = frozenset({"backward", "grad", "requires_grad_", "retain_grad", "register_hook"})


class Proxy(Operators):
    """One recorded value, as its user holds it."""

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self) -> Proxy:
        """Send this value home, as it is at this point of the program."""
        if self._is_done:
            raise RefusedError(f"the run is over; call .save() inside the block; {user_line()}")
        saved = Proxy(self._recorder, self._node, self._metas, self._scope, self._maybe)
        self._slot = saved._slot = self._here.save(self)
        return saved

    @property
    def _local(self) -> Proxy:
        """What stands for the value in the invoke that is open."""
        here = self._here
        return self if here is self._recorder else here.localized(self)

    @property
    def _variants(self) -> tuple[object, ...]:
        """`_metas`; to another invoke a value is that of the last trip of its block."""
        return self._metas if self._here is self._recorder else self._metas[-1:]

    def stop(self) -> None:
        """End the request here, once this value is known."""
        self._here.use(self)
        self._here.stop()

    # -- what is known while recording -------------------------------------------------------------------------------

    @property
    def shape(self) -> Any:
        """Ints where the size is fixed, else a proxy of the size."""
        if self._is_done:
            return self.value.shape
        sizes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in self._variants]
        if any(size is None or len(size) != len(sizes[0] or ()) for size in sizes):
            return self._op("py.attr", getattr, "shape")
        dims = zip(*(size for size in sizes if size is not None), strict=True)
        known = [variants[0] if len(set(variants)) == 1 else None for variants in dims]
        fixed = [size for size in known if size is not None]
        if len(fixed) == len(known):
            return torch.Size(fixed)
        return tuple(self._op("py.size", _size, i) if size is None else size for i, size in enumerate(known))

    @property
    def dtype(self) -> Any:
        return self.value.dtype if self._is_done else self._tensor_meta("dtype").dtype

    @property
    def ndim(self) -> Any:
        return self.value.ndim if self._is_done else self._tensor_meta("ndim").ndim

    @property
    def device(self) -> torch.device:
        """The CPU: values move to the model's device by themselves."""
        return torch.device("cpu")

    def dim(self) -> Any:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def _tensor_meta(self, what: str) -> torch.Tensor:
        value = self._metas[0]
        if not isinstance(value, torch.Tensor):
            raise RefusedError(f".{what} of this value isn't known while recording; {user_line()}")
        return value

    # -- recording -----------------------------------------------------------------------------------------------------

    def _op(self, name: str, function: Callable[..., object], *args: object) -> Any:
        return self._here.op(name, function, (self, *args), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in {"_recorder", "_slot", "_node", "_metas", "_scope", "_item_of", "_maybe"}:
            raise AttributeError(name)
        if self._is_done:
            return getattr(self.value, name)
        if name in _GRADIENTS:
            raise GradientsUnavailable(f".{name}: vLLM keeps no tape, so there are no gradients; {user_line()}")
        return self._attribute(name)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            if self._is_done:
                setattr(self.value, name, value)
                return
            raise RefusedError(f".{name} of a value can't be set; change it in place, x[:] = ...; {user_line()}")
        super().__setattr__(name, value)

    def _attribute(self, name: str) -> Any:
        first = self._metas[0]
        if name in _MOVES:
            return lambda *args, **kwargs: self
        if name == "type":
            return self._type
        if name in _PROPERTIES and not isinstance(first, list | dict | tuple):
            return self._op(f"tensor.{name}", lambda tensor: getattr(tensor, name))
        if isinstance(first, list | dict) and name in _CONTAINER_METHODS:
            return Method(self, f"py.{name}", name)
        if name in _FIELDS and (isinstance(first, tuple) or not isinstance(first, torch.Tensor)):
            return self._op("py.attr", getattr, name)
        if f"tensor.{name}" in OPS and not isinstance(first, list | dict):
            return Method(self, f"tensor.{name}", name)
        raise RefusedError(f".{name} can't be recorded: it isn't among the operations of a graph; {user_line()}")

    def _type(self, dtype: object = None, non_blocking: bool = False) -> Any:
        if not isinstance(dtype, torch.dtype):
            raise RefusedError(f".type() takes a torch.dtype here; .dtype tells the tensor's own; {user_line()}")
        return self.to(dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = list(values_in((args, kwargs)))
        if all(value._is_done for value in used):
            return func(*unwrap(args), **unwrap(kwargs))
        return torch_op(used[0]._here, func, args, kwargs)

    def __getitem__(self, index: object) -> Any:
        if self._is_done:
            return self.value[unwrap(index)]
        if self._slot == "result":
            raise RefusedError(f"tracer.result is known after the run; {user_line()}")
        if (local := self._local) is not self:
            return local[index]
        item = self._op("py.getitem", operator.getitem, index)
        item._item_of = (self._node, self._recorder.encode(index))
        return item

    def __setitem__(self, index: object, value: object) -> None:
        if self._is_done:
            self.value[unwrap(index)] = unwrap(value)
            return
        if (local := self._local) is not self:
            local[index] = value
        elif not self._is_own_item(index, value):
            self._op("py.setitem", _setitem, index, value)

    def _is_own_item(self, index: object, value: object) -> bool:
        """`x[i] += v` ends with `x[i] = x[i]`: the view has been changed in place, there is nothing left to do."""
        if not isinstance(value, Proxy) or value._item_of is None:
            return False
        same_item = value._item_of == (self._node, self._recorder.encode(index))
        return same_item and meta.storage(value._metas[0]) in {meta.storage(own) for own in self._metas} - {None}

    def __iter__(self) -> Iterator[Any]:
        if self._is_done:
            return iter(self.value)
        length = self._length()
        if length is None:
            raise ControlFlowError(f"the length of this value isn't known while recording{_why()}; {user_line()}")
        return iter([self[i] for i in range(length)])

    def __len__(self) -> int:
        if self._is_done:
            return len(self.value)
        length = self._length()
        if length is None:
            raise ControlFlowError(
                "len() of this value isn't known while recording (nor can torch.tensor() take it: a value of the run is a "
                f"tensor already, and torch.stack([...]) makes one of several); {user_line()}"
            )
        return length

    def _length(self) -> int | None:
        sizes = {_static_length(value) for value in self._variants}
        return sizes.pop() if len(sizes) == 1 else None

    def __bool__(self) -> bool:
        if self._is_done:
            return bool(self.value)
        raise ControlFlowError(
            f"the truth of this value isn't known while recording{_why()}; use `with tracer.cond(...)`; {user_line()}"
        )

    def _convert(self, kind: Callable[[Any], Any], hint: str) -> Any:
        if self._is_done:
            return kind(self.value)
        raise ControlFlowError(f"{kind.__name__}() of a value isn't known while recording{hint}; {user_line()}")

    def __int__(self) -> int:
        return int(self._convert(int, "; nv.int(x) records it"))

    def __float__(self) -> float:
        return float(self._convert(float, "; nv.float(x) records it"))

    def __index__(self) -> int:
        return int(self._convert(operator.index, "; index a tensor of the run with it instead"))

    def __contains__(self, item: object) -> bool:
        if self._is_done:
            return unwrap(item) in self.value
        raise ControlFlowError(f"`in` over a value isn't known while recording; use (x == y).any(); {user_line()}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._is_done:
            return _itself, (self.value,)
        raise RefusedError(
            f"a value can't be pickled while recording: save it, and pickle it afterwards; {user_line()}"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value.__array__(*args, **kwargs)

    def __repr__(self) -> str:
        if self._is_done:
            return repr(self.value) if self._has_value else f"<no value: {self._where()}>"
        kinds = " or ".join(_describe(value) for value in self._metas)
        return f"<proxy %{self._node}: {kinds}>"

    def __str__(self) -> str:
        return str(self.value) if self._is_done else repr(self)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if self._is_done else repr(self)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if self._is_done:
            return self.value(*args, **kwargs)
        raise RefusedError(f"a value can't be called; {user_line()}")

    def __deepcopy__(self, memo: dict[int, object]) -> Any:
        if self._is_done:
            return copy.deepcopy(self.value, memo)
        if not isinstance(self._metas[0], torch.Tensor):
            raise RefusedError(f"only tensors of the run can be copied; {user_line()}")
        return self.clone()

    def __copy__(self) -> Proxy:
        return self

    __hash__ = object.__hash__


def _setitem(target: Any, index: Any, value: Any) -> None:
    target[index] = value


def _size(value: Any, dim: int) -> object:
    return meta.UNKNOWN


def _itself(value: object) -> object:
    return value


def _static_length(value: object) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, tuple) else None


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__ if not isinstance(value, meta.Unknown) else "unknown"


def _why() -> str:
    from nnsight_vllm.trace.blocks.block import why_native

    reason = why_native(user_frame())
    return f" ({reason})" if reason else ""
