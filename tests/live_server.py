"""A `nnsight-vllm serve` (or a stock `vllm serve`) in a process of its own, for tests and scripts that talk to one over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from typing import Self

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
ENGINE = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "32", "--seed", "0"]
ENGINE += ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
OURS = [sys.executable, "-m", "nnsight_vllm.server.cli", "serve"]
STOCK = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


class LiveServer:
    """`arguments` as on the command line, the model first. `url` answers when the block has been entered."""

    def __init__(
        self,
        arguments: Sequence[str],
        command: Sequence[str] = OURS,
        environment: Mapping[str, str] | None = None,
        seconds: float = 240,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [*command, *arguments, "--port", str(self.port)]
        self._environment = {**os.environ, **(environment or {})}
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """The exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> None:
        """End it, and its engine's processes."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended at its start:\n{self.log[-6000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(f"the server didn't answer within {self._seconds:.0f} s:\n{self.log[-6000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_tiny(checkpoint: str, folder: Path, *more: str, log_level: str = "ERROR") -> LiveServer:
    """`nnsight-vllm serve` on a tiny checkpoint, with the keys `KEYS`; `folder` is for its files, `more` goes to its command line."""
    tenants = folder / "tenants.toml"
    tenants.write_text("".join(f'{name} = ["{key}"]\n' for name, key in KEYS.items()))
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    named = ("--served-model-name", "tiny", "--chat-template", str(template))
    arguments = [checkpoint, *ENGINE, *named, "--tenants", str(tenants), "--edits-dir", str(folder / "edits")]
    return LiveServer([*arguments, *more], environment={**ENVIRONMENT, "VLLM_LOGGING_LEVEL": log_level})
