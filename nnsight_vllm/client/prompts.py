"""From what users pass as a prompt to what the engine takes: token ids, counted before anything is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnsight_vllm.errors import AdmissionError
from nnsight_vllm.trace.backend import Prompt
from nnsight_vllm.trace.source import user_line


def make_prompt(inputs: tuple[object, ...], tokenizer: Any, vocab_size: int) -> Prompt:
    """The prompt behind one call: text, token ids, tokenizer output, or a vLLM prompt dict. Raises `AdmissionError`."""
    if len(inputs) != 1:
        raise AdmissionError(f"an invoke takes one prompt, got {len(inputs)}; open one invoke for each; {user_line()}")
    text, ids, rest = _split(inputs[0], tokenizer)
    if not ids:
        raise AdmissionError(f"the prompt is empty: it has no tokens; {user_line()}")
    for id in ids:
        if not 0 <= id < vocab_size:
            raise AdmissionError(f"token id {id} isn't in the vocabulary (0 to {vocab_size - 1}); {user_line()}")
    engine: dict[str, object] = {**rest, "prompt_token_ids": ids}
    if text is not None:
        engine["prompt"] = text
    return Prompt(len(ids), text, engine)


def _split(prompt: object, tokenizer: Any) -> tuple[str | None, list[int], dict[str, object]]:
    if isinstance(prompt, str):
        return prompt, _ids(tokenizer.encode(prompt)), {}
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt, tokenizer)
    return None, _ids(prompt), {}


def _from_mapping(prompt: Mapping[str, object], tokenizer: Any) -> tuple[str | None, list[int], dict[str, object]]:
    if "input_ids" in prompt:
        return None, _unpadded(_ids(prompt["input_ids"]), prompt.get("attention_mask")), {}
    rest = {key: value for key, value in prompt.items() if key not in {"prompt", "prompt_token_ids"}}
    unknown = set(rest) - {"cache_salt"}
    if unknown:
        raise AdmissionError(
            f"prompt field {sorted(unknown)[0]!r} can't go with a graph: text and token ids only; {user_line()}"
        )
    text = prompt.get("prompt")
    if "prompt_token_ids" in prompt:
        return str(text) if text is not None else None, _ids(prompt["prompt_token_ids"]), rest
    if isinstance(text, str):
        return text, _ids(tokenizer.encode(text)), rest
    raise AdmissionError(f"a prompt dict has 'prompt' or 'prompt_token_ids'; got {sorted(prompt)}; {user_line()}")


def _unpadded(ids: list[int], mask: object) -> list[int]:
    """The tokens that a tokenizer's attention mask keeps."""
    if mask is None:
        return ids
    kept = _ids(mask)
    if len(kept) != len(ids):
        raise AdmissionError(f"attention_mask has {len(kept)} entries for {len(ids)} tokens; {user_line()}")
    return [id for id, is_kept in zip(ids, kept, strict=True) if is_kept]


def _ids(value: object) -> list[int]:
    """Token ids from a list, a tensor or an array, with at most one leading batch dimension of one."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bytes | bytearray):
        raise AdmissionError(f"a prompt is text, not bytes; {user_line()}")
    if (
        isinstance(plain, Sequence)
        and not isinstance(plain, str)
        and len(plain) == 1
        and isinstance(plain[0], list | tuple)
    ):
        plain = plain[0]
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        if all(isinstance(id, int) and not isinstance(id, bool) for id in plain):
            return [int(id) for id in plain]
        if any(isinstance(id, str | list | tuple) for id in plain):
            raise AdmissionError(
                f"an invoke is one request, got several prompts; open one invoke for each; {user_line()}"
            )
    raise AdmissionError(
        f"a prompt is text, token ids, tokenizer output or a prompt dict, got {type(value).__name__}; {user_line()}"
    )
