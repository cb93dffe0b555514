"""Every error this package raises on purpose.

NNsightError
├── RecordError                 while the block is recorded; carries the user's file and line
│   ├── OutOfOrderError         a site that the model has already passed
│   ├── UnknownModuleError      no such module or site; names the nearest ones
│   ├── RefusedError            exists in the model, but can't be touched this way; says why
│   ├── ScopeError              a name bound on one path only, or used outside its branch or loop
│   ├── ControlFlowError        Python control flow over a proxy that can't be recorded
│   └── GradientsUnavailable    vLLM keeps no tape
├── GraphError                  a graph that isn't legal (bad bytes, unknown op, dangling value)
├── ValueNotSetError            a proxy's value is read, but it was not saved or never computed
├── AdmissionError              the request can't be accepted: prompt, sampling arguments, limits
│   └── UnknownEditError        no edit has this name; names the nearest ones
├── EngineSettingError          an engine setting that graphs don't support yet
├── InterventionError           the graph failed while it ran; carries the user's file and line
│   └── PreemptedError          the engine evicted the request; sending it again may succeed
├── ConnectionFailed            a server that can't be reached, or doesn't answer as ours do
│   ├── UnauthorizedError       it wants another key
│   └── BusyError               it has too much to do; sending the request again may succeed
├── IntegrityError              the worker still tracks something that it shouldn't
└── DemoModelError              the demo checkpoint can't be had
"""

from __future__ import annotations


class NNsightError(Exception):
    """Base of every error raised on purpose by this package."""


class RecordError(NNsightError):
    """The block can't be recorded."""


class OutOfOrderError(RecordError):
    """A site is touched after the model has passed it."""


class UnknownModuleError(RecordError, AttributeError):
    """No module or site has this name."""


class RefusedError(RecordError):
    """The module or site exists, but can't be used this way."""


class ScopeError(RecordError):
    """A name bound on one path only, or a value used outside its branch or loop."""


class ControlFlowError(RecordError):
    """Control flow over a proxy that can't be recorded."""


class GradientsUnavailable(RecordError):
    """Gradients were asked for; vLLM keeps no tape."""


class GraphError(NNsightError):
    """A graph that isn't legal."""


class ValueNotSetError(NNsightError):
    """The value of a proxy was asked for, but it was never delivered."""


class AdmissionError(NNsightError, ValueError):
    """A request that the engine can't accept."""


class UnknownEditError(AdmissionError, KeyError):
    """No edit has this name."""

    __str__ = Exception.__str__  # `KeyError` would show the message quoted


class EngineSettingError(NNsightError, ValueError):
    """An engine setting that requests with graphs don't support."""


class InterventionError(NNsightError):
    """A graph failed while it ran in the engine. `retryable` says whether sending it again may succeed."""

    retryable = False


class PreemptedError(InterventionError):
    """The engine evicted the request to free memory."""

    retryable = True


class ConnectionFailed(NNsightError, ConnectionError):
    """A server can't be reached, broke off, took too long, or isn't one of ours. `retryable`: whether it may go better later."""

    retryable = False


class UnauthorizedError(ConnectionFailed):
    """The server wants a key, or another one."""


class BusyError(ConnectionFailed):
    """The server refused for now."""

    retryable = True


class IntegrityError(NNsightError):
    """The worker tracks state of requests that have ended."""


class DemoModelError(NNsightError):
    """The demo checkpoint can neither be found nor made."""
