"""An intervention of a request's body as a graph for one prompt's length. Nothing after this knows the short form.

The short form is recorded as a user's block would be, so shapes and order are checked where they can be told, and what the
kernels' table knows is written the way the table knows it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch

from nnsight_vllm import edits
from nnsight_vllm.errors import NNsightError
from nnsight_vllm.graph.catalogue import SiteInfo
from nnsight_vllm.graph.check import check
from nnsight_vllm.graph.nodes import Save
from nnsight_vllm.graph.walk import constants_of
from nnsight_vllm.kernels.table import DTYPES
from nnsight_vllm.server.errors import Refused
from nnsight_vllm.server.full import Lowered, SaveForm, lower_full, refused_at, require_size
from nnsight_vllm.server.positions import (
    ActionBlock,
    RowIndex,
    SelectedPositions,
    SelectedRows,
    action_blocks,
    choose,
    refuse_many,
)
from nnsight_vllm.server.schema import (
    Ablate,
    Add,
    Clamp,
    EditSpec,
    Intervention,
    LowRank,
    NormAdd,
    ProjectOut,
    SaeClamp,
    SaveSpec,
    Scale,
    Set,
)
from nnsight_vllm.server.sitenames import find_site
from nnsight_vllm.server.tensor_bytes import header_of
from nnsight_vllm.server.tensor_refs import TensorOf, TensorRefs
from nnsight_vllm.trace.encode import Constants
from nnsight_vllm.trace.iterations import IterationBlock
from nnsight_vllm.trace.places import SINGLE_ROW
from nnsight_vllm.trace.recorder import Recorder, current
from nnsight_vllm.trace.recording import push
from nnsight_vllm.trace.source import hide_lines
from nnsight_vllm.trace.tree import Tree

MAX_NODES = 100_000


def lower(
    intervention: Intervention,
    tree: Tree,
    rows: int,
    max_tokens: int | None,
    tensor_of: TensorOf,
    max_nodes: int = MAX_NODES,
) -> Lowered:
    """The graph for a prompt of `rows` tokens, with at most `max_nodes`. Raises `Refused` with the place in the body."""
    refs = TensorRefs(intervention.tensors, tensor_of)
    if intervention.graph is not None:
        return lower_full(intervention, tree, refs, max_nodes)
    recording = _Recording(intervention, tree, rows, max_tokens, refs, max_nodes)
    return copy_context().run(recording.run)  # nothing of it is left in the caller's context


class _Constants(Constants):
    """Tensors that are safetensors bytes already; the recorder sees their shapes only."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[int, tuple[str, torch.Tensor]] = {}  # by the stand-in's id, which is its own while it's kept

    def named(self, name: str, data: bytes) -> torch.Tensor:
        """A stand-in for the tensor in these bytes."""
        header = header_of(data)
        dtype = _BY_NAME.get(header["dtype"])
        if dtype is None:
            raise ValueError(f"expected a tensor of float32, float16 or bfloat16; got {header['dtype']}")
        stand_in = torch.empty(header["shape"], dtype=dtype, device="meta")
        self._named[id(stand_in)] = name, stand_in
        return stand_in

    def add(self, tensor: torch.Tensor) -> str:
        return self._named[id(tensor)][0]


_BY_NAME = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class _Action:
    """An edit or a save, and where it is in the body."""

    spec: Any
    param: str
    site: SiteInfo
    chosen: SelectedPositions
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    list: Any = None

    @property
    def is_save(self) -> bool:
        return isinstance(self.spec, SaveSpec)


