"""What every front end asks of a request before it goes anywhere: a prompt that the model has room for, arguments by vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnsight_vllm.client.prompts import make_prompt
from nnsight_vllm.errors import AdmissionError
from nnsight_vllm.graph.catalogue import Catalogue
from nnsight_vllm.trace.backend import Prompt
from nnsight_vllm.trace.source import user_line

_RENAMED = {"max_new_tokens": "max_tokens"}


def admitted_prompt(inputs: tuple[object, ...], tokenizer: Any, catalogue: Catalogue) -> Prompt:
    """The prompt behind the arguments of `trace` or `invoke`. Raises `AdmissionError`."""
    prompt = make_prompt(inputs, tokenizer, catalogue.vocab_size)
    if prompt.rows >= catalogue.max_model_len:
        raise AdmissionError(
            f"the prompt has {prompt.rows} tokens; max_model_len is {catalogue.max_model_len}, prompt and answer "
            f"together; {user_line()}"
        )
    return prompt


def sampling_arguments(arguments: Mapping[str, object]) -> dict[str, Any]:
    """By the names that vLLM has for them."""
    return {_RENAMED.get(name, name): value for name, value in arguments.items()}
