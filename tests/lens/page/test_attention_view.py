"""The attention view shows the patterns of all heads, and where a token looks in them, with Python's numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens
from mlx_gpt.lens.heads import attention_to

pytestmark = pytest.mark.browser
VIEW = "#view-attention "
LONG = "One sunny morning, Lily went to the garden and saw a big red ball near the old tree. " * 8


def activations_of(opened: LivingPage, text: str = TEXT, edits: Any = None) -> Any:
    ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
    return lens.trace(opened.model, [ids], edits)[1]


def patterns_of(opened: LivingPage, text: str = TEXT, edits: Any = None) -> np.ndarray:
    """Return the patterns of a text in Python: (n_layer, H, T, T)."""
    activations = activations_of(opened, text, edits)
    layers = range(opened.model.config.n_layer)
    return np.stack([np.array(activations[f"blocks.{layer}.attn.hook_pattern"][0]) for layer in layers])


def numbers(page: Any, what: str) -> list[dict[str, str]]:
    """Return the data of all numbers of a name in the view, when all are drawn."""
    return page.eval_on_selector_all(
        f"{VIEW}[data-what={what}]", "all => all.map(x => ({...x.dataset, text: x.textContent}))"
    )


def assert_strongest(page: Any, patterns: np.ndarray, query: int) -> None:
    """Assert that each head shows where the query looks."""
    page.wait_for_function(
        "([view, heads, query]) => document.querySelectorAll("
        "`${view}[data-what=strongest][data-query='${query}']`).length === heads",
        arg=[VIEW, patterns.shape[0] * patterns.shape[1], query],
    )
    for shown in numbers(page, "strongest"):
        row = patterns[int(shown["layer"]), int(shown["head"]), query]
        np.testing.assert_allclose(float(shown["value"]), row.max(), rtol=1e-4)
        np.testing.assert_allclose(row[int(shown["key"])], row.max(), rtol=1e-4)


def assert_shades(page: Any, pattern: np.ndarray, query: int) -> None:
    """Assert that the tokens of the text are shaded by the weights of a query of the chosen head."""
    shades = numbers(page, "shade")
    assert [int(shade["query"]) for shade in shades] == [query] * len(pattern)
    np.testing.assert_allclose([float(shade["value"]) for shade in shades], pattern[query], rtol=1e-4, atol=1e-9)


def assert_table(page: Any, activations: Any, layer: int, head: int, query: int) -> None:
    """Assert that the table has the scores and weights of the chosen head."""
    for what, name in (("score", "attn_scores"), ("weight", "pattern")):
        row = np.array(activations[f"blocks.{layer}.attn.hook_{name}"][0, head, query, : query + 1])
        found = numbers(page, what)
        assert [int(number["key"]) for number in found] == [*range(query + 1)]
        np.testing.assert_allclose([float(number["value"]) for number in found], row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", [TEXT, "Ben", LONG], ids=["ten tokens", "one token", "the whole context"])
def test_all_heads_and_the_chosen_one_are_python_s(tinyworld: LivingPage, text: str) -> None:
    activations, patterns = activations_of(tinyworld, text), patterns_of(tinyworld, text)
    last = patterns.shape[-1] - 1
    with tinyworld.open({"view": "attention", "layer": 3, "head": 1}) as page:
        page.fill("#text", text)
        settle(page)
        assert_strongest(page, patterns, last)
        assert_shades(page, patterns[3, 1], last)
        assert_table(page, activations, 3, 1, last)
        key = int(patterns[3, 1, last].argmax())
        assert value(page, "pattern", layer=3, head=1, query=last, key=key) == pytest.approx(
            patterns[3, 1, last, key], rel=1e-4
        )


def test_a_head_is_summarized_by_what_it_attends_to(tinyworld: LivingPage) -> None:
    patterns = patterns_of(tinyworld)
    with tinyworld.open({"view": "attention"}) as page:
        assert_strongest(page, patterns, patterns.shape[-1] - 1)
        for shown in numbers(page, "summary"):
            pattern = patterns[int(shown["layer"]), int(shown["head"])]
            by_offset = [
                float(attention_to(mx.array(pattern)[None, None, None], back, 1).item())
                for back in range((len(pattern) - 1) // 2 + 1)
            ]
            assert float(shown["share"]) == pytest.approx(max(by_offset), rel=1e-4)
            assert by_offset[int(shown["offset"])] == pytest.approx(max(by_offset), rel=1e-4)
            assert float(shown["first"]) == pytest.approx(pattern[1:, 0].mean(), rel=1e-4)
            entropy = -np.where(pattern > 0, pattern * np.log(np.maximum(pattern, 1e-30)), 0).sum(-1)[1:].mean()
            spread = f"≈ {np.exp(entropy):.1f} keys"
            assert (shown["text"] == spread) == (max(float(shown["share"]), float(shown["first"])) < 0.25)


def test_a_token_that_is_pointed_at_or_focused_shows_where_it_looks_in_all_heads(tinyworld: LivingPage) -> None:
    patterns = patterns_of(tinyworld)
    with tinyworld.open({"view": "attention", "layer": 1, "head": 0}) as page:
        for query, tokens in ((4, ".tokens .token"), (8, f"{VIEW}.read .token"), (2, ".tokens .token")):
            page.locator(tokens).nth(query).hover()
            assert_strongest(page, patterns, query)
            assert_shades(page, patterns[1, 0], query)
            drawn = page.eval_on_selector_all(f"{VIEW}.arcs path", "all => all.map(x => Number(x.dataset.key))")
            expected = [key for key in range(query) if patterns[1, 0, query, key] >= 0.02]
            assert sorted(drawn) == expected
        page.mouse.move(1, 1)
        assert_strongest(page, patterns, patterns.shape[-1] - 1)
        page.locator(".tokens .token").nth(3).focus()
        assert_strongest(page, patterns, 3)
        page.locator(f"{VIEW}.read .token").last.focus()
        page.keyboard.press("ArrowLeft")
        assert_strongest(page, patterns, patterns.shape[-1] - 2)
        page.keyboard.press("Enter")
        assert page.evaluate("mlxGptPage.state.token") == patterns.shape[-1] - 2
        assert_table(page, activations_of(tinyworld), 1, 0, patterns.shape[-1] - 2)


def test_a_cell_that_is_pointed_at_shows_its_number_and_formula(tinyworld: LivingPage) -> None:
    activations, patterns = activations_of(tinyworld), patterns_of(tinyworld)
    T = patterns.shape[-1]
    with tinyworld.open({"view": "attention", "layer": 2, "head": 1}) as page:
        canvas = page.locator(f"{VIEW}.cell-area canvas")
        box = canvas.bounding_box()
        for query, key in ((7, 4), (5, 5), (9, 0)):
            at = {"x": box["width"] * (key + 0.5) / T, "y": box["height"] * (query + 0.5) / T}
            canvas.hover(position=at)
            found = value(page, "pattern", layer=2, head=1, query=query, key=key)
            assert found == pytest.approx(patterns[2, 1, query, key], rel=1e-4)
            tip = page.locator("#popover").inner_text()
            score = activations["blocks.2.attn.hook_attn_scores"][0, 1, query, key].item()
            assert "softmax(q·k × 1/√32)" in tip
            assert f"{score:.3g}".replace("-", "−").rstrip("0") in tip
        canvas.hover(position={"x": box["width"] * 8.5 / T, "y": box["height"] * 2.5 / T})
        assert "exp(−∞) = 0" in page.locator("#popover").inner_text()
        canvas.click(position={"x": 2, "y": box["height"] * 6.5 / T})
        assert page.evaluate("mlxGptPage.state.token") == 6


def test_keys_move_over_the_cells_and_flip_through_the_heads(tinyworld: LivingPage) -> None:
    patterns = patterns_of(tinyworld)
    T = patterns.shape[-1]
    with tinyworld.open({"view": "attention"}) as page:
        chosen = page.locator(f"{VIEW}[data-what=chosen-head]")
        assert chosen.get_attribute("aria-live") == "polite"
        for keys, layer, head in ((["ArrowRight"], 0, 1), (["ArrowDown", "ArrowDown"], 2, 1), (["ArrowLeft"], 2, 0)):
            for key in keys:
                page.keyboard.press(key)
            assert f"Layer {layer}, head {head}" in chosen.inner_text()
            assert_shades(page, patterns[layer, head], T - 1)
            pressed = page.locator(f"{VIEW}.thumbnail[aria-pressed=true]")
            assert pressed.get_attribute("data-layer") == str(layer)
        page.locator(f"{VIEW}.cell-area").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        found = numbers(page, "pattern")[0]
        assert (found["layer"], found["head"], found["query"]) == ("2", "0", str(T - 3))
        expected = patterns[2, 0, T - 3, int(found["key"])]
        assert float(found["value"]) == pytest.approx(expected, rel=1e-4)


def test_a_click_chooses_a_head_and_an_edited_head_is_marked(tinyworld: LivingPage) -> None:
    state = {"view": "attention", "heads": {"1.0": 0, "2.1": 0.5}}
    edits = {
        "blocks.1.attn.hook_z": lambda z, name: mx.concatenate([0 * z[:, :, :1], z[:, :, 1:]], axis=2),
        "blocks.2.attn.hook_z": lambda z, name: mx.concatenate([z[:, :, :1], 0.5 * z[:, :, 1:]], axis=2),
    }
    patterns = patterns_of(tinyworld, edits=edits)
    with tinyworld.open(state) as page:
        page.locator(f"{VIEW}.thumbnail[data-layer='5'][data-head='1']").click()
        assert page.evaluate("[mlxGptPage.state.layer, mlxGptPage.state.head]") == [5, 1]
        assert_shades(page, patterns[5, 1], patterns.shape[-1] - 1)
        assert_strongest(page, patterns, patterns.shape[-1] - 1)
        assert page.locator(f"{VIEW}.thumbnail.edited .name").all_inner_texts() == ["L1H0 ×0", "L2H1 ×0.5"]


def test_a_tap_shows_the_number_of_a_cell_and_the_next_one_elsewhere_hides_it(tinyworld: LivingPage) -> None:
    patterns = patterns_of(tinyworld)
    T = patterns.shape[-1]
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
    with tinyworld.open({"view": "attention", "layer": 1}, **phone) as page:
        canvas = page.locator(f"{VIEW}.cell-area canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        canvas.tap(position={"x": box["width"] * 2.5 / T, "y": box["height"] * 4.5 / T})
        found = value(page, "pattern", layer=1, head=0, query=4, key=2)
        assert found == pytest.approx(patterns[1, 0, 4, 2], rel=1e-4)
        assert "softmax" in page.locator("#popover").inner_text()
        page.locator(f"{VIEW}.read .token").first.tap()
        assert page.locator("#popover").count() == 0


def test_patterns_follow_the_theme(tinyworld: LivingPage) -> None:
    first_pixels = """all => all.map((drawn) => {
      const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      copy.drawImage(drawn, 0, 0);
      return [...copy.getImageData(0, 0, 1, 1).data];
    })"""
    with tinyworld.open({"view": "attention"}, color_scheme="light") as page:
        assert_strongest(page, patterns := patterns_of(tinyworld), patterns.shape[-1] - 1)
        for scheme, key in (("light", [0x1B, 0x7F, 0x5C, 255]), ("dark", [0x55, 0xC6, 0x9A, 255])):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            patterns_drawn = page.eval_on_selector_all(f"{VIEW}.frame canvas, {VIEW}.cell-area canvas", first_pixels)
            assert patterns_drawn == [key] * 13  # the first token has itself only: weight 1


@pytest.mark.parametrize("width", [360, 900, 1440])
def test_nothing_is_wider_than_the_page(tinyworld: LivingPage, width: int) -> None:
    with tinyworld.open({"view": "attention", "text": LONG}, viewport={"width": width, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        area = page.locator(f"{VIEW}.cell-area").bounding_box()
        assert area["x"] + area["width"] <= width
