import hashlib

import pytest
import torch
from safetensors.torch import save

from nnsight_vllm.errors import GraphError
from nnsight_vllm.worker.batch.tensor_store import Store


def test_a_tensor_is_found_by_the_hash_of_its_bytes_until_it_is_dropped() -> None:
    store, data = Store(torch.device("cpu")), save({"tensor": torch.arange(6.0)})
    key = hashlib.sha256(data).hexdigest()
    store.put([data, data])
    assert store.get(key).tolist() == [0, 1, 2, 3, 4, 5]
    info = store.info()
    assert (info.count, info.bytes, info.received_bytes) == (1, 24, 2 * len(data))
    store.drop([key, "unknown"])
    with pytest.raises(GraphError, match=f"constant {key[:12]} isn't in the engine's store"):
        store.get(key)


@pytest.mark.parametrize("data", [b"", b"nonsense", save({"other": torch.ones(1)})])
def test_bytes_that_hold_no_constant_are_refused(data: bytes) -> None:
    with pytest.raises(GraphError, match="a constant"):
        Store(torch.device("cpu")).put([data])
