"""A `nnsight-vllm serve` (or a stock `vllm serve`) in a process of its own, for tests and scripts that talk to one over HTTP."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import httpx
import torch

if TYPE_CHECKING:
    from typing import Self

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "
ENGINE = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "32", "--seed", "0"]
ENGINE += ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
OURS = [sys.executable, "-m", "nnsight_vllm.server.cli", "serve"]
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0.0}
SCALED = {"site": "model.layers.0.output[0]", "op": "scale", "scale": -3.0}
LAST = {"name": "h", "site": "model.layers.1.output[0]", "positions": "last"}
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

    def ask(self, method: str, route: str, tenant: str = "alice", **more: Any) -> httpx.Response:
        """A request below `/v1/`, with a tenant's key; `more` is what `httpx.request` takes."""
        return httpx.request(method, f"{self.url}/v1/{route}", **_with_key(tenant, more))

    def post(self, body: Any, route: str = "completions", tenant: str = "alice", **headers: str) -> httpx.Response:
        return self.ask("POST", route, tenant, json=body, headers=headers)

    def stream(self, body: Any, tenant: str = "alice") -> AbstractContextManager[httpx.Response]:
        """A streamed completion, to be read as it comes."""
        return httpx.stream(
            "POST", f"{self.url}/v1/completions", **_with_key(tenant, {"json": {**body, "stream": True}})
        )

    def leftovers(self) -> Any:
        """What its engine still holds of requests that have ended."""
        return self.ask("GET", "interventions/integrity").json()["leftovers"]

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def metric(self, name: str, default: float | None = None) -> float:
        """A metric's value, summed over its labels; `default` where it has none yet."""
        text = self.metrics()
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        assert found or default is not None, f"no {name} in:\n{text}"
        return sum(map(float, found)) if found else default or 0

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
        if not wait_until(self._answers, self._seconds):
            raise TimeoutError(f"the server didn't answer within {self._seconds:.0f} s:\n{self.log[-6000:]}")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended at its start:\n{self.log[-6000:]}")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False


def key_of(tenant: str) -> dict[str, str]:
    """As a header."""
    return {"Authorization": f"Bearer {KEYS[tenant]}"}


def _with_key(tenant: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"timeout": 60, **arguments, "headers": {**key_of(tenant), **arguments.get("headers", {})}}


def tensor_of(saved: Mapping[str, Any]) -> torch.Tensor:
    """A saved tensor of an answer."""
    data = bytearray(base64.b64decode(saved["data"]))
    return torch.frombuffer(data, dtype=getattr(torch, saved["dtype"])).reshape(saved["shape"])


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it came to be so in time."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


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
