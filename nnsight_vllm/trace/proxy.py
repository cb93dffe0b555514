"""A value of the run, while it is recorded and afterwards.

Inside the block every operator, method and torch function on a proxy records a node and gives a new proxy. After the
block a saved proxy stands for its value: the same operators work on the value itself.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight_vllm.errors import ControlFlowError, GradientsUnavailable, RefusedError, ValueNotSetError
from nnsight_vllm.graph.ops import OPS
from nnsight_vllm.trace import active, meta
from nnsight_vllm.trace.source import user_frame, user_line

if TYPE_CHECKING:
    from nnsight_vllm.graph.nodes import Arg
    from nnsight_vllm.trace.places import Root
    from nnsight_vllm.trace.recorder import Recorder
    from nnsight_vllm.trace.scope import Scope

_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real"})
_FIELDS = frozenset(
    {"values", "indices", "eigenvalues", "eigenvectors", "Q", "R", "U", "S", "Vh", "V", "sign", "logabsdet"}
)
_MOVES = frozenset({"cpu", "cuda"})
_CONTAINER_METHODS = frozenset({"append", "extend", "insert", "pop", "update", "keys", "values", "items"})
# numpy's name of an operator -> Python's.
_UFUNCS = {
    **dict(subtract="sub", multiply="mul", divide="truediv", floor_divide="floordiv", remainder="mod", power="pow"),
    **dict(bitwise_and="and", bitwise_or="or", bitwise_xor="xor", left_shift="lshift", right_shift="rshift"),
    **dict(equal="eq", not_equal="ne", less="lt", less_equal="le", greater="gt", greater_equal="ge"),
    **dict(add="add", matmul="matmul"),
}
_GRADIENTS = frozenset({"backward", "grad", "requires_grad_", "retain_grad", "register_hook"})


class Proxy:
    """One recorded value. `_metas` are its shapes: one variant, or two where the number of rows varies.

    `_maybe` are the sites that it may be a view of, where meta tensors can't tell.
    """

    def __init__(
        self,
        recorder: Recorder,
        node: int | None,
        metas: tuple[object, ...],
        scope: Scope | None,
        maybe: frozenset[Root] = frozenset(),
    ) -> None:
        self._recorder = recorder
        self._node = node
        self._metas = metas
        self._scope = scope
        self._maybe = maybe
        self._slot: str | None = None
        self._item_of: tuple[int | None, Arg] | None = None

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self) -> Proxy:
        """Send this value home, as it is at this point of the program."""
        if self._is_done:
            raise RefusedError(f"the run is over; call .save() inside the block; {user_line()}")
        saved = Proxy(self._recorder, self._node, self._metas, self._scope, self._maybe)
        self._slot = saved._slot = self._here.save(self)
        return saved

    @property
    def _here(self) -> Recorder:
        """Who records what happens to the value: the invoke that is open, which may be another than its own."""
        return active.open_or(self._recorder)

    @property
    def _local(self) -> Proxy:
        """What stands for the value in the invoke that is open."""
        here = self._here
        return self if here is self._recorder else here.localized(self)

    @property
    def _variants(self) -> tuple[object, ...]:
        """`_metas`; to another invoke a value is that of the last trip of its block."""
        return self._metas if self._here is self._recorder else self._metas[-1:]

    @property
    def value(self) -> Any:
        """The saved value, once the run is over."""
        if not self._is_done:
            raise ValueNotSetError(f"{self._recorder.unset}; {user_line()}")
        if self._recorder.state == "failed":
            raise ValueNotSetError(f"this value was never computed: {self._recorder.why_failed} ({self._where()})")
        if self._slot is None:
            raise ValueNotSetError(f"this value wasn't saved: call .save() on it inside the block ({self._where()})")
        if self._slot not in self._recorder.values:
            raise ValueNotSetError(f"this value was never computed: the run didn't reach its save ({self._where()})")
        return self._recorder.values[self._slot]

    @property
    def _is_done(self) -> bool:
        return self._recorder.state in {"done", "failed"}

    @property
    def _has_value(self) -> bool:
        return self._slot is not None and self._slot in self._recorder.values

    def _where(self) -> str:
        line = None if self._node is None else self._recorder.lines.get(self._node)
        return "recorded at " + str(line) if line else "tracer.result"

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
            return _Method(self, f"py.{name}", name)
        if name in _FIELDS and (isinstance(first, tuple) or not isinstance(first, torch.Tensor)):
            return self._op("py.attr", getattr, name)
        if f"tensor.{name}" in OPS and not isinstance(first, list | dict):
            return _Method(self, f"tensor.{name}", name)
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
        proxies = [value for value in _flat((args, kwargs)) if isinstance(value, Proxy)]
        if all(proxy._is_done for proxy in proxies):
            return func(*_unwrap(args), **_unwrap(kwargs))
        return torch_op(proxies[0]._here, func, args, kwargs)

    def __getitem__(self, index: object) -> Any:
        if self._is_done:
            return self.value[_unwrap(index)]
        if self._slot == "result":
            raise RefusedError(f"tracer.result is known after the run; {user_line()}")
        if (local := self._local) is not self:
            return local[index]
        item = self._op("py.getitem", operator.getitem, index)
        item._item_of = (self._node, self._recorder.encode(index))
        return item

    def __setitem__(self, index: object, value: object) -> None:
        if self._is_done:
            self.value[_unwrap(index)] = _unwrap(value)
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
            return _unwrap(item) in self.value
        raise ControlFlowError(f"`in` over a value isn't known while recording; use (x == y).any(); {user_line()}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **kwargs: object) -> Any:
        """numpy's functions: its operators, for an array on the left, are recorded."""
        name = _UFUNCS.get(ufunc.__name__) if method == "__call__" and not kwargs.keys() - {"out"} else None
        python = getattr(operator, f"__{name}__", None)
        if self._is_done:
            whole = _unwrap(inputs)
            return python(*whole) if python else getattr(ufunc, method)(*whole, **_unwrap(kwargs))
        if python is None:
            raise RefusedError(f"numpy's {ufunc.__name__} can't be recorded, torch's functions can; {user_line()}")
        return self._here.op(f"py.{name}", python, inputs, {})

    def __round__(self, digits: int | None = None) -> Any:
        return _round(self.value, digits) if self._is_done else self._op("py.round", _round, digits)

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


