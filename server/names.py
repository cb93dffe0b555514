"""Names that tenants give to what they keep here, and the nearest ones for who mistypes one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_RULE = "a name has 1 to 64 of A-Z a-z 0-9 . _ -"


def nearest(name: str, known: Iterable[str], length: int = 64) -> str:
    """The end of a message: known names like this one, of which at most `length` characters are looked at. Empty if none is."""
    near = difflib.get_close_matches(name[:length], list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""
