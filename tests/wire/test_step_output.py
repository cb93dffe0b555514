"""Messages on their way to the scheduler: each arrives at its request's place in the batch."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from nnsight_vllm.wire.step_output import Messages


def test_each_message_arrives_at_its_place() -> None:
    one = torch.tensor([9], dtype=torch.uint8)
    lines = torch.arange(6, dtype=torch.uint8).reshape(3, 2)
    sent = Messages({"c": one}, {"c"}, [(np.array([4, 0, 3]), lines)])
    packed = pickle.loads(pickle.dumps(sent.packed({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4})))
    found = packed.unpacked(6)
    assert packed.last == {"c"}
    assert [None if message is None else message.tolist() for message in found] == [
        [2, 3],
        None,
        [9],
        [4, 5],
        [0, 1],
        None,
    ]


def test_nothing_to_send_is_false() -> None:
    assert not Messages()
    assert Messages({"a": torch.zeros(1, dtype=torch.uint8)})
