"""A refusal of the engine's processes on its way home: of an error there vLLM tells the front end only that there was one.

The front end names a file in a folder of its own, through our part of `additional_config`; the worker writes into it why
it refuses to start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnsight_vllm.errors import EngineSettingError

KEY = "refusal_file"


@contextmanager
def received() -> Iterator[str]:
    """In the front end, around the start: gives the file's name, and raises the refusal in place of vLLM's error."""
    with tempfile.TemporaryDirectory(prefix="nnsight_vllm-") as folder, _raised_from(Path(folder) / "refusal") as file:
        yield str(file)


@contextmanager
def _raised_from(file: Path) -> Iterator[Path]:
    try:
        yield file
    except Exception as error:
        if not file.exists():
            raise
        raise EngineSettingError(file.read_text(encoding="utf-8")) from error


@contextmanager
def sent(file: str | None) -> Iterator[None]:
    """In the worker, around what may refuse to start. None: nobody waits for the reason."""
    try:
        yield
    except EngineSettingError as error:
        if file is not None:
            Path(file).write_text(str(error), encoding="utf-8")
        raise
