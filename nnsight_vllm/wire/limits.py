"""What one request's graph may cost the engine, and all together: every bound that the worker keeps, by its setting's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from nnsight_vllm.errors import EngineSettingError


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and counts; each is the most that is allowed.

    Results: `request` bytes that one request sends home, `engine` of all that live; `saved_per_step` of one request in one
    step; `log_lines` of one request. Time: `seconds` of its program and `trips` of its loops, each a step and request.
    Memory: `value_bytes` that one operation makes, what it needs on the way included; `held_bytes` of values that one request
    keeps, `held_bytes_in_all` of all. `work` of one operation: multiplications and additions; an element that is
    touched otherwise counts as 64.
    """

    request: int = 1 << 30
    engine: int = 8 << 30
    saved_per_step: int = 1 << 30
    log_lines: int = 10_000
    seconds: float = 10.0
    trips: int = 65_536
    value_bytes: int = 2 << 30
    held_bytes: int = 4 << 30
    held_bytes_in_all: int = 16 << 30
    work: int = 1 << 38

    def excess(self, of_request: int, of_all: int, in_step: int = 0) -> str:
        """What is over its limit of bytes sent home, in words; empty where nothing is."""
        if of_request > self.request:
            return f"the request saved {of_request} bytes; max_saved_bytes is {self.request}"
        if of_all > self.engine:
            return f"the requests that run saved {of_all} bytes; max_saved_bytes_in_all is {self.engine}"
        if in_step > self.saved_per_step:
            return f"the request saved {in_step} bytes in one step; the limit `saved_per_step` is {self.saved_per_step}"
        return ""


def limits_of(given: Mapping[str, object], is_accelerator: bool = False) -> Limits:
    """Limits by name, the others with their defaults. An accelerator may do 64 times the work. Raises `EngineSettingError`."""
    check_limits(given)
    defaults = {"work": Limits.work * 64} if is_accelerator else {}
    return Limits(**{**defaults, **given})  # type: ignore[arg-type]


def check_limits(given: Mapping[str, object]) -> None:
    """Raise `EngineSettingError` for a limit that there isn't, or that is no positive number."""
    names = [field.name for field in fields(Limits)]
    for name, value in given.items():
        if name not in names:
            raise EngineSettingError(f"limits: there is no {name!r}; expected one of {', '.join(names)}")
        is_number = isinstance(value, int | float if name == "seconds" else int) and not isinstance(value, bool)
        if not is_number or not value > 0:  # type: ignore[operator]
            raise EngineSettingError(
                f"limits: {name}={value!r} is no positive {'' if name == 'seconds' else 'whole '}number"
            )


DEFAULT = Limits()
