"""The bars of the next token follow the sampling rules; tokens are appended by a click, and sampled by a seed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens
from mlx_gpt.generate import sampling

pytestmark = pytest.mark.browser
FULL = "One sunny morning, Lily went to the garden. " * 20


def logits_of(opened: LivingPage, text: str, position: int = -1, edits: Any = None) -> mx.array:
    ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
    return lens.trace(opened.model, [ids], edits, ())[0][:, position]


def probabilities(logits: mx.array, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    logits = sampling.with_temperature(logits, temperature)
    logits = sampling.keep_top_k(logits, top_k) if top_k else logits
    logits = sampling.keep_top_p(logits, top_p) if top_p < 1 else logits
    return np.array(mx.softmax(logits, axis=-1, precise=True))[0]


def shown_ids(page: Any) -> list[int]:
    return [
        int(x)
        for x in page.eval_on_selector_all(
            ".bars [data-what=next]", "all => all.filter(x => x.offsetParent).map(x => x.dataset.id)"
        )
    ]


def drag(page: Any, name: str, share: float) -> None:
    """Drag a slider by the mouse to a share of its length."""
    box = page.locator(f"#{name}").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()


def assert_bars(page: Any, logits: mx.array, what: str = "next") -> None:
    state = page.evaluate("mlxGptPage.state")
    expected = probabilities(logits, state["temperature"], state["topK"], state["topP"])
    ids = shown_ids(page)
    found = [value(page, what, id=i) for i in ids]
    np.testing.assert_allclose(found, expected[ids], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("text", [TEXT, "Ben", "Tom said: “Où?” 🙂"])
def test_bars_are_the_most_probable_tokens_before_and_after_the_rules(tinyworld: LivingPage, text: str) -> None:
    with tinyworld.open() as page:
        page.fill("#text", text)
        settle(page)
        logits = logits_of(tinyworld, text)
        raw = np.array(mx.softmax(logits, axis=-1))[0]
        assert shown_ids(page) == np.argsort(-raw)[:10].tolist()
        np.testing.assert_allclose(
            [value(page, "next-raw", id=i) for i in shown_ids(page)], raw[shown_ids(page)], rtol=1e-4
        )
        assert_bars(page, logits)


def test_sliders_move_the_bars_and_show_what_a_rule_removes(tinyworld: LivingPage) -> None:
    text = "Lily found"
    logits = logits_of(tinyworld, text)
    with tinyworld.open({"text": text}) as page:
        drag(page, "temperature", 0.9)
        assert 1.6 < page.evaluate("mlxGptPage.state.temperature") < 2
        assert_bars(page, logits)
        page.locator("#top-k").press("Home")
        for _ in range(4):
            page.locator("#top-k").press("ArrowRight")
        assert page.evaluate("mlxGptPage.state.topK") == 5
        assert_bars(page, logits)
        removed = page.locator(".bars .removed:visible")
        assert removed.count() == 5
        assert removed.first.locator("[data-what=next]").inner_text() == "top-k"
        page.locator("#top-k").press("End")
        assert page.evaluate("mlxGptPage.state.topK") == 0
        drag(page, "top-p", 0.5)
        assert_bars(page, logits)
        assert page.locator(".bars .removed:visible [data-what=next]").last.inner_text() == "top-p"
        page.locator("#temperature").press("Home")
        assert value(page, "next", id=int(mx.argmax(logits).item())) == 1


def test_a_number_explains_itself_when_it_is_pointed_at_or_focused(tinyworld: LivingPage) -> None:
    with tinyworld.open({"text": "Lily found", "temperature": 0.5}) as page:
        number = page.locator("[data-what=next]").nth(1)
        number.hover()
        tip = page.locator("#popover").inner_text()
        assert "temperature" in tip
        assert "/ 0.5)" in tip
        page.keyboard.press("Escape")
        number.focus()
        assert page.locator("#popover").inner_text() == tip


def test_a_click_on_a_bar_appends_its_token_and_undo_takes_it_back(tinyworld: LivingPage) -> None:
    with tinyworld.open() as page:
        third = shown_ids(page)[2]
        page.locator(".bar").nth(2).click()
        settle(page)
        assert page.input_value("#text") == TEXT + tinyworld.tokenizer.decode([third])
        assert page.evaluate("mlxGptPage.run.ids.at(-1)") == third
        assert_bars(page, logits_of(tinyworld, page.input_value("#text")))
        page.click("#undo")
        settle(page)
        assert page.input_value("#text") == TEXT


def test_most_probable_appends_what_greedy_generation_does(tinyworld: LivingPage) -> None:
    expected = lens.generate(tinyworld.model, [tinyworld.tokenizer.encode_prompt(TEXT)], 4)[0].tolist()
    with tinyworld.open() as page:
        for _ in range(4):
            page.locator("#greedy").press("Enter")
            settle(page)
        assert page.evaluate("mlxGptPage.run.ids.slice(-4)") == expected


def test_a_link_with_a_seed_samples_the_same_text(tinyworld: LivingPage) -> None:
    texts = []
    for seed in (7, 7, 8):
        with tinyworld.open({"text": "Lily", "temperature": 1.5, "seed": seed}) as page:
            assert page.input_value("#seed") == str(seed)
            for _ in range(5):
                page.click("#sample")
                settle(page)
            texts.append(page.input_value("#text"))
            assert "The random number 0." in page.locator("[data-what=appended]").inner_text()
    assert texts[0] == texts[1] != texts[2]


def test_the_actual_next_token_is_marked_and_appending_there_drops_the_rest(tinyworld: LivingPage) -> None:
    with tinyworld.open({"token": 3}) as page:
        ids = tinyworld.tokenizer.encode_prompt(TEXT)
        marked = page.locator(".bars li", has=page.get_by_text("actual", exact=True))
        assert marked.locator("[data-what=next]").get_attribute("data-id") == str(ids[4])
        assert_bars(page, logits_of(tinyworld, TEXT, 3))
        best = shown_ids(page)[0]
        page.locator(".bar").first.click()
        settle(page)
        assert page.evaluate("mlxGptPage.run.ids") == [*ids[:4], best]


def test_with_edits_the_unchanged_bars_stand_beside(tinyworld: LivingPage) -> None:
    with tinyworld.open({"heads": {"3.1": 0}}) as page:
        edits = {"blocks.3.attn.hook_z": lambda z, name: z * mx.array([[1.0], [0.0]])}
        assert_bars(page, logits_of(tinyworld, TEXT, edits=edits))
        assert_bars(page, logits_of(tinyworld, TEXT), "next-unchanged")


@pytest.mark.parametrize("text", [FULL, FULL * 4])
def test_a_full_context_says_so_and_takes_no_token(tinyworld: LivingPage, text: str) -> None:
    with tinyworld.open({"text": text}, viewport={"width": 360, "height": 740}) as page:
        assert page.evaluate("mlxGptPage.run.ids.length") == 144
        assert "context of 144 tokens is full" in page.locator("[data-what=why-not]").inner_text()
        assert page.locator("#sample").is_disabled()
        page.locator(".bar").first.click()
        settle(page)
        assert page.input_value("#text") == text
        assert_bars(page, logits_of(tinyworld, text))


def test_in_a_recorded_page_the_rules_apply_to_all_tokens_and_none_is_appended(recorded: LivingPage) -> None:
    state = {"temperature": 1.7, "topK": 200, "topP": 0.9}
    logits = logits_of(recorded, TEXT)
    expected = probabilities(logits, 1.7, 200, 0.9)
    with recorded.open(state) as page:
        ids = shown_ids(page)
        assert ids == mx.argsort(-logits, axis=-1)[0, :10].tolist()
        found = [value(page, "next", id=i) for i in ids]
        np.testing.assert_allclose(found, expected[ids], rtol=1e-3, atol=1e-9)  # recorded in float16
        assert value(page, "others") == pytest.approx(1 - expected[ids].sum(), rel=1e-3)
        assert f"Tokens kept: {(expected > 0).sum()} of" in page.locator("[data-what=kept]").inner_text()
        assert "no token can be appended" in page.locator("[data-what=why-not]").inner_text()
        assert page.locator(".bar").first.is_disabled()
        assert page.locator("#sample").is_disabled()
        look = "button => [getComputedStyle(button).cursor, getComputedStyle(button).backgroundColor]"
        cursor, colour = page.locator("#sample").evaluate(look)
        assert cursor == "not-allowed"
        assert colour != page.locator("#tab-attention").evaluate(look)[1]
