"""Speculative decoding beside graphs: requests with graphs run without drafts, the others keep theirs.

A graph sees one row for each token that stays, so nothing may be drafted for its request. vLLM gives drafts in two ways, and
both end here: what was drafted for a running request is dropped before a step is planned, and the placeholders that fill up
a request with one token left of its prompt (for captured graphs' sake) are taken out of the plan.
"""

from __future__ import annotations

from typing import Any

from nnsight_vllm.errors import EngineSettingError
from nnsight_vllm.scheduler.extras import has_graph


def refuse_other_methods(speculative_config: Any) -> None:
    """Raise `EngineSettingError` for speculative decoding (vLLM's config of it, None: without) that isn't tested with graphs."""
    if speculative_config is not None and speculative_config.method != "ngram":
        raise EngineSettingError(
            f"speculative_config with method {speculative_config.method!r}: beside graphs only 'ngram' is supported"
        )


class DraftPolicy:
    """Mixed in before a vLLM scheduler."""

    running: list[Any]
    requests: dict[str, Any]
    num_spec_tokens: int

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        for request in self.running if self.num_spec_tokens else ():
            if request.spec_token_ids and has_graph(request):
                request.spec_token_ids = []
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _update_after_schedule(self, scheduled: Any) -> None:
        """vLLM's own goes by what is in the plan, so this comes before it."""
        drafts = scheduled.scheduled_spec_decode_tokens
        for id in [id for id in drafts if has_graph(self.requests[id])]:
            num_drafts = len(drafts.pop(id))
            scheduled.num_scheduled_tokens[id] -= num_drafts
            scheduled.total_num_scheduled_tokens -= num_drafts
        super()._update_after_schedule(scheduled)  # type: ignore[misc]
