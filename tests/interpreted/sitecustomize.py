"""Python runs this when it starts, where this folder is on its path: gives Triton the backend that vLLM's CPU build asks for.

Triton itself has none named "cpu", and needs none, since its kernels run in its interpreter. Not for torch's compiler: an
engine must be started with `enforce_eager=True`.
"""

from types import SimpleNamespace

from triton.backends import backends


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)
