"""The whole model: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path, tree_reduce

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.block import Block
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.dropout import Dropout
from mlx_gpt.model.ops import LayerNorm


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Parameter names are the hub's: ``wte wpe h.0.ln_1 ... ln_f``.

    The initial weights are drawn from MLX's global random state (``mx.random.seed``).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = [Block(config, layer) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.update(initial_weights(self.parameters(), config))

    def __call__(self, tokens: Any, cache: list[KVCache] | None = None) -> mx.array:
        """Return the logits of the token after each token: ids (B, T) -> (B, T, V).

        With a ``cache`` from ``make_cache`` the tokens follow those it holds. Raises ``ValueError`` for a sequence
        longer than ``n_positions`` and for Python or NumPy ids outside the vocabulary. The values of an
        ``mx.array`` are not checked, since that would wait for the GPU.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Any, cache: list[KVCache] | None = None) -> mx.array:
        """Return the residual stream after the final norm: ids (B, T) -> (B, T, C)."""
        x = self.embed(tokens, cache)
        B, T, C = x.shape
        if cache and T == 1:
            x = x.reshape(B, C)  # MLX would otherwise reshape before and after each product
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i])
        return self.ln_f(x).reshape(B, T, C)

    def embed(self, tokens: Any, cache: list[KVCache] | None = None) -> mx.array:
        """Return the input of the first block: ids (B, T) -> (B, T, C)."""
        tokens = as_ids(tokens, self.config.vocab_size)
        positions = self._positions(tokens.shape[1], cache)
        return self.drop(self.wte(tokens) + self.wpe(positions))

    def logits(self, x: mx.array) -> mx.array:
        """Apply the head, a dot product with every token's embedding: (B, T, C) -> (B, T, V)."""
        return self.wte.as_linear(x) if self.config.tie_word_embeddings else self.lm_head(x)

    @property
    def head_weight(self) -> mx.array:
        """The weight of the head: (V, C)."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def make_cache(self) -> list[KVCache]:
        """Return an empty cache for each layer."""
        return [KVCache(self.config.n_positions) for _ in self.h]

    @property
    def n_parameters(self) -> int:
        """Number of weights; the tied head counts once."""
        return tree_reduce(lambda total, weight: total + weight.size, self.parameters(), 0)

    def _positions(self, T: int, cache: list[KVCache] | None) -> mx.array:
        if cache and not cache[0].is_plain:
            return cache[0].positions(T)
        end = T + int(cache[0].offset) if cache else T
        if end > self.config.n_positions:
            raise ValueError(
                f"the model has {self.config.n_positions} positions, but the sequence is {end} tokens long; "
                f"shorten it or train with a larger n_positions"
            )
        return mx.arange(end - T, end)


def initial_weights(parameters: dict, config: GPTConfig) -> dict:
    """Return GPT-2's initial weights: matrices N(0, ``initializer_range``), biases 0, norms 1.

    The two projections into the residual stream are scaled by 1/sqrt(2 n_layer), which keeps its variance from growing
    with depth (Radford et al. 2019, section 2.3).
    """

    def draw(path: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return mx.ones_like(weight) if path.endswith("weight") else mx.zeros_like(weight)
        std = config.initializer_range
        if path.endswith("c_proj.weight"):
            std /= sqrt(2 * config.n_layer)
        return mx.random.normal(weight.shape, scale=std)

    return tree_map_with_path(draw, parameters)


def as_ids(tokens: Any, vocab_size: int) -> mx.array:
    """Return token ids (B, T) as an int32 array, or raise ``ValueError``.

    MLX does not check indices: an id outside the vocabulary would read other memory. Python and NumPy values are
    checked, of an ``mx.array`` only shape and type.
    """
    if not isinstance(tokens, mx.array):
        tokens = checked_ids(tokens, vocab_size)
    if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"expected integer token ids of shape (B, T), got {tokens.dtype} of shape {tokens.shape}")
    return tokens


def checked_ids(tokens: Sequence[Any] | np.ndarray, vocab_size: int) -> mx.array:
    """Return Python or NumPy ids as an int32 ``mx.array``; ``ValueError`` for an id outside [0, V)."""
    try:
        ids = np.asarray(tokens)
    except ValueError:
        raise ValueError("expected token ids of shape (B, T), got rows of different lengths") from None
    if ids.size == 0:
        raise ValueError("the text is empty; give at least one token")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expected integer token ids of shape (B, T), got {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ValueError(f"token ids must be between 0 and {vocab_size - 1} (the vocabulary), got {wrong}")
    return mx.array(ids.astype(np.int32))
