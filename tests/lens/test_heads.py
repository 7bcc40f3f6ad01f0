"""Head scores find heads that are built to be what they are called."""

from __future__ import annotations

from math import log

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, H, L, P, T, V, largest_difference, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import attention_entropy, detect_heads, first_token_mass, head_scores, repeated_tokens, trace
from mlx_gpt.lens.heads import KINDS, attention_to, detection_pattern, patterns

MODEL, TOKENS = random_model(), random_ids()


def looking_back(distance: int, T: int) -> mx.array:
    """Return a pattern in which each query attends to the key so far back, or else to the first: (T, T)."""
    return mx.array(np.eye(T, dtype=np.float32)[[max(i - distance, 0) for i in range(T)]])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make heads 0, 1 and 2 of layer 1 a previous-token, a duplicate-token and an induction head, for length 5."""
    forward = trace

    def edited(model: object, tokens: mx.array, edits: object, names: str) -> tuple:
        def make(pattern: mx.array, name: str) -> mx.array:
            n = pattern.shape[-1]
            for head, distance in enumerate((1, 5, 4)):
                pattern[:, head] = looking_back(distance, n)
            return pattern

        return forward(model, tokens, {"blocks.1.attn.hook_pattern": make}, names)  # type: ignore[arg-type]

    monkeypatch.setattr("mlx_gpt.lens.heads.trace", edited)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("start", [None, 3])
def test_a_head_that_is_built_for_a_kind_scores_one_and_the_others_less(start: int | None) -> None:
    scores = head_scores(MODEL, length=5, start=start)
    for head, kind in enumerate(KINDS):
        assert scores[kind].shape == (L, H)
        assert scores[kind][1, head].item() == pytest.approx(1)
        rest = np.delete(np.array(scores[kind]).flatten(), H + head)
        assert rest.max() < 0.8


def test_attention_to_is_the_mean_of_a_diagonal() -> None:
    pattern = patterns(trace(MODEL, TOKENS)[1])
    expected = np.mean([np.array(pattern)[..., i, i - 2] for i in range(4, T)], axis=(0, 2))
    np.testing.assert_allclose(np.array(attention_to(pattern, 2, first=4)), expected, atol=1e-6)
    with pytest.raises(UsageError, match="the text has 9 tokens; looking 9 back needs a longer one"):
        attention_to(pattern, T)


def test_random_tokens_are_repeated_once_and_depend_on_the_seed() -> None:
    tokens = np.array(repeated_tokens(V, 6, 3, seed=1, start=2))
    assert tokens.shape == (3, 13)
    assert (tokens[:, 0] == 2).all()
    assert (tokens[:, 1:7] == tokens[:, 7:]).all()
    assert (tokens != np.array(repeated_tokens(V, 6, 3, seed=2, start=2))).any()
    assert repeated_tokens(V, 6, 3).shape == (3, 12)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        repeated_tokens(V, 1, 3)


def test_detection_patterns_of_a_text() -> None:
    tokens = [[1, 2, 1, 2, 1]]
    expected = {
        "previous token": {(1, 0), (2, 1), (3, 2), (4, 3)},
        "duplicate token": {(2, 0), (3, 1), (4, 0), (4, 2)},
        "induction": {(2, 1), (3, 2), (4, 1), (4, 3)},
    }
    for kind, places in expected.items():
        found = np.argwhere(np.array(detection_pattern(tokens, kind)[0]))
        assert {tuple(place) for place in found.tolist()} == places
    with pytest.raises(UsageError, match="one of previous token, duplicate token, induction, not 'name mover'"):
        detection_pattern(tokens, "name mover")


@pytest.mark.parametrize("kind", KINDS)
def test_detected_heads_have_the_share_of_attention_by_definition(kind: str) -> None:
    tokens = repeated_tokens(V, 5, B)
    found = detect_heads(MODEL, tokens, kind, exclude_first=True, exclude_current=True)
    pattern = np.array(patterns(trace(MODEL, tokens)[1]))  # (L, B, H, T, T)
    pattern[..., 0] = 0
    pattern[..., range(10), range(10)] = 0
    where = np.array(detection_pattern(tokens, kind))[:, None]
    expected = ((pattern * where).sum((-1, -2)) / pattern.sum((-1, -2))).mean(axis=1)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)
    everything = np.array(detect_heads(MODEL, tokens, kind))
    assert (everything <= np.array(found) + 1e-6).all()


def test_entropy_is_zero_for_one_key_and_log_n_for_n_equal_ones() -> None:
    edits = {
        "blocks.0.attn.hook_pattern": lambda x, name: mx.broadcast_to(looking_back(1, T), x.shape),
        "blocks.1.attn.hook_attn_scores": lambda x, name: mx.where(mx.isinf(x), x, 0.0),
    }
    entropy = attention_entropy(trace(MODEL, TOKENS, edits)[1])
    assert entropy.shape == (L, B, H, T)
    assert mx.abs(entropy[0]).max().item() == 0
    assert largest_difference(entropy[1, 0, 0], mx.array([log(i + 1) for i in range(T)])) < 1e-5


def test_the_first_tokens_mass_is_a_column_of_the_pattern() -> None:
    _, activations = trace(MODEL, TOKENS, names="*hook_pattern")
    mass = first_token_mass(activations)
    assert mass.shape == (L, B, H, T)
    assert mx.array_equal(mass[2], activations["blocks.2.attn.hook_pattern"][..., 0])
    with pytest.raises(UsageError, match="hold no pattern"):
        first_token_mass(trace(MODEL, TOKENS, names="hook_embed")[1])


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match=f"{P + 2} tokens long and the model's context is {P}"):
        head_scores(MODEL, length=P // 2 + 1)
