"""Python runs this when it starts, where this folder is on its path: what vLLM's Triton kernels need to run in Triton's interpreter.

Triton has no backend named "cpu", which vLLM's CPU build asks for and the interpreter doesn't need. Not for torch's
compiler: an engine must be started with `enforce_eager=True`.
"""

from types import SimpleNamespace
from typing import Any

from triton.backends import backends


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)

from triton.runtime import interpreter  # noqa: E402  (Triton looks for its backends when it's imported)


def take_any_mask(name: str) -> None:
    """`a & b` of masks is a number here, which the interpreter's memory refuses; compiled kernels take it."""
    original = getattr(interpreter.InterpreterBuilder, name)

    def masked(builder: Any, *args: Any) -> Any:
        at = 2 if name == "create_masked_store" else 1
        mask = interpreter.TensorHandle(args[at].data.astype(bool), interpreter.tl.int1)
        return original(builder, *args[:at], mask, *args[at + 1 :])

    setattr(interpreter.InterpreterBuilder, name, masked)


take_any_mask("create_masked_load")
take_any_mask("create_masked_store")
