"""Speculative decoding: greedy text is unchanged, drawn text has the same distribution, and steps are saved."""

from __future__ import annotations

from math import inf
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.decoder import NO_TOKEN, Decoder, pad_rows
from mlx_gpt.generate.generation import LOOKUP, Generation, generate, generate_tokens
from mlx_gpt.generate.history import History
from mlx_gpt.generate.rng import key_at, row_keys
from mlx_gpt.generate.sampler import Sampler, Vocabulary
from mlx_gpt.generate.sampling import draw
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.speculative import DraftModel, PromptLookup, Proposal, accept
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()


def new_model(seed: int, **shape: Any) -> GPT:
    mx.random.seed(seed)
    small: dict[str, Any] = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    return GPT(GPTConfig(vocab_size=257, **(small | shape))).eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return new_model(0)


def nearly(model: GPT, how_near: float) -> GPT:
    """Return a model that often generates the same."""
    draft = new_model(0)
    draft.ln_f.bias = draft.ln_f.bias + mx.random.normal((32,), scale=how_near, key=mx.random.key(1))
    return draft


DRAFTS: dict[str, Any] = {
    "itself": lambda model: model,
    "nearly itself": lambda model: nearly(model, 0.3),
    "another": lambda model: new_model(1, n_layer=1, n_embd=16, n_positions=20),  # and a shorter context
    "the text so far": lambda model: LOOKUP,
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guesses": 1},
        {"guesses": 9},
        {"context": "slide"},
        {"cache_bits": 16},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.1},
        {"no_repeat_ngram": 3, "min_tokens": 20, "ban": ("a",)},
        {"force": ("ox", "be"), "max_tokens": 20},
    ],
    ids=str,
)
def test_greedy_text_is_the_same_token_by_token(model: GPT, draft: str, settings: dict[str, Any]) -> None:
    settings = {"temperature": 0, "max_tokens": 100} | settings
    plain = list(generate_tokens(model, TOKENIZER, [1, 2, 3], **settings))
    assert len(set(plain)) > 5
    assert list(generate_tokens(model, TOKENIZER, [1, 2, 3], draft=DRAFTS[draft](model), **settings)) == plain


def test_good_proposals_save_steps(model: GPT) -> None:
    def steps(draft: Any, prompt: list[int] | None = None) -> int:
        settings = GenerationSettings(temperature=0, max_tokens=30, min_tokens=30, guesses=4)
        run = Generation(model, TOKENIZER, [prompt or [1, 2, 3]], settings, draft)
        assert len(list(run)) == 30
        return run.stats.steps

    assert steps(model) == 1 + 6  # after the first, five tokens at each step: four proposals and the next
    assert steps(new_model(1)) <= 30
    assert steps(model) < steps(nearly(model, 0.3)) < 30


def test_prompt_lookup_proposes_what_followed_the_last_occurrence() -> None:
    def propose(ids: list[int], n: int) -> Any:
        found = PromptLookup().propose(History(mx.array([ids]), [9]), n)
        return found and found.ids.tolist()

    assert propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 2) == [[4, 5]]
    assert propose([7, 2, 3, 8, 1, 2, 3, 4, 9, 1, 2, 3], 1) == [[4]]  # three alike before two
    assert propose([2, 3, 8, 2, 3, 9, 0, 2, 3], 1) == [[9]]  # the last time
    assert propose([5, 6, 5, 6], 4) == [[5, 6, 6, 6]]  # padded with the last id
    assert propose([1, 2, 3, 4], 2) is None


def test_a_draft_reads_only_what_differs_from_its_cache(model: GPT) -> None:
    draft = DraftModel(model, Sampler([GenerationSettings(temperature=0)], Vocabulary(TOKENIZER, 257), row_keys(0, 1)))

    def proposed(ids: list[int]) -> Any:
        return draft.propose(History(mx.array([ids]), [99]), 3)

    def plain(ids: list[int]) -> Any:
        return [list(generate_tokens(model, TOKENIZER, ids, temperature=0, max_tokens=3))]

    for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 9], [1, 2, 9, 9, 9, 9, 9, 9], [5], list(range(40)), list(range(47))):
        found = proposed(ids)
        if len(ids) + 3 <= 48:
            assert found.ids.tolist() == plain(ids)
        else:  # its context is full: it looks at the last half
            assert found.ids.tolist() == plain(ids[-24:])