class _Method:
    """A bound method of a recorded value; calling it records the operation."""

    def __init__(self, proxy: Proxy, op: str, name: str) -> None:
        self.proxy, self.op, self.name = proxy, op, name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if self.op == "tensor.to" and _is_move(args, kwargs):
            return self.proxy
        args, kwargs = _without_device(args, kwargs)
        return self.proxy._here.op(self.op, _method(self.name), (self.proxy, *args), kwargs)


def proxies_in(value: object) -> Iterator[Proxy]:
    """The proxies inside an argument."""
    match value:
        case Proxy():
            yield value
        case tuple() | list():
            for item in value:
                yield from proxies_in(item)
        case dict():
            yield from proxies_in(list(value.values()))
        case slice():
            yield from proxies_in((value.start, value.stop, value.step))


def torch_op(recorder: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a call of a torch function."""
    name = op_name(func)
    if name is None:
        label = getattr(func, "__name__", repr(func))
        raise RefusedError(f"torch function {label} isn't among the operations of a graph; {user_line()}")
    args, kwargs = _without_device(args, kwargs)
    if name.startswith("tensor.") and "input" in kwargs:  # a method has no such keyword
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"), *args)
    return recorder.op(name, func, tuple(args), dict(kwargs))


def op_name(func: Callable[..., Any]) -> str | None:
    """The table's name of a torch function; None if it isn't in the table."""
    return _names().get(func)


_NAMES: dict[Any, str] = {}


def _names() -> dict[Any, str]:
    if not _NAMES:
        spaces = {
            "tensor": torch.Tensor,
            "special": torch.special,
            "linalg": torch.linalg,
            "nn": torch.nn.functional,
            "torch": torch,
        }
        for prefix, space in spaces.items():
            for name in sorted(OPS):
                head, _, bare = name.partition(".")
                function = getattr(space, bare, None) if head == prefix else None
                if function is not None and getattr(function, "__hash__", None):
                    _NAMES[function] = name
        for op in OPS:  # `torch.clamp_(x)` is `x.clamp_()`
            head, _, bare = op.partition(".")
            function = getattr(torch, bare, None) if head == "tensor" and bare.endswith("_") else None
            if function is not None:
                _NAMES.setdefault(function, op)
        for op in OPS:  # torch also reaches operators of plain tensors: `tensor + proxy`
            head, _, bare = op.partition(".")
            function = getattr(torch.Tensor, f"__{bare}__", None) if head == "py" else None
            if callable(function):
                _NAMES.setdefault(function, op)
    return _NAMES


def _method(name: str) -> Callable[..., object]:
    def run(tensor: Any, /, *args: Any, **kwargs: Any) -> object:
        return getattr(tensor, name)(*args, **kwargs)

    return run


def _setitem(target: Any, index: Any, value: Any) -> None:
    target[index] = value


def _size(value: Any, dim: int) -> object:
    return meta.UNKNOWN


def _round(value: Any, digits: int | None = None) -> object:
    if isinstance(value, torch.Tensor):
        return torch.round(value, decimals=digits or 0)
    return meta.UNKNOWN if isinstance(value, meta.Unknown) else round(value, digits)


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


def _is_move(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    rest, rest_kwargs = _without_device(args, kwargs)
    return not rest and not any(rest_kwargs.values())


def _without_device(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without devices: the engine keeps every value on the model's own."""
    plain = tuple(arg for arg in args if not isinstance(arg, torch.device) and not _is_device_name(arg))
    return plain, {key: value for key, value in kwargs.items() if key not in {"device", "non_blocking", "pin_memory"}}


def _is_device_name(value: object) -> bool:
    return isinstance(value, str) and value.split(":")[0] in {"cpu", "cuda", "meta", "mps"}


def _why() -> str:
    from nnsight_vllm.trace.blocks.block import why_native

    reason = why_native(user_frame())
    return f" ({reason})" if reason else ""


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _unwrap(value: Any) -> Any:
    if isinstance(value, Proxy):
        return value.value
    if isinstance(value, tuple | list) and type(value) in {tuple, list}:
        return type(value)(_unwrap(item) for item in value)
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_unwrap(value.start), _unwrap(value.stop), _unwrap(value.step))
    return value


