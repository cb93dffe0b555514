"""A model that can be edited: `edit`, `edits`, `clear_edits`, and copies of it that run with edits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_vllm.errors import RefusedError
from nnsight_vllm.trace.edits import NamedEdits, Standing
from nnsight_vllm.trace.envoy import Envoy
from nnsight_vllm.trace.iterations import IterationIndexer
from nnsight_vllm.trace.source import user_line

if TYPE_CHECKING:
    from typing import Self

    from nnsight_vllm.trace.edit_block import EditBlock


class Editable(Envoy):
    """The root of a module tree, with the edits that its requests run with."""

    def edit(self, name: str | None = None, *, inplace: bool = False) -> EditBlock[Self]:
        """Record an edit in a `with` block, without a prompt. `as` binds an edited model; this one stays as it is.

        It applies in every iteration of every request of the edited model, before what the request does itself at
        each site, and after the edits that this model has already. With a `name` any request may ask for it:
        `model.trace(prompt, edits=["calm"])`. With `inplace` this model itself is edited, until `clear_edits()`.
        """
        from nnsight_vllm.trace.edit_block import EditBlock

        if name is not None and (not isinstance(name, str) or not name):
            raise RefusedError(f"an edit's name is a text, got {name!r:.80}; {user_line()}")
        if inplace:
            self._standing.require()
            return EditBlock(self._tree, name, self, self._standing.add)
        standing = self._standing.with_unrecorded(user_line())
        return EditBlock(self._tree, name, self._running_with(standing), standing.add)

    def clear_edits(self) -> None:
        """Run without edits from now on. Named ones can still be asked for; `del model.edits[name]` takes those away."""
        self._standing.clear()

    @property
    def edits(self) -> NamedEdits:
        """The named edits: a mapping of their names."""
        return self._standing.named

    @property
    def iter(self) -> IterationIndexer:
        """`with edited.iter[...]`: what follows in an edit applies in these iterations only."""
        return IterationIndexer()

    @property
    def _standing(self) -> Standing:
        standing: Standing = self.__dict__.setdefault("_edits", Standing(NamedEdits()))
        return standing

    def _running_with(self, standing: Standing) -> Self:
        """The same model, on the same engine, whose requests run with other edits."""
        made = object.__new__(type(self))
        made.__dict__.update({**self.__dict__, "_edits": standing})
        return made
