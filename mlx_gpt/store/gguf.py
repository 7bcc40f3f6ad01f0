"""GGUF, the files of llama.cpp: the tensors under its names, the settings and the tokenizer as metadata.

The names are those of llama.cpp's ``gguf-py/gguf/constants.py``, the metadata what its ``convert_hf_to_gguf.py`` writes
of a GPT-2. Matrices are (out, in); GGUF counts a shape from the last axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights
from mlx_gpt.text.tokenizer import Tokenizer, merges_of
from mlx_gpt.text.vocab_files import write_name

NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
IN_BLOCK = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
IN_BLOCK |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
# What llama.cpp computes of every GPT-2, whatever the file.
FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def write_gguf(file: Path, config: GPTConfig, weights: Weights, tokenizer: Tokenizer, dtype: mx.Dtype) -> None:
    """Write our parameters as llama.cpp reads them: matrices in float32 or float16, all else in float32."""
    tensors = {}
    for name, weight in weights.items():
        is_small = weight.ndim == 1 or name == "wpe.weight"
        tensors[gguf_name(name)] = mx.contiguous(weight.astype(mx.float32 if is_small else dtype))
    mx.save_gguf(str(file), tensors, {**settings_of(config, dtype), **vocabulary_of(tokenizer, config.vocab_size)})


def gguf_name(name: str) -> str:
    """``h.3.attn.c_attn.weight`` -> ``blk.3.attn_qkv.weight``."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{IN_BLOCK[part]}.{kind}"


def settings_of(config: GPTConfig, dtype: mx.Dtype) -> dict[str, Any]:
    numbers = {
        "general.file_type": 0 if dtype == mx.float32 else 1,
        "gpt2.block_count": config.n_layer,
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.inner_dim,
        "gpt2.attention.head_count": config.n_head,
    }
    return {
        "general.architecture": "gpt2",
        "general.name": "gpt2",
        "gpt2.attention.layer_norm_epsilon": mx.array(config.layer_norm_epsilon, mx.float32),
        **{name: mx.array(value, mx.uint32) for name, value in numbers.items()},
    }


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A token for each id of the model: those that the tokenizer lacks are there, and never used."""
    merges = [f"{write_name(left)} {write_name(right)}" for left, right in merges_of(tokenizer.ranks)]
    if not merges:  # MLX cannot write an empty list, and llama.cpp wants one
        raise ModelFolderError(
            "a GGUF needs a tokenizer with merges, this one has bytes only; it cannot be exported so"
        )
    names = {i: write_name(token) for token, i in tokenizer.ranks.items()}
    names |= {i: text for text, i in tokenizer.specials.items()}
    kinds = dict.fromkeys(tokenizer.ranks.values(), NORMAL) | dict.fromkeys(tokenizer.specials.values(), CONTROL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": mx.array([kinds.get(i, UNUSED) for i in range(vocab_size)], mx.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": mx.array(tokenizer.eot_id, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(tokenizer.eot_id, mx.uint32),
        "tokenizer.ggml.add_bos_token": mx.array(False),
    }
