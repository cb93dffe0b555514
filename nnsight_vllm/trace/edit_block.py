"""`with model.edit() as edited:` records an edit. It has no prompt, and applies in every iteration of a request.

What stands in the block directly is recorded as one block over all iterations; `edited.iter[...]` and `module.all()` may
open blocks of their own instead. An edit only changes the model: it sends nothing home and stops nothing, since that is
for the request that uses it to say.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.codec import encode
from nnsight_vllm.graph.nodes import Op, Read, Write
from nnsight_vllm.graph.walk import constants_of, sites_written
from nnsight_vllm.trace import garbage
from nnsight_vllm.trace.edits import RecordedEdit
from nnsight_vllm.trace.encode import Constants
from nnsight_vllm.trace.flow import Flow
from nnsight_vllm.trace.proxy import Proxy
from nnsight_vllm.trace.recorded_block import RecordedBlock
from nnsight_vllm.trace.recorder import Recorder
from nnsight_vllm.trace.recording import RunValue, is_recording, pop
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from nnsight_vllm.trace.tree import Tree

Model = TypeVar("Model")


class EditBlock(RecordedBlock, Generic[Model]):
    """The context of an edit. `target` is what `as` binds; `put` takes the edit when it is recorded."""

    def __init__(self, tree: Tree, name: str | None, target: Model, put: Callable[[RecordedEdit], None]) -> None:
        self._tree = tree
        self._name = name
        self._target = target
        self._put = put
        self._line = user_line()

    def __enter__(self) -> Model:
        if is_recording():
            raise RefusedError(f"an edit can't be opened inside a trace or another edit; {user_line()}")
        self._constants = Constants()
        self._recorder = EditRecorder(self._tree, self._constants)
        self._enter_block(self._recorder)
        return self._target

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            with garbage.paused():
                edit = self._finish() if self._leave_block(kind) else None
        finally:
            self._recorder.state = "closed"
            pop()
        if edit is not None:
            self._put(edit)
        return edit is not None

    def _finish(self) -> RecordedEdit:
        recorder = self._recorder
        recorder.flow.end_whole()
        graph = recorder.graph()
        for node in graph.body.nodes:
            if isinstance(node, Read | Write) or (isinstance(node, Op) and node.writes is not None):
                raise RefusedError(
                    f"what an edit does beside its iteration blocks belongs to none: put it into an edit of its own, which "
                    f"applies in all of them, or into a block; {recorder.lines[node.id]}"
                )
        if not sites_written(graph.body):
            raise RefusedError(
                f"this edit changes nothing: assign a module's output, or change it in place, as in h[:] = 0; {self._line}"
            )
        check(graph, self._tree.catalogue)
        tensors = {digest: self._constants.data[digest] for digest in constants_of(graph.body)}
        return RecordedEdit(self._name, encode(graph), tensors, recorder.lines, self._line)


class EditRecorder(Recorder):
    """Records an edit: nobody knows how long the prompt is, nor how many iterations come."""

    flow: EditFlow

    def __init__(self, tree: Tree, constants: Constants) -> None:
        super().__init__(tree, constants, None, None)
        self.flow = EditFlow(self, self.places)
        self.flow.begin_whole()

    def save(self, value: RunValue) -> NoReturn:
        self._refuse("save")

    def log(self, args: tuple[object, ...]) -> NoReturn:
        self._refuse("log")

    def stop(self) -> NoReturn:
        self._refuse("stop the request")

    def _refuse(self, what: str) -> NoReturn:
        raise RefusedError(
            f"an edit runs in every request that uses it, so it can't {what}: do that in the trace; {user_line()}"
        )


class EditFlow(Flow):
    """Opens the block over all iterations by itself, as long as nobody opens another."""

    _is_whole = False

    def begin_whole(self) -> None:
        super().begin_iterations(0, None, 1, None)
        self._is_whole = True

    def end_whole(self) -> None:
        block = self.places.block
        if self._is_whole and block is not None and self.recorder.scope is block.scope:
            self.end_iterations()

    def begin_iterations(self, start: int, stop: int | None, step: int, within: str | None) -> Proxy:
        if self._is_whole:
            whole = self.places.block
            assert whole is not None
            if whole.scope.nodes or self.recorder.scope is not whole.scope:
                raise RefusedError(
                    f"an edit applies in all iterations, or has iteration blocks and nothing beside them: put what stands "
                    f"before this block into an edit of its own; {user_line()}"
                )
            self.abandon_iterations()
            self._is_whole = False
        return super().begin_iterations(start, stop, step, within)
