"""A `with` block that records: run natively, or rewritten where its control flow needs that."""

from __future__ import annotations

from types import FrameType

from nnsight_vllm.trace.blocks.block import Body, SkipBody, prepare
from nnsight_vllm.trace.dispatch import Dispatch
from nnsight_vllm.trace.recording import Recording, pop, push
from nnsight_vllm.trace.source import user_frame


class RecordedBlock:
    """`frame` is where the block stands."""

    frame: FrameType
    _body: Body | None = None

    def _enter_block(self, recording: Recording | None) -> None:
        """Open the recording, if it's the block's own, and decide how the block runs."""
        if recording is not None:
            push(recording)
        try:
            self.frame = user_frame()
            self._body = prepare(self.frame)
            if self._body is not None:
                self._body.skip(self.frame)
        except BaseException:
            pop()
            raise

    def _leave_block(self, kind: type[BaseException] | None) -> bool:
        """Run the rewritten body if the native one was skipped. Returns whether the block ended well."""
        if self._body is not None and kind is not None and issubclass(kind, SkipBody):
            self._body.run(Dispatch())
            return True
        return kind is None