# Drawn text

N, V = 10_000, 4
IDS = [10, 20, 30, 40]  # the allowed ids
ONLY = {i: -inf for i in range(257) if i not in IDS}


def tables(model: GPT, prompt: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a model's distributions of the next id, (V,), after each id, (V, V), and after each two, (V, V, V)."""

    def after(*ids: int) -> np.ndarray:
        logits = np.array(model([[*prompt, *ids]])[0, -1]).astype(np.float64)[IDS] * 0.3
        return np.exp(logits) / np.exp(logits).sum()

    one = [after(i) for i in IDS]
    return after(), np.array(one), np.array([[after(i, j) for j in IDS] for i in IDS])


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = counts.sum() * p
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("source", ["another", "nearly itself", "itself", "certain"])
def test_ten_thousand_corrected_texts_have_the_models_distribution(model: GPT, source: str) -> None:
    """Two proposals per row from the draft's probabilities; the first two ids that result."""
    draft = model if source == "certain" else DRAFTS[source](model)
    p0, p1, p2 = (mx.array(table.astype(np.float32)) for table in tables(model, [1, 2, 3]))
    q0, q1, _ = (mx.array(table.astype(np.float32)) for table in tables(draft, [1, 2, 3][-10:]))
    keys = row_keys(0, N)
    first = draw(mx.broadcast_to(mx.log(q0), (N, V)), key_at(keys, 0, 7))
    second = draw(mx.log(q1[first]), key_at(keys, 1, 7))
    proposed = mx.stack([first, second], axis=1)
    q: mx.array | None = mx.stack([mx.broadcast_to(q0, (N, V)), q1[first]], axis=1)
    if source == "certain":  # the same proposal for all, not drawn
        proposed, q = mx.broadcast_to(mx.array([2, 1]), (N, 2)), None
    x, y = proposed[:, 0], proposed[:, 1]
    p = mx.stack([mx.broadcast_to(p0, (N, V)), p1[x], p2[x, y]], axis=1)
    kept, correction = accept(p, Proposal(proposed, q), key_at(keys, 0, 1), key_at(keys, 0, 2))
    one = mx.where(kept > 0, x, correction)
    afresh = draw(mx.log(p1[one]), key_at(keys, 0, 3))  # the next step of those that kept nothing
    two = mx.where(kept > 1, y, mx.where(kept == 1, correction, afresh))
    pairs = np.zeros((V, V))
    np.add.at(pairs, (np.array(one), np.array(two)), 1)
    joint = np.array(p0)[:, None] * np.array(p1)
    assert chi_square(pairs.ravel(), joint.ravel()) < 44.3  # 15 degrees of freedom: larger once in ten thousand
    if source != "itself":
        naive = np.zeros((V, V))  # and the test can tell: without the correction it is the draft's
        np.add.at(naive, (np.array(x), np.array(y)), 1)
        assert chi_square(naive.ravel(), joint.ravel()) > 100
    share = float(mx.mean(kept == 2).item())
    assert share > 0.99 if source == "itself" else share < 0.9


@pytest.mark.parametrize("source", ["another", "the text so far"])
def test_a_long_drawn_text_has_the_models_transitions(source: str) -> None:
    """Through all of it: a model whose next id depends on the last one only; a draft that is another such model, or
    none, but what stood there last time."""

    def chain(seed: int) -> GPT:
        model = new_model(seed, n_layer=1, n_embd=16, n_positions=128, initializer_range=0.3)
        model.wpe.weight = mx.zeros_like(model.wpe.weight)
        model.h[0].attn.c_proj.weight = mx.zeros_like(model.h[0].attn.c_proj.weight)
        return model

    model, draft = chain(2), chain(3) if source == "another" else LOOKUP
    settings = {"logit_bias": ONLY, "temperature": 1.0, "context": "slide", "max_tokens": 1000, "guesses": 2, "seed": 1}
    ids = [10, *generate_tokens(model, TOKENIZER, [10], draft=draft, **settings)]
    logits = np.array(model([[i] for i in IDS])[:, 0]).astype(np.float64)[:, IDS]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counts = np.zeros((V, V))
    np.add.at(counts, ([IDS.index(i) for i in ids[:-1]], [IDS.index(i) for i in ids[1:]]), 1)
    assert sum(chi_square(row, p_row) for row, p_row in zip(counts, p, strict=True)) < 39.1  # 12 degrees of freedom
    uniform = np.full((V, V), 1 / V)
    assert sum(chi_square(row, p_row) for row, p_row in zip(counts, uniform, strict=True)) > 39.1


def test_the_same_seed_draws_the_same(model: GPT) -> None:
    draft = nearly(model, 0.3)
    texts = ["".join(generate(model, TOKENIZER, "a", draft=draft, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_probabilities_are_those_of_the_model_not_of_the_draft(model: GPT) -> None:
    plain, guessed = (
        [
            p.token
            for _, p in Generation(model, TOKENIZER, [[1, 2]], GenerationSettings(temperature=0, logprobs=2), draft)
            if p.token
        ]
        for draft in (None, nearly(model, 0.3))
    )
    assert [token.id for token in guessed] == [token.id for token in plain]
    assert [token.logprob for token in guessed] == pytest.approx([token.logprob for token in plain], abs=1e-4)
    assert [token.top[1][0] for token in guessed] == [token.top[1][0] for token in plain]


# Errors


def test_nothing_is_drawn_if_every_id_is_forbidden(model: GPT) -> None:
    p, q = mx.zeros((1, 2, V)), mx.full((1, 1, V), 1 / V)
    kept, correction = accept(p, Proposal(mx.array([[2]]), q), row_keys(0, 1), row_keys(1, 1))
    assert (kept.item(), correction.item()) == (0, NO_TOKEN)
    settings: dict[str, Any] = {"no_repeat_ngram": 1, "min_tokens": 300, "max_tokens": 300, "context": "slide"}
    with pytest.raises(UsageError, match="all tokens are masked by --no-repeat-ngram and --min-tokens;"):
        list(generate(model, TOKENIZER, "a", draft=model, **settings))


def test_a_draft_with_another_vocabulary_is_refused(model: GPT) -> None:
    mx.random.seed(0)
    fewer = GPT(GPTConfig(vocab_size=100, n_positions=48, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="the draft model has 100 ids and the tokenizer 257: it has another vocab"):
        generate(model, TOKENIZER, "a", draft=fewer)


def test_a_draft_may_have_a_padded_vocabulary(model: GPT) -> None:
    padded = new_model(1)
    padded.wte.weight = mx.concatenate([padded.wte.weight, mx.full((7, 32), 9.0)])
    draft = GPT(GPTConfig(vocab_size=264, n_positions=48, n_embd=32, n_layer=2, n_head=2)).eval()
    draft.update(padded.parameters())
    plain = list(generate_tokens(model, TOKENIZER, [1], temperature=0, max_tokens=20))
    assert list(generate_tokens(model, TOKENIZER, [1], draft=draft, temperature=0, max_tokens=20)) == plain


def test_a_draft_is_for_one_prompt_only(model: GPT) -> None:
    with pytest.raises(UsageError, match="a draft is for one prompt at a time"):
        Generation(model, TOKENIZER, [[1], [2]], GenerationSettings(), LOOKUP)


def test_rewound_tokens_have_no_effect(model: GPT) -> None:
    decoder = Decoder(model)
    decoder.prefill(pad_rows([[1, 2, 3]], 257))
    decoder.step(mx.array([[4, 5, 6]]))
    decoder.rewind(2)
    again = np.array(decoder.step(mx.array([[7]])))[0, -1]
    assert again == pytest.approx(np.array(model([[1, 2, 3, 4, 7]])[0, -1]), abs=1e-4)