def _binary(name: str, function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Proxy, object], Any]:
    def run(self: Proxy, other: object) -> Any:
        mine, theirs = (other, self) if reflected else (self, other)
        if self._is_done:
            return function(_unwrap(mine), _unwrap(theirs))
        return self._here.op(name, function, (mine, theirs), {})

    return run


def _inplace(name: str, function: Callable[[Any, Any], Any]) -> Callable[[Proxy, object], Any]:
    def run(self: Proxy, other: object) -> Any:
        if self._is_done:
            return function(self.value, _unwrap(other))
        if isinstance(self._metas[0], int | float | bool | str | tuple):
            return self._here.op(name.replace("py.i", "py."), function, (self, other), {})
        return self._here.op(name, function, (self, other), {})

    return run


def _unary(name: str, function: Callable[[Any], Any]) -> Callable[[Proxy], Any]:
    def run(self: Proxy) -> Any:
        return function(self.value) if self._is_done else self._here.op(name, function, (self,), {})

    return run


def _refused(what: str) -> Callable[..., NoReturn]:
    def run(self: Proxy, *args: object) -> NoReturn:
        raise RefusedError(f"{what} of a value can't be recorded; {user_line()}")

    return run


def _install_operators() -> None:
    arithmetic = [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
    for bare in arithmetic:
        function = getattr(operator, f"__{bare}__")
        setattr(Proxy, f"__{bare}__", _binary(f"py.{bare}", function, reflected=False))
        setattr(Proxy, f"__r{bare}__", _binary(f"py.{bare}", function, reflected=True))
        setattr(Proxy, f"__i{bare}__", _inplace(f"py.i{bare}", getattr(operator, f"__i{bare}__")))
    for bare in ["eq", "ne", "lt", "le", "gt", "ge"]:
        setattr(Proxy, f"__{bare}__", _binary(f"py.{bare}", getattr(operator, bare), reflected=False))
    for bare in ["neg", "pos", "invert", "abs"]:
        setattr(Proxy, f"__{bare}__", _unary(f"py.{bare}", getattr(operator, bare)))
    for bare in ["divmod", "complex", "delitem", "enter", "exit"]:
        setattr(Proxy, f"__{bare}__", _refused(f"__{bare}__"))
    Proxy.__hash__ = object.__hash__  # type: ignore[method-assign, assignment]


_install_operators()
