"""One head, the heads of a layer and the fused kernel are the same attention, and no query attends to the future."""

from __future__ import annotations

from math import exp, sqrt

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.attention import (
    AttentionHead,
    MultiHeadAttention,
    attend,
    attention_pattern,
    attention_scores,
    causal_mask,
    merge_heads,
    split_heads,
    weighted_values,
)
from mlx_gpt.model.cache import KVCache

B, T, C, H, D = 2, 7, 24, 3, 8
CONFIG = GPTConfig(vocab_size=50, n_positions=16, n_embd=C, n_layer=2, n_head=H)


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(0)


def residual() -> mx.array:
    return mx.random.normal((B, T, C))


def close(a: mx.array, b: mx.array, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and mx.allclose(a, b, rtol=0, atol=atol).item()


# The four steps


def test_each_row_of_the_pattern_sums_to_one() -> None:
    scores = 5 * mx.random.normal((B, H, T, T))
    assert close(attention_pattern(scores, causal_mask(T, T)).sum(axis=-1), mx.ones((B, H, T)), 1e-6)


def test_the_future_has_exactly_zero_weight_and_the_past_has_some() -> None:
    pattern = np.array(attention_pattern(mx.random.normal((T, T)), causal_mask(T, T)))
    assert (pattern[np.triu_indices(T, k=1)] == 0).all()
    assert (pattern[np.tril_indices(T)] > 0).all()


def test_the_first_token_attends_only_to_itself() -> None:
    x = residual()
    head = AttentionHead(C, D)
    assert close(head(x)[:, 0], head.output(head.value(x))[:, 0])


def test_the_causal_mask_of_new_tokens_ends_at_the_lower_right() -> None:
    assert causal_mask(2, 5).tolist() == [
        [True, True, True, True, False],  # the fourth token of five
        [True, True, True, True, True],  # the fifth
    ]
    assert causal_mask(1, 4).all().item()  # a single new token sees everything before it
    assert causal_mask(3, 3).tolist() == np.tri(3, dtype=bool).tolist()


def test_scaled_scores_have_the_spread_of_one_term_at_any_width() -> None:
    for width in (16, 64, 256):
        q, k = mx.random.normal((2, 200, width))
        assert mx.std(attention_scores(q, k, 1 / sqrt(width))).item() == pytest.approx(1, rel=0.1)
        assert mx.std(attention_scores(q, k, 1.0)).item() == pytest.approx(sqrt(width), rel=0.1)


@pytest.mark.parametrize("S", [T, T + 1, 3 * T])
def test_the_four_steps_equal_the_fused_kernel(S: int) -> None:
    q = mx.random.normal((B, H, T, D))
    k, v = mx.random.normal((2, B, H, S, D))
    fused = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert close(attend(q, k, v, 0.3), fused)
    spelled_out = weighted_values(attention_pattern(attention_scores(q, k, 0.3), causal_mask(T, S)), v)
    assert close(spelled_out, fused)


def test_merging_inverts_splitting_heads() -> None:
    x = residual()
    heads = split_heads(x, H)
    assert heads.shape == (B, H, T, D)
    assert mx.array_equal(heads[:, 1], x[..., D : 2 * D])  # a head is a slice of the width
    assert mx.array_equal(merge_heads(heads), x)


# One head


def one_head_by_loops(x: np.ndarray, head: AttentionHead) -> np.ndarray:
    """Return the addition of one head to one sequence (T, C), in float64, token by token, from the definition."""

    def linear(layer: object, vector: np.ndarray) -> np.ndarray:
        return np.array(layer.weight, np.float64) @ vector + np.array(layer.bias, np.float64)  # type: ignore[attr-defined]

    added = []
    for i in range(len(x)):
        query = linear(head.query, x[i])
        weights = [exp(query @ linear(head.key, x[j]) * head.scale) for j in range(i + 1)]
        attended = sum(w / sum(weights) * linear(head.value, x[j]) for j, w in enumerate(weights))
        added.append(np.array(head.output.weight, np.float64) @ attended)
    return np.stack(added)


def test_a_head_equals_loops_over_tokens_in_float64() -> None:
    x = residual()
    head = AttentionHead(C, D)
    for b in range(B):
        expected = one_head_by_loops(np.array(x[b], np.float64), head)
        np.testing.assert_allclose(np.array(head(x)[b]), expected, rtol=0, atol=1e-6)


# The layer


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        GPTConfig(n_embd=C, n_head=H, scale_attn_weights=False),
        GPTConfig(n_embd=C, n_head=H, scale_attn_by_inverse_layer_idx=True),
    ],
    ids=["gpt2", "unscaled", "scaled by layer"],
)
def test_the_sum_of_the_heads_plus_the_output_bias_is_the_layer(config: GPTConfig) -> None:
    layer = MultiHeadAttention(config, layer=1)
    x = residual()
    side_by_side = sum(layer.head(i)(x) for i in range(H)) + layer.c_proj.bias
    assert close(side_by_side, layer(x))


