"""The whole model: causality, initial weights, the tied head, its parts, and the ids that it refuses."""

from __future__ import annotations

from dataclasses import replace
from math import erf, log, pi, sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.activations import gelu
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT, checked_ids
from mlx_gpt.model.mlp import gelu_new

V, POSITIONS, C, LAYERS = 61, 12, 32, 3
CONFIG = GPTConfig(vocab_size=V, n_positions=POSITIONS, n_embd=C, n_layer=LAYERS, n_head=4)
WIDE = GPTConfig(vocab_size=2000, n_positions=64, n_embd=128, n_layer=4, n_head=4)  # enough weights for statistics


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(0)


@pytest.fixture
def model() -> GPT:
    """A small model whose weights are large enough that every token matters to every later one."""
    return GPT(replace(CONFIG, initializer_range=0.3)).eval()


def ids(B: int = 2, T: int = POSITIONS) -> mx.array:
    return mx.random.randint(0, V, (B, T))


def close(a: mx.array, b: mx.array, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and mx.allclose(a, b, rtol=0, atol=atol).item()


def mean_loss(model: GPT, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


# Causality


@pytest.mark.parametrize("j", range(POSITIONS))
def test_no_token_depends_on_later_ones(model: GPT, j: int) -> None:
    tokens = ids()
    changed = mx.array(tokens)
    changed[:, j] = (tokens[:, j] + 1) % V
    before, after = model(tokens), model(changed)
    assert close(before[:, :j], after[:, :j])
    for t in range(j, POSITIONS):  # the changed token and everything after it do notice
        assert not close(before[:, t], after[:, t], 1e-3)


def test_the_sequences_of_a_batch_are_independent(model: GPT) -> None:
    tokens = ids(B=3)
    together = model(tokens)
    for b in range(3):
        assert close(model(tokens[b : b + 1]), together[b : b + 1])


@pytest.mark.parametrize("split", range(1, POSITIONS))
def test_a_prompt_in_two_parts_through_the_cache_equals_the_prompt_in_one(model: GPT, split: int) -> None:
    tokens, cache = ids(), model.make_cache()
    in_two_parts = mx.concatenate([model(tokens[:, :split], cache), model(tokens[:, split:], cache)], axis=1)
    assert close(in_two_parts, model(tokens))


def test_one_token_at_a_time_through_the_cache_equals_all_at_once(model: GPT) -> None:
    tokens, cache = ids(), model.make_cache()
    one_by_one = mx.concatenate([model(tokens[:, t : t + 1], cache) for t in range(POSITIONS)], axis=1)
    assert [layer.offset for layer in cache] == [POSITIONS] * LAYERS
    assert close(one_by_one, model(tokens))


# Initial weights


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["61 tokens", "2000 tokens"])
def test_an_untrained_model_has_a_loss_of_ln_v(config: GPTConfig) -> None:
    tokens = mx.random.randint(0, config.vocab_size, (16, config.n_positions))
    assert mean_loss(GPT(config), tokens).item() == pytest.approx(log(config.vocab_size), rel=0.02)


def test_the_initial_weights_are_gpt2s() -> None:
    into_the_stream = 0.02 / sqrt(2 * WIDE.n_layer)
    for name, weight in tree_flatten(GPT(WIDE).parameters()):
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            std = into_the_stream if name.endswith("c_proj.weight") else 0.02
            assert mx.std(weight).item() == pytest.approx(std, rel=0.03), name
            assert mx.mean(weight).item() == pytest.approx(0, abs=0.05 * std), name


def test_the_seed_determines_the_weights() -> None:
    def weights(seed: int) -> mx.array:
        mx.random.seed(seed)
        return GPT(CONFIG).wte.weight

    assert mx.array_equal(weights(1), weights(1))
    assert not mx.array_equal(weights(1), weights(2))


# The head


def test_the_head_is_the_token_embedding(model: GPT) -> None:
    tokens = ids()
    assert "lm_head" not in model
    assert close(model(tokens), model.hidden(tokens) @ model.wte.weight.T)


def untied_twin(model: GPT) -> GPT:
    """Return a model with the same weights and an untied head: a copy of the embedding."""
    twin = GPT(replace(model.config, tie_word_embeddings=False)).eval()
    twin.update(model.parameters())
    twin.lm_head.weight = model.wte.weight
    return twin


def test_an_untied_head_has_its_own_weights(model: GPT) -> None:
    tokens, twin = ids(), untied_twin(model)
    assert twin.n_parameters == model.n_parameters + V * C
    assert close(twin(tokens), model(tokens))
    twin.lm_head.weight = 2 * model.wte.weight
    assert close(twin(tokens), 2 * model(tokens))


def test_the_tied_embedding_learns_from_both_of_its_uses(model: GPT) -> None:
    tokens, twin = ids(), untied_twin(model)
    tied = nn.value_and_grad(model, mean_loss)(model, tokens)[1]
    apart = nn.value_and_grad(twin, mean_loss)(twin, tokens)[1]
    assert close(tied["wte"]["weight"], apart["wte"]["weight"] + apart["lm_head"]["weight"])


# The parts


def test_the_model_is_its_parts_in_order(model: GPT) -> None:
    model.ln_f.weight, model.ln_f.bias = mx.random.normal((2, C))
    tokens = ids()
    x = model.wte.weight[tokens] + model.wpe.weight
    for block in model.h:
        x = block(x)
    assert close(model.hidden(tokens), model.ln_f(x))
    assert close(model(tokens), model.ln_f(x) @ model.wte.weight.T)


def test_a_block_is_its_formula() -> None:
    block = Block(CONFIG, layer=0)
    block.ln_1.weight, block.ln_2.bias = mx.random.normal((2, C))  # or the norms would have nothing to do but normalise

    def norm(x: mx.array, ln: nn.LayerNorm) -> mx.array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / mx.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5) * ln.weight + ln.bias

    def think(x: mx.array) -> mx.array:
        inner = gelu_new(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
        return inner @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias

    x = mx.random.normal((2, 5, C))
    attended = x + block.attn(norm(x, block.ln_1))
    assert close(block(x), attended + think(norm(attended, block.ln_2)))


def test_a_block_does_not_change_its_input() -> None:
    x = mx.random.normal((1, 5, C))
    before = np.array(x)
    mx.eval(Block(CONFIG, layer=0)(x))
    assert (np.array(x) == before).all()


def test_the_width_of_the_mlp_is_the_configured_one() -> None:
    assert GPT(CONFIG).h[0].mlp.c_fc.weight.shape == (4 * C, C)
    assert GPT(replace(CONFIG, n_inner=20)).h[0].mlp.c_fc.weight.shape == (20, C)


def test_every_layer_has_the_scale_of_its_depth() -> None:
    by_depth = GPT(replace(CONFIG, scale_attn_by_inverse_layer_idx=True))
    first = MultiHeadAttention(CONFIG, layer=0).scale
    assert [block.attn.scale for block in by_depth.h] == pytest.approx([first, first / 2, first / 3])


def test_gelu_new_is_the_tanh_formula() -> None:
    x = np.linspace(-12, 12, 4001)
    formula = 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(np.array(gelu_new(mx.array(x, mx.float32))), formula, rtol=1e-6, atol=1e-6)


def test_gelu_is_the_error_function_formula() -> None:
    x = np.linspace(-12, 12, 4001)
    formula = 0.5 * x * (1 + np.array([erf(value / sqrt(2)) for value in x]))
    np.testing.assert_allclose(np.array(gelu(mx.array(x, mx.float32))), formula, rtol=1e-6, atol=1e-6)


def test_the_activation_is_the_configured_one(model: GPT) -> None:
    exact = GPT(replace(model.config, activation_function="gelu")).eval()
    exact.update(model.parameters())
    tokens = ids()
    assert not close(exact(tokens), model(tokens), 1e-6)
    assert close(exact(tokens), model(tokens), 0.05)  # the two formulas differ by 0.0005 at most, per layer


# Dropout


@pytest.mark.parametrize("kind", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_differs_between_calls_in_training_and_is_off_in_evaluation(model: GPT, kind: str) -> None:
    dropping = GPT(replace(model.config, **{kind: 0.5}))
    dropping.update(model.parameters())
    tokens = ids()
    dropping.train()
    assert not close(dropping(tokens), dropping(tokens), 1e-3)
    dropping.eval()
    assert mx.array_equal(dropping(tokens), dropping(tokens))
    assert close(dropping(tokens), model(tokens))


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_dropout_applies_to_the_additions_of_attention_and_mlp(part: str) -> None:
    adds = Block(replace(CONFIG, resid_pdrop=0.5), layer=0)[part]
    x = mx.random.normal((2, 5, C))
    dropped = (adds.train()(x) == 0).astype(mx.float32)
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.15)
    assert not (adds.eval()(x) == 0).any()


def test_without_dropout_training_equals_evaluation(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids()
    trained, evaluated = model.train()(tokens), model.eval()(tokens)
    assert mx.abs(trained - evaluated).max() < 1e-5  # on a CPU the layer norm is rounded otherwise
    monkeypatch.setattr("mlx_gpt.linux_cpu.kernels.layer_norm", mx.fast.layer_norm)  # and nothing else is
    assert mx.array_equal(model.train()(tokens), model.eval()(tokens))


# Ids


def test_lists_numpy_and_mlx_ids_give_the_same_logits(model: GPT) -> None:
    tokens = ids()
    expected = model(tokens)
    assert mx.array_equal(model(tokens.tolist()), expected)
    assert mx.array_equal(model(np.array(tokens, np.uint16)), expected)
    assert mx.array_equal(model([list(row) for row in np.array(tokens, np.int64)]), expected)


REFUSED: dict[str, tuple[Any, str]] = {
    "negative": ([[3, -1]], f"between 0 and {V - 1} .*, got -1"),
    "past the vocabulary": ([[3, V]], f"between 0 and {V - 1} .*, got {V}"),
    "too big for int32": ([[2**40]], f"got {2**40}"),
    "too big for int64": ([[2**64]], "integer token ids"),
    "floats": ([[1.0, 2.0]], "integer token ids .* got float64"),
    "truth values": ([[True, False]], "integer token ids .* got bool"),
    "text": ("tree", "integer token ids"),
    "rows of different lengths": ([[1, 2], [3]], "rows of different lengths"),
    "nothing": ([], "the text is empty"),
    "an empty row": ([[]], "the text is empty"),
    "one dimension": ([1, 2, 3], r"shape \(B, T\), got .* of shape \(3,\)"),
    "three dimensions": ([[[1]]], r"shape \(B, T\), got .* of shape \(1, 1, 1\)"),
}


@pytest.mark.parametrize(("tokens", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_ids_are_refused_in_one_line(model: GPT, tokens: Any, message: str) -> None:
    # MLX does not check an index: what is not refused here would read some other memory.
    with pytest.raises(ValueError, match=message) as refusal:
        model(tokens)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrong", [-1, V, 2**31])
def test_numpy_ids_outside_the_vocabulary_are_refused(model: GPT, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"got {wrong}"):
        model(np.array([[0, wrong]]))


def test_of_mlx_ids_only_shape_and_type_are_checked(model: GPT) -> None:
    for tokens in (mx.array([1, 2, 3]), mx.array([[1.0]]), mx.array([[True]])):
        with pytest.raises(ValueError, match="expected integer token ids"):
            model(tokens)


def test_checked_ids_keep_their_shape() -> None:
    assert checked_ids([1, 2, 3], V).shape == (3,)
    assert checked_ids([[0, V - 1]], V).tolist() == [[0, V - 1]]
    assert checked_ids(np.zeros((2, 3), np.uint8), V).dtype == mx.int32


def test_a_compiled_model_takes_mlx_ids(model: GPT) -> None:
    tokens = ids()
    assert close(mx.compile(model)(tokens), model(tokens))  # a look at a value inside would raise


def test_a_sequence_may_fill_the_positions_and_not_exceed_them(model: GPT) -> None:
    assert model(ids(T=POSITIONS)).shape == (2, POSITIONS, V)
    with pytest.raises(ValueError, match=f"has {POSITIONS} positions, but the sequence is {POSITIONS + 1} tokens"):
        model(ids(T=POSITIONS + 1))


def test_a_full_cache_refuses_another_token_and_is_unchanged(model: GPT) -> None:
    tokens, cache = ids(), model.make_cache()
    model(tokens[:, :-1], cache)
    with pytest.raises(ValueError, match=f"the sequence is {POSITIONS + 1} tokens long"):
        model(tokens[:, -2:], cache)
    assert [layer.offset for layer in cache] == [POSITIONS - 1] * LAYERS
    assert close(model(tokens[:, -1:], cache)[:, 0], model(tokens)[:, -1])
