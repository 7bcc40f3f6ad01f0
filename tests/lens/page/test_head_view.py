"""The view of one head shows each step from queries to logits with Python's numbers, which explain themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import V, random_model
from helpers.living_page import TEXT, LivingPage, rounded, settle, value

from mlx_gpt import lens
from mlx_gpt.lens import page as pages
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser
VIEW = "#view-head "
LONG = "One sunny morning, Lily went to the garden and saw a big red ball near the old tree. " * 8


class Head:
    """One head of a text in Python."""

    def __init__(self, opened: LivingPage, text: str, layer: int, head: int, edits: Any = None):
        ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
        names = [*lens.activation_names(opened.model.config), "blocks.*.attn.hook_result"]
        _, self.activations = lens.trace(opened.model, [ids], edits, names)
        self.model, self.layer, self.head, self.T = opened.model, layer, head, len(ids)

    def of(self, name: str) -> np.ndarray:
        """Return an activation of the head: (T, D), (T, C) or (T, T)."""
        x = self.activations[f"blocks.{self.layer}.attn.hook_{name}"][0]
        return np.array(x[self.head] if name in ("attn_scores", "pattern") else x[:, self.head])

    def logits(self, query: int) -> np.ndarray:
        """Return what the head adds to the logit of each token: (V,)."""
        result, norm = self.of("result")[query], self.model.ln_f
        read = (
            (result - result.mean()) * np.array(norm.weight) / self.activations["ln_final.hook_scale"][0, query].item()
        )
        return np.array(lens.logit_direction(self.model, mx.arange(self.model.config.vocab_size))) @ read

    def attribution(self, query: int, token: int) -> float:
        """Return what the head adds to the logit of a token."""
        direction = lens.logit_direction(self.model, token)
        values, labels = lens.logit_attribution(self.model, self.activations, direction, by="head")
        return float(values[labels.index(f"L{self.layer}H{self.head}"), 0, query].item())


@pytest.fixture(scope="module")
def small(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> LivingPage:
    """Return the page of a random model whose scores are also divided by the layer's number."""
    characters = CharacterTokenizer({chr(97 + i): i for i in range(V)})
    model = random_model(scale_attn_by_inverse_layer_idx=True)
    html, _ = pages.make_page(model, characters, [TEXT], "test")
    return LivingPage(browser, tmp_path_factory.mktemp("page"), rounded(model), characters, html)


def strip(page: Any, what: str, **data: Any) -> np.ndarray:
    """Return the numbers of a strip, read with the arrow keys."""
    attributes = "".join(f'[data-{name}="{v}"]' for name, v in data.items())
    element = page.locator(f'{VIEW}.raster[data-what="{what}"]{attributes}').first
    element.focus()
    page.keyboard.press("Home")
    numbers = [float(element.get_attribute("data-value"))]
    for _ in range(int(element.get_attribute("aria-valuemax"))):
        page.keyboard.press("ArrowRight")
        numbers.append(float(element.get_attribute("data-value")))
    return np.array(numbers)


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def shown(page: Any, what: str) -> dict[int, float]:
    """Return the numbers of a name by their key, or token."""
    numbers = page.eval_on_selector_all(
        f"{VIEW}[data-what={what}]", "all => all.map(x => [x.dataset.key ?? x.dataset.token, x.dataset.value])"
    )
    return {int(key): float(number) for key, number in numbers}


def assert_steps(page: Any, head: Head, query: int, key: int) -> None:
    """Assert that all steps but the last have Python's numbers."""
    q, k, v, z = (head.of(name) for name in "qkvz")
    assert_close(strip(page, "q"), q[query])
    assert_close(strip(page, "k", key=key), k[key])
    assert_close(strip(page, "products", key=key), q[query] * k[key])
    assert value(page, "product", key=key) == pytest.approx(q[query] @ k[key], rel=1e-4)
    scores, pattern = head.of("attn_scores")[query], head.of("pattern")[query]
    assert value(page, "scaled", key=key) == pytest.approx(scores[key], rel=1e-4)
    weights = shown(page, "weight")
    assert set(weights) >= {*np.argsort(-pattern)[: min(8, query + 1)].tolist()}
    for i, weight in weights.items():
        assert_close(weight, pattern[i])
        assert_close(shown(page, "score")[i], scores[i])
        assert shown(page, "exp")[i] == pytest.approx(np.exp(scores[i] - scores[: query + 1].max()), rel=1e-4)
    assert value(page, "weight-sum") == pytest.approx(1, abs=1e-5)
    assert value(page, "exp-sum") == pytest.approx(np.exp(scores[: query + 1] - scores.max()).sum(), rel=1e-4)
    assert_close(strip(page, "moved", key=key), pattern[key] * v[key])
    assert_close(strip(page, "z"), z[query])


def assert_addition(page: Any, head: Head, query: int) -> None:
    """Assert that the last step has Python's numbers."""
    result = head.of("result")[query]
    assert_close(strip(page, "result"), result)
    assert value(page, "result-norm") == pytest.approx(np.linalg.norm(result), rel=1e-4)
    x = np.array(head.activations[f"blocks.{head.layer}.hook_resid_pre"][0, query])
    cosine = result @ x / (np.linalg.norm(result) * np.linalg.norm(x))
    assert value(page, "result-cosine") == pytest.approx(cosine, rel=1e-4, abs=1e-6)
    logits, moved = head.logits(query), shown(page, "moved-logit")
    order = np.argsort(-logits)
    assert [*moved] == [*order[:5], *order[:-6:-1]]
    for token, change in moved.items():
        assert_close(change, head.attribution(query, token))


