"""A recorded page has what was traced of its texts, and says what it has not; its size is bounded."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.browser import open_page
from helpers.lens_model import L, random_model

from mlx_gpt import lens
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.lens import page as pages
from mlx_gpt.lens.page import make_page, recorded
from mlx_gpt.lens.page.recorded import recorded_data
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

TEXTS = ["The oak tree é🙂", "a shade"]
BYTES = Tokenizer.bytes()


def small_model(**fields: Any) -> GPT:
    return random_model(vocab_size=260, n_positions=40, **fields)


@pytest.fixture(scope="module")
def recording(modules: Any) -> tuple[GPT, list[int]]:
    """Open the second text of a page in the browser; return the model and the text's ids."""
    model = small_model()
    modules("open", recorded_data(model, BYTES, TEXTS, "test"))
    ids = modules("openRecorded", TEXTS[1])
    assert ids == BYTES.encode_prompt(TEXTS[1])
    return model, ids


@pytest.mark.browser
def test_scores_and_patterns_are_the_traced_ones(modules: Any, recording: tuple[GPT, list[int]]) -> None:
    model, ids = recording
    _, activations = lens.trace(model, [ids])
    for layer in range(L):
        for name, tolerance in (("hook_attn_scores", 5e-3), ("hook_pattern", 4e-4)):
            found = modules("recorded", "get", f"blocks.{layer}.attn.{name}")
            expected = np.array(activations[f"blocks.{layer}.attn.{name}"][0])
            assert found["shape"] == [*expected.shape]
            values = np.array([-np.inf if x is None else x for x in found["data"]]).reshape(expected.shape)
            np.testing.assert_allclose(values, expected, atol=tolerance, rtol=0)
    for name in ("blocks.0.attn.hook_q", "blocks.0.hook_resid_pre", "nothing"):
        assert modules("recorded", "get", name) is None


@pytest.mark.browser
def test_norms_are_the_traced_ones(modules: Any, recording: tuple[GPT, list[int]]) -> None:
    model, ids = recording
    names = ["hook_embed", "hook_pos_embed", "blocks.1.attn.hook_result"]
    names += [f"blocks.{L - 1}.{stream}" for stream in recorded.STREAMS]
    _, activations = lens.trace(model, [ids], names=names)
    for name in names:
        expected = np.array(mx.linalg.norm(activations[name][0], axis=-1)).reshape(-1)
        np.testing.assert_allclose(modules("recorded", "norms", name), expected, rtol=1e-4)
    assert modules("recorded", "norms", "blocks.0.attn.hook_q") is None


@pytest.mark.browser
def test_readings_are_pythons(modules: Any, recording: tuple[GPT, list[int]]) -> None:
    model, ids = recording
    logits, activations = lens.trace(model, [ids])
    top, logprobs = lens.logit_lens_top(model, activations, k=60)
    probabilities = np.exp(np.array(logprobs))
    for position in (0, len(ids) - 1):
        following = modules("recorded", "next", position, 60)
        likely = zip(top[-1, 0, position].tolist(), probabilities[-1, 0, position], strict=True)
        expected = {i: p for i, p in likely if i < BYTES.vocab_size}  # the model has ids that no token has
        assert [token["id"] for token in following] == [*expected][:50]
        values = [token["probability"] for token in following]
        np.testing.assert_allclose(values, [*expected.values()][:50], rtol=1e-4)
        layers = modules("recorded", "logitLens", position, 10)
        assert [[token["id"] for token in layer] for layer in layers] == top[:, 0, position, :10].tolist()
        values = [[token["probability"] for token in layer] for layer in layers]
        np.testing.assert_allclose(values, probabilities[:, 0, position, :10], rtol=1e-4)
        targets = modules("recorded", "targets", position)
        assert targets[:10] == [*expected][:10]
        assert targets[10] == (ids[position + 1] if position < len(ids) - 1 else targets[0])
        for target in targets[::5]:
            parts, labels = lens.logit_attribution(model, activations, lens.logit_direction(model, target), "head")
            found = modules("recorded", "attribution", position, target)
            assert [part["label"] for part in found] == labels
            values = [part["value"] for part in found]
            np.testing.assert_allclose(values, np.array(parts[:, 0, position]), rtol=1e-3, atol=1e-5)
        assert modules("recorded", "logit", position, targets[0]) == pytest.approx(
            logits[0, position, targets[0]].item(), rel=1e-4
        )
    absent = next(i for i in range(260) if i not in targets)
    assert modules("recorded", "attribution", position, absent) is None


