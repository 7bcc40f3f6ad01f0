"""Every shape that the docstrings of the model state, in a forward pass of a whole text and of one token at a time."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.model import attention, ops
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.mlp import MLP

B, H, D, L, V, P = 3, 2, 8, 2, 41, 32
C = H * D
CONFIG = GPTConfig(vocab_size=V, n_positions=P, n_embd=C, n_layer=L, n_head=H)
Shapes = list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape of the input, shape of the output


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """The shapes of inputs and outputs of modules and attention, in the order of the calls."""
    seen: Shapes = []

    def record(cls: type, name: str) -> None:
        call = cls.__call__

        def recorded(self: nn.Module, x: mx.array, *rest: object) -> mx.array:
            y = call(self, x, *rest)
            seen.append((name, x.shape, y.shape))
            return y

        monkeypatch.setattr(cls, "__call__", recorded)

    for cls in (Block, MultiHeadAttention, MLP, ops.LayerNorm):
        record(cls, cls.__name__)
    fused = ops.attention

    def recorded_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str) -> mx.array:
        y = fused(q, k, v, scale, mask)
        assert k.shape == v.shape
        seen.extend([("q", q.shape, y.shape), ("k", k.shape, v.shape)])
        return y

    monkeypatch.setattr(ops, "attention", recorded_attention)
    return seen


@pytest.mark.parametrize(
    ("T", "past"), [(5, 0), (1, 0), (5, 4), (1, 4)], ids=["text", "one token", "text after a cache", "decoding"]
)
def test_every_stated_shape_is_the_shape(T: int, past: int, shapes: Shapes) -> None:
    model = GPT(CONFIG)
    cache = model.make_cache()
    model(mx.zeros((B, past or 1), mx.int32), cache if past else None)
    shapes.clear()
    tokens = mx.zeros((B, T), mx.int32)
    assert model.embed(tokens, cache if past else None).shape == (B, T, C)
    hidden = model.hidden(tokens, cache if past else None)
    assert hidden.shape == (B, T, C)
    assert model.logits(hidden).shape == (B, T, V)
    stream = (B, C) if past and T == 1 else (B, T, C)  # as Block and MultiHeadAttention state
    S = past + T
    layer = [
        ("LayerNorm", stream, stream),
        ("q", (B, H, T, D), (B, H, T, D)),
        ("k", (B, H, S, D), (B, H, S, D)),
        ("MultiHeadAttention", stream, stream),
        ("LayerNorm", stream, stream),
        ("MLP", stream, stream),
        ("Block", stream, stream),
    ]
    assert shapes == layer * L + [("LayerNorm", stream, stream)]


def test_the_cache_has_the_stated_shapes() -> None:
    model = GPT(CONFIG)
    (layer, *_) = cache = model.make_cache()
    model(mx.zeros((B, 5), mx.int32), cache)
    assert [part.shape[:2] + part.shape[3:] for part in (*layer.keys, *layer.values)] == [(B, H, D)] * 2
    layer.padding = mx.array([0, 1, 2])
    assert layer.positions(2).shape == (B, 2)
    mask = layer.make_mask(2)
    assert isinstance(mask, mx.array)
    assert mask.shape == (B, 1, 2, 7)


@pytest.mark.parametrize("T", [1, 5])
def test_the_explicit_functions_have_the_stated_shapes(T: int) -> None:
    S = 6
    q, k, v = mx.zeros((B, H, T, D)), mx.zeros((B, H, S, D)), mx.zeros((B, H, S, D))
    scores = attention.attention_scores(q, k, 1.0)
    mask = attention.causal_mask(T, S)
    pattern = attention.attention_pattern(scores, mask)
    assert (scores.shape, mask.shape, pattern.shape) == ((B, H, T, S), (T, S), (B, H, T, S))
    assert attention.weighted_values(pattern, v).shape == attention.attend(q, k, v, 1.0).shape == (B, H, T, D)
    x = mx.zeros((B, T, C))
    assert attention.merge_heads(attention.split_heads(x, H)).shape == x.shape
    assert attention.split_heads(mx.zeros((B, C)), H).shape == (B, H, 1, D)
    head = GPT(CONFIG).h[0].attn.head(1)
    assert head(x).shape == (B, T, C)


def test_no_file_infers_decoding_from_the_number_of_axes() -> None:
    package = Path(attention.__file__).parents[1]
    files = [file for folder in ("model", "generate", "linux_cpu") for file in (package / folder).glob("*.py")]
    assert len(files) > 10
    assert not [file.name for file in files if "ndim ==" in file.read_text(encoding="utf-8")]