@dataclass
class _Recording:
    """Records one short form. `run` is called once, in a context of its own."""

    intervention: Intervention
    tree: Tree
    rows: int
    max_tokens: int | None
    refs: TensorRefs
    max_nodes: int
    num_parts: int = 0
    constants: _Constants = field(default_factory=_Constants)
    recorder: Recorder = field(init=False)

    def run(self) -> Lowered:
        hide_lines()
        actions = self._actions()
        self.refs.refuse_unused()
        blocks = list(action_blocks([action.chosen for action in actions], self.max_tokens, self.max_nodes))
        self.recorder = Recorder(self.tree, self.constants, self.rows, self.max_tokens)
        push(self.recorder)
        for action in actions:
            if action.is_save and action.chosen.over_iterations:
                action.list = self.recorder.op("py.list", list, (), {})
                self._save(action, action.list)
        for block in blocks:
            self._block(block, actions)
        try:
            graph = self.recorder.graph()
            require_size(graph, self.max_nodes, "intervention")
            check(graph, self.tree.catalogue)
        except NNsightError as error:
            raise refused_at(error, "intervention") from None
        saves = [action for action in actions if action.is_save]
        names = {one.spec.name: SaveForm(one.chosen.over_iterations, one.spec.stream) for one in saves}
        used = constants_of(graph.body)
        return Lowered(graph, {name: data for name, data in self.refs.used.items() if name in used}, names)

    def _actions(self) -> list[_Action]:
        found = [self._action(edit, f"intervention.edits[{i}]") for i, edit in enumerate(self.intervention.edits)]
        known: dict[str, int] = {}
        for i, save in enumerate(self.intervention.save):
            if save.name in known:
                message = f"{save.name!r} is the name of save[{known[save.name]}] already"
                raise Refused(message, f"intervention.save[{i}].name")
            known[save.name] = i
            found.append(self._action(save, f"intervention.save[{i}]"))
        return sorted(found, key=lambda one: (one.site.order, one.site.name, one.is_save))

    def _action(self, spec: EditSpec | SaveSpec, param: str) -> _Action:
        site = find_site(self.tree, spec.site, f"{param}.site")
        positions = f"{param}.positions"
        has_one_row = site.name.startswith(SINGLE_ROW)
        asked: Any = spec.positions
        is_save = isinstance(spec, SaveSpec)
        chosen = choose(asked, self.rows, self.max_tokens, has_one_row, is_save, positions)
        action = _Action(spec, param, site, chosen)
        self.num_parts += len(action.chosen.parts)
        refuse_many(self.num_parts, self.max_nodes)
        if not isinstance(spec, SaveSpec):
            self._check_editable(site, f"{param}.site")
            action.tensors = self._tensors(spec, site.shape[-1], param)
        return action

    @staticmethod
    def _check_editable(site: SiteInfo, param: str) -> None:
        if site.name == "samples.output":
            raise Refused("samples are token ids: the short form's edits don't apply; a graph may change them", param)
        if site.refuse_write:
            raise Refused(f"it can't be changed: {site.refuse_write}", param, kind="RefusedError")
        if getattr(torch, site.dtype) not in DTYPES:
            raise Refused(f"it holds {site.dtype}, and edits need a floating-point site", param)

    def _tensors(self, edit: EditSpec, width: int | None, param: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name in _VECTORS & type(edit).model_fields.keys():
            where = f"{param}.{name}"
            key, data = self.refs.find(getattr(edit, name), where)
            try:
                found[name] = self.constants.named(key, data)
            except ValueError as error:
                raise Refused(str(error), where) from None
            if name not in ("down", "up"):
                _check_shape(found[name], [width], where)
        if isinstance(edit, LowRank):
            rank = found["down"].shape[0] if found["down"].ndim == 2 else "rank"
            _check_shape(found["down"], [rank, width], f"{param}.down")
            _check_shape(found["up"], [width, rank], f"{param}.up")
        return found

    def _block(self, block: ActionBlock, actions: Sequence[_Action]) -> None:
        """The prompt's own stands outside of blocks: its rows then are known by their positions, also to the prefix cache."""
        if (block.start, block.stop) == (0, 1):
            self._act_all(block, actions, None)
            return
        with IterationBlock(slice(block.start, block.stop, block.step)) as index:
            self._act_all(block, actions, index)

    def _act_all(self, block: ActionBlock, actions: Sequence[_Action], index: Any) -> None:
        for number, part in block.actions:
            try:
                self._act_in(block, actions[number], part, index)
            except NNsightError as error:
                raise refused_at(error, actions[number].param) from None

    def _act_in(self, block: ActionBlock, action: _Action, part: SelectedRows, index: Any) -> None:
        if part.step == 1:
            self._act(action, part)
        else:
            self._act_sometimes(action, part, index, block.start)

    def _act_sometimes(self, action: _Action, part: SelectedRows, index: Any, start: int) -> None:
        """Where actions of a block differ in their steps."""
        is_due = (index - part.first) % part.step == 0
        if part.first > start:
            is_due = is_due * (index >= part.first)
        handle = self.recorder.flow.begin_cond(is_due)
        self._act(action, part)
        self.recorder.flow.end_cond(handle, [])

    def _act(self, action: _Action, part: SelectedRows) -> None:
        place = self.recorder.places.read(action.site)
        if action.is_save:
            self._collect(action, place, part)
        elif not action.site.refuse_inplace:
            _edit(action, place, part.rows)
        else:
            changed = place.clone()
            _edit(action, changed, part.rows)
            self.recorder.places.write(action.site, changed)

    def _collect(self, action: _Action, place: Any, part: SelectedRows) -> None:
        if action.list is None:
            self._save(action, _picked(place, part.rows))
        elif action.chosen.is_single:
            action.list.append(place[-1])
        else:
            action.list.append(_picked(place, part.rows))

    def _save(self, action: _Action, value: Any) -> None:
        recorder = self.recorder
        recorder.add(Save(recorder.new_id(), action.spec.name, recorder.use(value)))


_VECTORS = frozenset(["tensor", "down", "up", "encoder", "decoder"])


def _picked(place: Any, rows: RowIndex) -> Any:
    return place if rows is None else place[rows]


def _edit(action: _Action, place: Any, rows: RowIndex) -> None:
    """Edit rows of the site, in place."""
    part = _picked(place, rows)
    _apply(action.spec, part, action.tensors)
    if isinstance(rows, list):  # torch gathered them
        place[rows] = part


def _apply(edit: EditSpec, h: Any, tensors: dict[str, torch.Tensor]) -> None:
    match edit:
        case Add():
            h += _product(tensors["tensor"], edit.scale)
        case Scale():
            h *= edit.scale
        case Set():
            h[:] = tensors["tensor"]
        case Ablate():
            h.zero_()
        case ProjectOut():
            edits.project_out(h, tensors["tensor"], edit.scale)
        case Clamp():
            low = -math.inf if edit.low is None else edit.low
            edits.clamp(h, tensors["tensor"], low, math.inf if edit.high is None else edit.high)
        case NormAdd():
            edits.norm_matched_add(h, tensors["tensor"], edit.scale)
        case LowRank():
            edits.low_rank(h, tensors["down"], tensors["up"], edit.scale)
        case SaeClamp():
            edits.sae_clamp(h, tensors["encoder"], tensors["decoder"], edit.value, edit.bias)


def _product(vector: torch.Tensor, scale: float) -> Any:
    """Recorded even where the scale is 1: requests that differ in it alone then share a program."""
    return current("add").op("py.mul", operator.mul, (vector, scale), {})


def _check_shape(tensor: torch.Tensor, expected: list[Any], param: str) -> None:
    if list(tensor.shape) != expected:
        raise Refused(f"expected a tensor of shape {expected}; got {list(tensor.shape)}".replace("'", ""), param)