@pytest.mark.browser
@pytest.mark.parametrize(
    ("vocab_size", "n_known", "spread"), [(500, 500, 1.0), (500, 450, 4.0), (50257, 50257, 1.0), (50304, 50257, 3.0)]
)
def test_probabilities_after_the_rules_are_those_of_the_sampler(
    modules: Any, vocab_size: int, n_known: int, spread: float
) -> None:
    model = random_model(vocab_size=vocab_size, n_positions=8, n_layer=1, tie_word_embeddings=False)
    model.lm_head.weight = mx.random.normal(model.lm_head.weight.shape) * spread / model.config.n_embd**0.5
    characters = [chr(0x10000 + i) for i in range(n_known)]
    tokenizer, text = CharacterTokenizer({c: i for i, c in enumerate(characters)}), "".join(characters[:3])
    modules("open", recorded_data(model, tokenizer, [text], "test"))
    ids = modules("openRecorded", text)
    logits = sampling.forbid(lens.trace(model, [ids], names=())[0][:, -1], range(n_known, vocab_size))
    rules = [*itertools.product((0.3, 0.8, 1, 2), (0, 10, 100), (0.5, 0.9, 1))]
    settings = [{"temperature": t, "topK": k, "topP": p} for t, k, p in rules]
    found = modules("recordedAfterRules", len(ids) - 1, settings)
    for (temperature, k, p), ruled in zip(rules, found, strict=True):
        left = sampling.with_temperature(logits, temperature)
        left = sampling.keep_top_k(left, k) if k else left
        left = sampling.keep_top_p(left, p) if p < 1 else left
        expected = np.array(mx.softmax(left, axis=-1, precise=True))[0]
        named, values = zip(*ruled["next"], strict=True)
        np.testing.assert_allclose(values, expected[[*named]], rtol=1e-3, atol=1e-12, err_msg=f"{temperature} {k} {p}")
        assert ruled["kept"] == pytest.approx(np.isfinite(np.array(left)).sum(), rel=5e-3)


@pytest.mark.browser
def test_a_text_that_was_not_recorded_is_refused(modules: Any, recording: tuple[GPT, list[int]]) -> None:
    with pytest.raises(Exception, match="This text was not recorded; choose one of the list"):
        modules("openRecorded", "another")


@pytest.mark.browser
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "n_layer": 1, "n_head": 1}], ids=str)
def test_every_view_of_a_recorded_page_opens(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(pages, "LIVING_PARAMETERS", 0)
    html, remark = make_page(small_model(**fields), BYTES, TEXTS, "test")
    assert remark.startswith("recorded page, 0.")
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    with open_page(browser, file) as page:
        page.wait_for_function("() => globalThis.mlxGptPage?.run && !mlxGptPage.busy")
        for tab in page.locator("nav [role=tab]").all():
            tab.click()
            page.wait_for_timeout(20)
        page.select_option("#text", TEXTS[1])
        page.wait_for_function(f"() => mlxGptPage.run.ids.length === {len(TEXTS[1])} && !mlxGptPage.busy")
        assert page.locator(".tokens:not(.pairs) button").count() == len(TEXTS[1])


# Size


def test_further_texts_are_recorded_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    one = len(recorded_data(model, BYTES, TEXTS[:1], "test")["recordings"][0]["blob"])
    monkeypatch.setattr(recorded, "SIZE", one + 10)
    assert recorded_data(model, BYTES, [TEXTS[0], *TEXTS], "test")["texts"] == TEXTS[:1]
    monkeypatch.setattr(recorded, "SIZE", 2 * one)
    assert recorded_data(model, BYTES, [TEXTS[0], *TEXTS], "test")["texts"] == TEXTS


def test_the_first_text_is_cut_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = small_model(), "The oak tree in the shade on a hot day"
    whole = len(recorded_data(model, BYTES, [text], "test")["recordings"][0]["blob"])
    monkeypatch.setattr(recorded, "SIZE", whole // 2)
    data = recorded_data(model, BYTES, [text], "test")
    (cut,) = data["texts"]
    assert text.startswith(cut)
    assert 10 < len(cut) < len(text)
    assert len(data["recordings"][0]["ids"]) == len(cut)


def test_a_text_longer_than_the_context_is_cut() -> None:
    assert recorded_data(small_model(), BYTES, ["a" * 50], "test")["texts"] == ["a" * 40]


def test_the_texts_of_all_ids_are_in_the_page() -> None:
    data = json.loads(json.dumps(recorded_data(small_model(), BYTES, ["éa"], "test")))
    tokens = data["tokenizer"]["tokens"]
    (recording,) = data["recordings"]
    assert [tokens[str(i)] for i in recording["ids"]] == [r"\xc3", r"\xa9", "a"]
    assert len(tokens) > 50  # those of the predictions too


def test_small_models_compute_and_large_ones_are_recorded() -> None:
    assert make_page(small_model(), BYTES, ["a"])[1].startswith("living page, 0.")
    large = GPT(GPTConfig(vocab_size=260, n_positions=8, n_embd=256, n_layer=4, n_head=4))
    assert large.n_parameters < pages.LIVING_PARAMETERS
    remark = make_page(large, BYTES, ["a"])[1]
    assert re.fullmatch(
        r"recorded page, 0\.\d MB, of 1 of 1 texts, 1 tokens: "
        r"the model has 3,228,160 parameters, too many for a page that computes, which has at most 8 MB",
        remark,
    )


def test_weights_that_float16_cannot_hold_make_a_recorded_page() -> None:
    model = small_model()
    model.wte.weight = model.wte.weight * 1e6
    assert "wte.weight has numbers that are no float16" in make_page(model, BYTES, ["a"])[1]


def test_an_empty_text_cannot_be_recorded() -> None:
    with pytest.raises(UsageError, match="the text is empty"):
        recorded_data(small_model(), BYTES, [""], "test")


@pytest.mark.slow
def test_the_heads_and_vocabulary_of_gpt2_and_128_tokens_take_less_than_5_mb() -> None:
    """The width has no part in the size, and a quarter of GPT-2's is faster."""
    mx.random.seed(0)
    model = GPT(GPTConfig(n_embd=192, initializer_range=0.16))  # patterns that are hard to compress
    page, remark = make_page(model, BYTES, ["The ancient oak tree provided cool shade on the hot summer day. " * 2])
    assert len(page) < 5_000_000
    assert "128 tokens" in remark
