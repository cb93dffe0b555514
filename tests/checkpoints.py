"""Tiny random checkpoints, one per architecture, that transformers and vLLM both load. No network.

All are float32 with four layers, hidden size 128, four heads of 32 (a size that vLLM's CPU attention has) and 500 tokens, which vLLM pads to
512. Every weight is drawn from a fixed seed, norms and biases too, so that a wrong norm or a forgotten bias shows.
"""

from __future__ import annotations

import os
import tempfile
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 500
HIDDEN = 128
LAYERS = 4
POSITIONS = 512
WEIGHT_SCALE = 0.15  # large enough that the next-token distribution isn't flat
VECTOR_NOISE = 0.2  # added to norms and biases

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # in the order of their ids
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
_GEMMA2: dict[str, Any] = {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 10.0}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": 256,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_QWEN3_MOE: dict[str, Any] = {
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "mistral": _BASE | {"head_dim": 32, "sliding_window": None},
    "qwen2": _BASE,
    "qwen3": _BASE | {"head_dim": 32},
    "gemma2": _BASE | _GEMMA | _GEMMA2,
    "gemma3_text": _BASE | _GEMMA,
    "gpt2": _GPT2,
    "opt": _OPT,
    "phi3": _BASE | {"original_max_position_embeddings": POSITIONS},
    "olmo2": _BASE,
    "mixtral": _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _BASE | _QWEN3_MOE,
    "granite": _BASE | _GRANITE,
}


def tiny(arch: str, root: Path) -> str:
    """The path of the checkpoint of `arch` below `root`, made if it isn't there."""
    target = root / arch
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            built = Path(work) / arch
            _random_model(arch).save_pretrained(built)
            tokenizer().save_pretrained(built)
            os.replace(built, target)
    return str(target)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: three special tokens, the 256 bytes, then pairs of frequent letters up to `VOCAB`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCAB - len(_SPECIAL) - len(alphabet)
    letters = "etaoinshrdlucmfw"
    merges = list(islice(product(letters, letters), room))
    pieces = [*_SPECIAL.values(), *alphabet, *(first + second for first, second in merges)]
    fast = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<pad>", **_SPECIAL)


def _random_model(arch: str) -> Any:
    config = AutoConfig.for_model(arch, **CONFIGS[arch], **_IDS)
    model = AutoModelForCausalLM.from_config(config).float()
    draw = torch.Generator().manual_seed(sorted(CONFIGS).index(arch))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(weight + noise * VECTOR_NOISE if weight.ndim == 1 else noise * WEIGHT_SCALE)
        if arch.startswith("gemma"):
            _let_blocks_outweigh_embedding(model)
    return model


def _let_blocks_outweigh_embedding(model: Any) -> None:
    """Gemma scales its embedding up and ties it to the head: left alone, a random one only repeats its last token."""
    model.get_input_embeddings().weight.mul_(0.2)
    model.model.norm.weight.add_(3.0)
