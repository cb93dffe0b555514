"""vLLM's worker with sites in its model: named as `worker_cls`, so an engine that doesn't ask for it is untouched.

Sites are put into the model after it's loaded and before it's compiled; one probing forward of our own after that
says what they are. The methods named `nnsight_*` are called from the front end, between steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch

from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.graph.check import check
from nnsight_vllm.plan.program import ProgramCache
from nnsight_vllm.wire import refusal
from nnsight_vllm.wire.limits import limits_of
from nnsight_vllm.worker.batch.executor import Executor
from nnsight_vllm.worker.batch.tensor_store import Store
from nnsight_vllm.worker.batch.waiting import SiteTable
from nnsight_vllm.worker.model import taps
from nnsight_vllm.worker.model.calls import Calls
from nnsight_vllm.worker.model.catalogue import describe
from nnsight_vllm.worker.model.instrument import instrument
from nnsight_vllm.worker.model.instrumented import Instrumented
from nnsight_vllm.worker.model.sampling_sites import sampling_sites
from nnsight_vllm.worker.seam import startup
from nnsight_vllm.worker.seam.vllm_seam import Seam

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = startup.worker_base()


class Worker(_Base):
    """One process with a model in which requests may carry graphs."""

    instrumented: Instrumented
    catalogue: Catalogue
    seam: Seam
    executor: Executor

    def init_device(self) -> None:
        with refusal.sent(startup.settings_of(self.vllm_config).get(refusal.KEY)):
            startup.require_supported()
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        settings = startup.settings_of(self.vllm_config)
        with refusal.sent(settings.get(refusal.KEY)):
            self.instrumented = instrument(self.model_runner.get_model(), self.vllm_config, settings["sites"])
        startup.salt_compile_cache(self.vllm_config, self.instrumented.fingerprint)
        self.seam = startup.seam_of(self.model_runner, self.vllm_config)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self._start()
        return times

    def nnsight_catalogue(self) -> bytes:
        """The model's modules and sites, as a msgpack `Catalogue`."""
        return msgspec.msgpack.encode(self.catalogue)

    def nnsight_put(self, files: list[bytes]) -> None:
        """Take constants: safetensors bytes, each with one tensor named `tensor`."""
        self.executor.store.put(files)

    def nnsight_drop(self, digests: list[str]) -> None:
        """Forget constants."""
        self.executor.store.drop(digests)

    def nnsight_store(self) -> bytes:
        """Numbers of the store: `bytes`, `count`, `received_bytes`."""
        return msgspec.msgpack.encode(self.executor.store.info())

    def nnsight_stats(self) -> bytes:
        """What was run so far, as msgpack `Stats`."""
        return msgspec.msgpack.encode(self.executor.stats())

    def nnsight_integrity(self, live: list[str]) -> bytes:
        """What is left over, as a msgpack list of lines, when only the requests `live` haven't ended.

        The engine tells its worker of ended requests with the next step only, so those are dropped here first.
        """
        known = self.seam.known_requests
        ended = [id for id in self.executor.requests if id not in live and id in known]
        self.executor.drop(ended)
        if not live:
            self.executor.exports.end()
        return msgspec.msgpack.encode(self.executor.leftovers(known))

    def _start(self) -> None:
        """Learn the sites from one forward, then be ready for graphs."""
        logits: list[torch.Tensor] = []
        self.instrumented.probe(lambda: logits.append(self.seam.probing_forward()))
        found = describe(self.instrumented)
        vocab_size, dtype = logits[-1].shape[-1], str(logits[-1].dtype).removeprefix("torch.")
        order = 1 + max((site.order for site in found.sites), default=-1)
        sampling = sampling_sites(order, vocab_size, dtype)
        self.catalogue = catalogue = msgspec.structs.replace(
            found, sites=[*found.sites, *(site.info for site in sampling)], vocab_size=vocab_size
        )
        ours = startup.settings_of(self.vllm_config)
        limits = limits_of(ours.get("limits", {}), is_accelerator=self.device.type != "cpu")
        table = SiteTable(
            sites=self.instrumented.sites | {site.info.name: site for site in sampling},
            orders={info.name: info.order for info in catalogue.sites},
            calls=Calls(self.instrumented, limits),
            active=taps.ACTIVE,
        )
        programs = ProgramCache(lambda graph: check(graph, catalogue))
        self.executor = Executor(table, programs, Store(self.device), self.device, ours.get("batching", True), limits)
        self.executor.warm_up()
        self.seam.executor = self.executor