@pytest.mark.parametrize("i", [-1, H, 99])
def test_a_head_outside_the_layer_is_refused(i: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and {H - 1}, not {i}"):
        MultiHeadAttention(CONFIG, layer=0).head(i)


def test_the_scale_is_one_over_the_root_of_the_head_width_and_optionally_of_the_depth() -> None:
    assert MultiHeadAttention(GPTConfig(), layer=5).scale == pytest.approx(1 / 8)  # D = 64
    by_depth = GPTConfig(scale_attn_by_inverse_layer_idx=True)
    assert [MultiHeadAttention(by_depth, layer).scale for layer in (0, 1, 5)] == pytest.approx([1 / 8, 1 / 16, 1 / 48])
    assert MultiHeadAttention(GPTConfig(scale_attn_weights=False), layer=5).scale == 1


def test_scores_are_divided_by_layer_plus_one() -> None:
    plain = MultiHeadAttention(CONFIG, layer=2)
    by_depth = MultiHeadAttention(GPTConfig(n_embd=C, n_head=H, scale_attn_by_inverse_layer_idx=True), layer=2)
    by_depth.update(plain.parameters())
    by_depth.c_attn.weight = mx.concatenate([3 * plain.c_attn.weight[:C], plain.c_attn.weight[C:]])
    by_depth.c_attn.bias = mx.concatenate([3 * plain.c_attn.bias[:C], plain.c_attn.bias[C:]])
    x = residual()
    assert close(by_depth(x), plain(x))  # queries three times as loud make up for the layer's 1/3


def test_tokens_after_a_cache_attend_to_the_cached_ones() -> None:
    layer, x = MultiHeadAttention(CONFIG, layer=0), residual()
    cache = KVCache(CONFIG.n_positions)
    in_two_parts = mx.concatenate([layer(x[:, :4], cache), layer(x[:, 4:], cache)], axis=1)
    assert cache.offset == T
    assert close(in_two_parts, layer(x))


# Dropout


def dropping(p: float) -> MultiHeadAttention:
    return MultiHeadAttention(GPTConfig(n_embd=C, n_head=H, attn_pdrop=p), layer=0)


def test_without_dropout_training_equals_evaluation() -> None:
    layer, x = dropping(0.0), residual()
    assert mx.array_equal(layer.train()(x), layer.eval()(x))


def test_the_explicit_form_for_dropout_equals_the_fused_kernel() -> None:
    layer, x = dropping(1e-9), residual()  # drops nothing, in the explicit form
    assert close(layer.train()(x), layer.eval()(x))


def test_attention_dropout_differs_between_calls_in_training_and_is_off_in_evaluation() -> None:
    layer, x = dropping(0.5), residual()
    layer.train()
    assert not mx.allclose(layer(x), layer(x))
    layer.eval()
    assert mx.array_equal(layer(x), layer(x))


def test_attention_dropout_preserves_the_mean() -> None:
    layer, x = dropping(0.2), residual()
    layer.train()
    average = sum(layer(x) for _ in range(2000)) / 2000
    assert close(average, layer.eval()(x), atol=0.05)
