"""Write GGUF, llama.cpp's format: the tensors under its names, the architecture and the tokenizer as metadata.

Names are those of llama.cpp's ``gguf-py/gguf/constants.py``; the metadata is what its ``convert_hf_to_gguf.py`` writes
for a GPT-2. Matrices are (out, in); GGUF lists a shape from the last axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.folder import tokenizer_of
from mlx_gpt.store.gguf import BLOCK_NAMES, CONTROL, END_KEYS, NAMES, NORMAL, UNUSED, USER_DEFINED
from mlx_gpt.store.source import ModelSource
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer, merges_of
from mlx_gpt.text.vocab_files import write_name


def write_gguf(file: Path, source: ModelSource, dtype: mx.Dtype) -> None:
    """Write a model as llama.cpp reads it: matrices in float32 or float16, all other tensors in float32."""
    config, tensors = source.config, {}
    metadata = architecture(config, dtype) | vocabulary(tokenizer_of(source), config.vocab_size)
    for name, weight in source.parameters(None).items():
        is_small = weight.ndim == 1 or name == "wpe.weight"
        tensors[gguf_name(name)] = mx.contiguous(weight.astype(mx.float32 if is_small else dtype))
    named = file.with_name(f"{file.name}.gguf")  # or MLX would append the suffix
    mx.save_gguf(str(named), tensors, metadata)
    named.rename(file)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter: ``h.3.attn.c_attn.weight`` -> ``blk.3.attn_qkv.weight``."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[part]}.{kind}"


def architecture(config: GPTConfig, dtype: mx.Dtype) -> dict[str, Any]:
    """Return the metadata that describes the model."""
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


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata of the tokenizer, with an unused token for each id of the model that it lacks."""
    is_characters = isinstance(tokenizer, CharacterTokenizer)
    pairs = [] if is_characters else merges_of(tokenizer.ranks)
    merges = [f"{write_name(left)} {write_name(right)}" for left, right in pairs]
    if not merges:  # MLX cannot write an empty list, and llama.cpp requires one
        raise ModelFolderError(
            f"a GGUF needs a tokenizer with merges, this one has {'characters' if is_characters else 'bytes'} only: it "
            f"cannot be exported; export it --to nanogpt, or train with --tokenizer bpe:N"
        )
    names = {i: write_name(token) for token, i in tokenizer.ranks.items()}
    names |= {i: text for text, i in tokenizer.specials.items()}
    types = dict.fromkeys(tokenizer.ranks.values(), NORMAL) | dict.fromkeys(tokenizer.specials.values(), CONTROL)
    settings = tokenizer.settings
    types |= {token.id: CONTROL if token.special else USER_DEFINED for token in settings.added}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": mx.array([types.get(i, UNUSED) for i in range(vocab_size)], mx.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": mx.array(tokenizer.start_id, mx.uint32),
        **{key: mx.array(i, mx.uint32) for key, i in zip(END_KEYS, tokenizer.end_ids, strict=False)},
        "tokenizer.ggml.add_bos_token": mx.array(bool(settings.prefix)),
        **({"tokenizer.ggml.add_space_prefix": mx.array(True)} if settings.add_prefix_space else {}),
    }