@pytest.mark.parametrize(
    ("text", "query"),
    [(TEXT, 8), ("Ben", 0), (LONG, 100)],
    ids=["in a sentence", "of one token", "in the whole context"],
)
def test_the_steps_of_a_head_are_python_s(tinyworld: LivingPage, text: str, query: int) -> None:
    with tinyworld.open({"view": "head", "layer": 4, "head": 1}) as page:
        page.fill("#text", text)
        settle(page)
        page.locator(".tokens .token").nth(query).click()
        head = Head(tinyworld, text, 4, 1)
        key = int(head.of("pattern")[query].argmax())
        assert page.locator("#head-key").input_value() == str(key)
        assert_steps(page, head, query, key)
        assert_addition(page, head, query)


def test_layer_head_and_key_are_chosen_from_lists_and_by_keys(small: LivingPage) -> None:
    with small.open({"view": "head", "text": "abcdefghbcd", "token": 6}) as page:
        page.select_option("#head-layer", "2")
        page.select_option("#head-head", "3")
        page.select_option("#head-key", "2")
        head = Head(small, "abcdefghbcd", 2, 3)
        assert_steps(page, head, 6, 2)
        assert_addition(page, head, 6)
        page.locator("h1").click()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("]")
        assert "Layer 1, head 2" in page.locator(f"{VIEW}[data-what=read-head]").inner_text()
        head = Head(small, "abcdefghbcd", 1, 2)
        assert_steps(page, head, 7, int(head.of("pattern")[7].argmax()))


def test_the_mask_hides_the_future(small: LivingPage) -> None:
    with small.open({"view": "head", "layer": 1, "text": "abcdefgh", "token": 3}) as page:
        head = Head(small, "abcdefgh", 1, 0)
        scale = head.model.h[1].attn.scale
        unmasked = shown(page, "unmasked")
        assert [*unmasked] == [0, 1, 2, 3, 4, 5]
        assert_close([*unmasked.values()], head.of("q")[3] @ head.of("k")[:6].T * scale)
        rows = page.locator(f"{VIEW}.steps > li").nth(2).locator("tbody tr")
        assert [row.split()[-1] == "−∞" for row in rows.all_inner_texts()] == [False] * 4 + [True] * 2


def test_a_head_that_is_scaled_moves_that_much(small: LivingPage) -> None:
    with small.open({"view": "head", "layer": 1, "head": 1, "text": "abcdefgh", "heads": {"1.1": -0.5}}) as page:
        edit = {"blocks.1.attn.hook_z": lambda z, name: mx.where(mx.arange(4)[:, None] == 1, -0.5 * z, z)}
        head = Head(small, "abcdefgh", 1, 1, edit)
        assert_close(strip(page, "z"), head.of("z")[7])
        assert_addition(page, head, 7)
        assert "scaled by −0.5" in page.locator(f"{VIEW}[data-what=read-head]").inner_text()


def test_numbers_explain_themselves_with_their_values(small: LivingPage) -> None:
    with small.open({"view": "head", "layer": 1, "head": 1, "text": "abcdefgh", "token": 5}) as page:
        head = Head(small, "abcdefgh", 1, 1)
        key = int(page.locator("#head-key").input_value())
        products = head.of("q")[5] * head.of("k")[key]
        for what, formula, last in (
            ("product", "q·k = Σᵢ qᵢ × kᵢ", products.sum()),
            ("scaled", "score = q·k × 1/√8 / 2", head.of("attn_scores")[5, key]),
            ("weight-sum", "sum over the keys", 1.0),
            ("result-norm", "√Σ resultᵢ²", np.linalg.norm(head.of("result")[5])),
        ):
            page.locator(f"{VIEW}.number[data-what={what}]").first.focus()
            tip = page.locator("#popover").inner_text()
            assert formula in tip
            assert float(tip.rpartition("= ")[2].split()[0].replace("−", "-")) == pytest.approx(last, rel=6e-3)
        page.locator(f"{VIEW}.raster[data-what=z]").hover()
        assert "Σ weight × v" in page.locator("#popover").inner_text()
        page.keyboard.press("Escape")


def test_a_recorded_head_shows_what_was_recorded_and_says_what_was_not(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LIVING_PARAMETERS", 0)
    model, tokenizer = random_model(vocab_size=260, n_positions=50), Tokenizer.bytes()
    recorded = LivingPage(browser, tmp_path, model, tokenizer, pages.make_page(model, tokenizer, [TEXT], "test")[0])
    with recorded.open({"view": "head", "layer": 2, "head": 1, "token": 20}) as page:
        head = Head(recorded, TEXT, 2, 1)
        for key, weight in shown(page, "weight").items():
            assert weight == pytest.approx(head.of("pattern")[20, key], abs=4e-4)
        assert value(page, "result-norm") == pytest.approx(np.linalg.norm(head.of("result")[20]), rel=1e-4)
        for token, change in shown(page, "moved-logit").items():
            assert change == pytest.approx(head.attribution(20, token), rel=1e-3, abs=1e-5)
        assert page.locator(f"{VIEW}:text('a living page shows')").count() == 3
        assert page.locator(f"{VIEW}.raster").count() == 0


def test_buttons_go_through_the_steps(small: LivingPage) -> None:
    with small.open({"view": "head", "text": "abc"}, viewport={"width": 360, "height": 700}) as page:
        current = page.locator(f"{VIEW}.steps > li[aria-current=step] h3")
        titles = [current.inner_text()]
        while page.locator("text=Next step").is_enabled():
            page.click("text=Next step")
            titles.append(current.inner_text())
            assert current.evaluate("x => x === document.activeElement && x.getBoundingClientRect().top < innerHeight")
        assert titles == page.locator(f"{VIEW}.steps h3").all_inner_texts()
        assert len(titles) == 6
        page.click("text=Previous step")
        assert current.inner_text() == titles[4]
        assert page.evaluate("document.documentElement.scrollWidth") == 360
