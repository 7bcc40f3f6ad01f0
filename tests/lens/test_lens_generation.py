"""The same edits while text is generated, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from helpers.lens_model import B, H, P, T, V, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.lens import generate
from mlx_gpt.text.tokenizer import Tokenizer

MODEL, TOKENS = random_model(), random_ids()
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 1}


def at_position(i: int) -> Callable:
    def edit(x: mx.array, name: str) -> mx.array:
        if x.shape[1] > i:
            x[:, i] = 0
        return x

    return edit


def first_key_only(pattern: mx.array, name: str) -> mx.array:
    return mx.broadcast_to(mx.arange(pattern.shape[-1]) == 0, pattern.shape).astype(pattern.dtype)


def not_the_key_before(scores: mx.array, name: str) -> mx.array:
    S = scores.shape[-1]
    return mx.where(mx.arange(S) == mx.arange(S)[:, None] - 1, -mx.inf, scores)


EDITS: dict[str, dict[str, Callable]] = {
    "none": {},
    "head": {"blocks.1.attn.hook_z": lambda z, name: z * (mx.arange(H) != 2)[:, None]},
    "everywhere": {"blocks.*.hook_mlp_out": lambda x, name: x * 0.3},
    "direction": {"blocks.0.hook_resid_post": lambda x, name: x + mx.arange(x.shape[-1]) / 20},
    "pattern": {"blocks.1.attn.hook_pattern": first_key_only, "blocks.0.attn.hook_v": lambda x, name: x * 2},
    "scores": {"blocks.*.attn.hook_attn_scores": not_the_key_before},
    "prompt position": {"blocks.1.hook_resid_pre": at_position(3)},
    "generated position": {"blocks.0.hook_resid_mid": at_position(T + 2)},
    "norm": {"blocks.1.ln2.hook_scale": lambda x, name: x * 2},
    "result": {"blocks.1.attn.hook_result": lambda x, name: x * (mx.arange(H) != 1)[:, None]},
}


@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_edited_text_is_the_same_with_and_without_a_cache(edits: dict, settings: dict[str, Any]) -> None:
    cached = generate(MODEL, TOKENS, 12, edits=edits, **settings)
    assert cached.shape == (B, 12)
    assert cached.tolist() == generate(MODEL, TOKENS, 12, edits=edits, cache=False, **settings).tolist()


@pytest.mark.parametrize("name", [name for name in EDITS if name != "none"])
def test_the_edit_changes_the_text(name: str) -> None:
    plain = generate(MODEL, TOKENS, 12, **DRAWN).tolist()
    assert generate(MODEL, TOKENS, 12, edits=EDITS[name], **DRAWN).tolist() != plain


def test_without_edits_it_is_the_text_of_the_fast_model() -> None:
    model, prompt = random_model(vocab_size=257), random_ids(shape=(1, T))
    for settings in ({"temperature": 0.0}, DRAWN):
        fast = list(generate_tokens(model, Tokenizer.bytes(), prompt[0].tolist(), max_tokens=12, **settings))
        assert generate(model, prompt, 12, end_id=256, **settings)[0].tolist()[: len(fast)] == fast


def test_a_row_is_the_same_alone() -> None:
    rows = generate(MODEL, TOKENS, 5, **DRAWN)
    assert generate(MODEL, TOKENS[:1], 5, **DRAWN).tolist() == rows[:1].tolist()


def test_it_ends_where_the_context_is_full() -> None:
    assert generate(MODEL, TOKENS, 100).shape == (B, P - T + 1)
    with pytest.raises(UsageError, match=f"{P} tokens long, which fills the model's context"):
        generate(MODEL, random_ids(shape=(1, P)))


def test_it_ends_at_the_end_token_of_all_rows() -> None:
    new = generate(MODEL, TOKENS[:1], 10)[0].tolist()
    assert generate(MODEL, TOKENS[:1], 10, end_id=new[3])[0].tolist() == new[: new.index(new[3]) + 1]
    assert generate(MODEL, TOKENS, 10, end_id=V).shape == (B, 10)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": -1}])
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        generate(MODEL, TOKENS, **settings)


@pytest.mark.parametrize("cache", [True, False])
def test_a_bad_edit_is_refused(cache: bool) -> None:
    other = mx.zeros((B, T, MODEL.config.n_embd))
    with pytest.raises(UsageError, match=r"must return the shape \(2, 10, 32\), not \(2, 9, 32\)"):
        generate(MODEL, TOKENS, 3, edits={"hook_embed": lambda x, name: other}, cache=cache)
    with pytest.raises(UsageError, match="returns NaN"):
        generate(MODEL, TOKENS, 3, edits={"hook_embed": lambda x, name: x * mx.nan}, cache=cache)
