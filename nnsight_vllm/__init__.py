"""Read and edit the inside of a language model while vLLM serves it: `from nnsight_vllm import VLLM`.

Importing the package starts nothing, patches nothing and loads neither vLLM nor torch: every public name is looked up at first use.
"""

from __future__ import annotations

import builtins as _builtins
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_vllm.demo import demo_model as demo_model
    from nnsight_vllm.errors import AdmissionError as AdmissionError
    from nnsight_vllm.errors import BusyError as BusyError
    from nnsight_vllm.errors import ConnectionFailed as ConnectionFailed
    from nnsight_vllm.errors import ControlFlowError as ControlFlowError
    from nnsight_vllm.errors import DemoModelError as DemoModelError
    from nnsight_vllm.errors import EngineSettingError as EngineSettingError
    from nnsight_vllm.errors import GradientsUnavailable as GradientsUnavailable
    from nnsight_vllm.errors import GraphError as GraphError
    from nnsight_vllm.errors import IntegrityError as IntegrityError
    from nnsight_vllm.errors import InterventionError as InterventionError
    from nnsight_vllm.errors import NNsightError as NNsightError
    from nnsight_vllm.errors import OutOfOrderError as OutOfOrderError
    from nnsight_vllm.errors import PreemptedError as PreemptedError
    from nnsight_vllm.errors import RecordError as RecordError
    from nnsight_vllm.errors import RefusedError as RefusedError
    from nnsight_vllm.errors import ScopeError as ScopeError
    from nnsight_vllm.errors import UnauthorizedError as UnauthorizedError
    from nnsight_vllm.errors import UnknownEditError as UnknownEditError
    from nnsight_vllm.errors import UnknownModuleError as UnknownModuleError
    from nnsight_vllm.errors import ValueNotSetError as ValueNotSetError
    from nnsight_vllm.model import VLLM as VLLM
    from nnsight_vllm.trace.builtins import bool as bool
    from nnsight_vllm.trace.builtins import dict as dict
    from nnsight_vllm.trace.builtins import float as float
    from nnsight_vllm.trace.builtins import int as int
    from nnsight_vllm.trace.builtins import list as list
    from nnsight_vllm.trace.builtins import log as log
    from nnsight_vllm.trace.builtins import str as str
    from nnsight_vllm.trace.builtins import tuple as tuple
    from nnsight_vllm.trace.events import Event as Event
    from nnsight_vllm.trace.record import record as record

__version__ = "0.1.0"

_ERRORS = (
    "AdmissionError",
    "BusyError",
    "ConnectionFailed",
    "ControlFlowError",
    "DemoModelError",
    "EngineSettingError",
    "GradientsUnavailable",
    "GraphError",
    "IntegrityError",
    "InterventionError",
    "NNsightError",
    "OutOfOrderError",
    "PreemptedError",
    "RecordError",
    "RefusedError",
    "ScopeError",
    "UnauthorizedError",
    "UnknownEditError",
    "UnknownModuleError",
    "ValueNotSetError",
)
_BUILTINS = ("bool", "dict", "float", "int", "list", "log", "str", "tuple")
_HOMES = {
    "VLLM": "nnsight_vllm.model",
    "demo_model": "nnsight_vllm.demo",
    "Event": "nnsight_vllm.trace.events",
    "record": "nnsight_vllm.trace.record",
    **_builtins.dict.fromkeys(_ERRORS, "nnsight_vllm.errors"),
    **_builtins.dict.fromkeys(_BUILTINS, "nnsight_vllm.trace.builtins"),
}

__all__ = ["VLLM", "Event", "demo_model", "record", *_ERRORS]  # no builtins: `import *` must not replace Python's own


if not TYPE_CHECKING:  # a type checker must not take every name for a public one

    def __getattr__(name):
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(home), name)


def __dir__() -> _builtins.list[_builtins.str]:
    return sorted({*globals(), *_HOMES})
