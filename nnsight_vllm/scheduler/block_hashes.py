"""Salts of prompts whose first rows are plain: vLLM's own salt is for all blocks of a prompt, ours begins with a block.

A block's hash is made of the hash of the block before it and of its own tokens. For the first block that has a changed row the
former is mixed with the salt, so that this block and all after it are their owners' alone, while those before are plain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from nnsight_vllm.scheduler.extras import extras_of

Hasher = Callable[[Any], list[bytes]]
"""Hashes of a request's full blocks that aren't in its `block_hashes` yet; it goes on from the last one there."""


def salt_from(request: Any, block_size: int) -> None:
    """Have a request of vLLM's scheduler salt its blocks from the row on that its sampling parameters name."""
    wanted = _salt_of(request)
    if wanted is None or request._block_hasher is None:
        return
    salt, row = wanted
    if row < block_size:
        request.cache_salt = salt
    else:
        request._block_hasher = hasher_from(request._block_hasher, salt, row // block_size)
    request.block_hashes.clear()
    request.update_block_hashes()


def set_apart(request: Any) -> None:
    """The worker fails an evicted request and computes its rows without its edits: nobody may take them for edited ones."""
    if request.cache_salt is None and _salt_of(request) is None:
        return
    own = request.cache_salt or ""
    if not own.endswith(request.request_id):
        request.cache_salt = f"{own}:{request.request_id}"
        request.block_hashes.clear()
        request.update_block_hashes()


def _salt_of(request: Any) -> tuple[str, int] | None:
    extras = extras_of(request)
    return None if extras is None else extras.salt


def hasher_from(hasher: Hasher, salt: str, num_plain: int) -> Hasher:
    """A hasher whose first `num_plain` blocks (at least one) are those of `hasher`, the others salted."""

    def salted(request: Any) -> list[bytes]:
        hashes = request.block_hashes
        num_known = len(hashes)
        if num_known > num_plain:
            return hasher(request)
        made = hasher(request)[: num_plain - num_known]
        if num_known + len(made) < num_plain:
            return made
        parent = made[-1] if made else hashes[-1]
        hashes += made
        hashes[-1] = hashlib.sha256(parent + salt.encode()).digest()
        try:
            rest = hasher(request)
        finally:
            hashes[-1] = parent
            del hashes[num_known:]
        return made + rest

    return salted
