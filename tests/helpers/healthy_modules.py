"""Healthy MLX modules: this package's, other designs, and those of mlx-lm."""

from __future__ import annotations

import importlib
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_gpt import GPT, GPTConfig

from .design_gpt import Design, DesignGPT
from .plain_gpt import PlainConfig, PlainGPT
from .planted import Base, Given

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
}
NEOX = {**LLAMA, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25}
GPT2 = {"n_ctx": 48, "n_positions": 48, "n_embd": 32, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5}


def briefly_trained(model: nn.Module, steps: int = 30, V: int = 52) -> nn.Module:
    """Train an MLX model on the characters of stories."""
    value_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    optimizer = optim.AdamW(3e-3, bias_correction=True)
    for x, y in islice(Base(1).windows(), steps):
        T = model.config.n_positions
        _, grads = value_and_grad(mx.array(x[:, :T] % V), mx.array(y[:, :T] % V))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return model.eval()


def ours(dtype: Any = None, bits: int = 0, steps: int = 0, **sizes: Any) -> Given:
    """This package's GPT."""
    mx.random.seed(0)
    shape = {"vocab_size": 52, "n_positions": 48, "n_embd": 64, "n_layer": 2, "n_head": 2, **sizes}
    model = GPT(GPTConfig(**shape)).eval()
    model = briefly_trained(model, steps, shape["vocab_size"]) if steps else model
    return {"forward": in_dtype(model, dtype, bits)}


def in_dtype(model: nn.Module, dtype: Any = None, bits: int = 0) -> nn.Module:
    if dtype:
        model.set_dtype(dtype)
    if bits:
        fits = lambda _, part: isinstance(part, nn.Linear) and part.weight.shape[1] % 32 == 0  # noqa: E731
        nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    return model


def design(steps: int = 0, dtype: Any = None, bits: int = 0, **fields: Any) -> Given:
    model = DesignGPT(Design(**fields))
    return {"forward": in_dtype(briefly_trained(model, steps) if steps else model, dtype, bits)}


def plain(dtype: Any = None, bits: int = 0, **fields: Any) -> Given:
    return {"forward": in_dtype(PlainGPT(PlainConfig(**fields)), dtype, bits)}


def of_mlx_lm(kind: str, **fields: Any) -> Given:
    its = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    args = its.ModelArgs.from_dict({"model_type": kind, "vocab_size": 61, **fields})
    model = its.Model(args)  # with MLX's initial weights, too large for an embedding that is both scaled and tied
    model.apply(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p)
    return {"forward": model, "vocab_size": 61, "n_positions": 48}


MODULES = {
    "this package's, untrained": ours,
    "this package's, half-trained": partial(ours, steps=20),
    "this package's, trained": partial(ours, steps=120),
    "this package's, bfloat16": partial(ours, dtype=mx.bfloat16, n_embd=32),
    "this package's, bfloat16, trained": partial(ours, dtype=mx.bfloat16, steps=40),
    "this package's, float16": partial(ours, dtype=mx.float16),
    "this package's, 8 bits": partial(ours, bits=8),
    "this package's, 4 bits, trained": partial(ours, bits=4, steps=40),
    "this package's, six layers": partial(ours, n_layer=6, n_head=8),
    "this package's, one head": partial(ours, n_layer=1, n_head=1),
    "this package's, two tokens": partial(ours, vocab_size=2),
    "this package's, GPT-2's vocabulary": partial(ours, vocab_size=50257, n_embd=32),
    "this package's, context of 5": partial(ours, n_positions=5),
    "this package's, context of 1024": partial(ours, n_positions=1024, n_embd=32),
    "plain": plain,
    "plain, dropout": partial(plain, dropout=0.3),
    "plain, rotary, RMSNorm, bfloat16": partial(plain, rope=True, rms=True, dtype=mx.bfloat16),
    "plain, not tied, 4 bits": partial(plain, tied=False, width=64, bits=4),
    "plain, context of 2": partial(plain, n_positions=2),
    "plain, three tokens, context of 300": partial(plain, vocab_size=3, n_positions=300),
    "Llama's design": partial(design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bias=False, tied=False),
    "Llama's design, trained": partial(
        design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bias=False, kv_heads=2, steps=60
    ),
    "Llama's design, 4 bits": partial(design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bits=4, width=64),
    "ALiBi": partial(design, positions="alibi"),
    "ALiBi, trained": partial(design, positions="alibi", steps=60),
    "ALiBi, one layer": partial(design, positions="alibi", layers=1),
    "relative bias": partial(design, positions="bias"),
    "relative bias, trained": partial(design, positions="bias", steps=60),
    "sinusoidal": partial(design, positions="sinusoidal"),
    "post-norm": partial(design, post_norm=True),
    "post-norm, trained": partial(design, post_norm=True, steps=60),
    "post-norm, RMSNorm, rotary": partial(design, post_norm=True, positions="rope", norm=nn.RMSNorm),
    "multi-query": partial(design, kv_heads=1),
    "multi-query, rotary, bfloat16": partial(design, kv_heads=1, positions="rope", dtype=mx.bfloat16),
    "parallel blocks": partial(design, parallel=True, positions="rope"),
    "one block, three times": partial(design, shared=True, layers=3),
    "query-key norm, soft cap": partial(design, qk_norm=True, cap=30.0, positions="rope", steps=30),
    "scaled embedding": partial(design, scaled_embedding=True, norm=nn.RMSNorm, positions="rope"),
    "large initial weights": partial(design, std=0.3, tied=False),
    "squared ReLU, no biases": partial(design, mlp="relu2", bias=False),
    "mlx-lm: GPT-2": partial(of_mlx_lm, "gpt2", **GPT2),
    "mlx-lm: Llama": partial(of_mlx_lm, "llama", **LLAMA),
    "mlx-lm: GPT-NeoX": partial(of_mlx_lm, "gpt_neox", **NEOX),
    "mlx-lm: Qwen 2": partial(of_mlx_lm, "qwen2", **LLAMA),
    "mlx-lm: Gemma": partial(of_mlx_lm, "gemma", **LLAMA, head_dim=8),
}
