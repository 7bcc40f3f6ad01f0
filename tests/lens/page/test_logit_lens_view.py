"""The view of the logit lens shows what the model would predict after each layer, with Python's probabilities."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens

pytestmark = pytest.mark.browser
LONG = "One sunny morning, Lily went to the garden and saw a big red ball near the old tree. " * 8
Probabilities = np.ndarray  # (n_layer + 1, T, V)


def probabilities(opened: LivingPage, text: str = TEXT, edits: Any = None) -> Probabilities:
    ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
    _, activations = lens.trace(opened.model, [ids], edits)
    logits = lens.logit_lens(opened.model, activations)[:, 0].astype(mx.float32)
    return np.array(mx.softmax(logits, axis=-1, precise=True))


def cells(page: Any, mode: str, rows: int) -> list[dict[str, str]]:
    """Return the data of the cells, when the rows that are on the screen are read."""
    selector = f"td[data-what=lens-{mode}]"
    page.wait_for_function("([s, n]) => document.querySelectorAll(s).length >= n", arg=[selector, rows * 7])
    return page.eval_on_selector_all(selector, "all => all.map(x => ({...x.dataset}))")


def place(cell: dict[str, str]) -> tuple[int, int]:
    return int(cell["layer"]), int(cell["position"])


def assert_top(page: Any, expected: Probabilities, rows: int) -> None:
    found = cells(page, "top", rows)
    assert len(found) >= 7 * rows
    for cell in found:
        here = expected[place(cell)]
        assert float(cell["value"]) == pytest.approx(here.max(), rel=1e-4)
        assert here[int(cell["id"])] == pytest.approx(here.max(), rel=1e-4)


@pytest.mark.parametrize("text", [TEXT, "Ben", "<b>Ben</b>\u202e\n"], ids=["ten tokens", "one token", "odd characters"])
def test_each_cell_holds_the_most_probable_token(tinyworld: LivingPage, text: str) -> None:
    expected = probabilities(tinyworld, text)
    with tinyworld.open({"view": "lens", "text": text}) as page:
        assert_top(page, expected, expected.shape[1])


def test_only_rows_on_the_screen_are_read(tinyworld: LivingPage) -> None:
    expected = probabilities(tinyworld, LONG)
    with tinyworld.open({"view": "lens", "text": LONG}, viewport={"width": 900, "height": 600}) as page:
        found = cells(page, "top", 10)
        assert len(found) < 144 * 7
        assert_top(page, expected, 10)
        page.locator('tr[data-position="143"]').scroll_into_view_if_needed()
        page.wait_for_selector('td[data-position="143"]')
        assert value(page, "lens-top", position=143, layer=6) == pytest.approx(expected[6, 143].max(), rel=1e-4)


def test_probability_and_rank_of_the_final_prediction_are_alternatives(tinyworld: LivingPage) -> None:
    expected = probabilities(tinyworld)
    final = expected[-1].argmax(axis=-1)
    with tinyworld.open({"view": "lens"}) as page:
        page.select_option("#lens-mode", "p")
        for cell in cells(page, "p", 10):
            layer, position = place(cell)
            assert float(cell["value"]) == pytest.approx(expected[layer, position, final[position]], rel=1e-4)
        page.select_option("#lens-mode", "rank")
        for cell in cells(page, "rank", 10):
            layer, position = place(cell)
            here = expected[layer, position]
            assert int(cell["value"]) == 1 + (here > here[final[position]]).sum()


def assert_popover(page: Any, expected: np.ndarray) -> None:
    found = page.eval_on_selector_all("[data-what=lens-token]", "all => all.map(x => ({...x.dataset}))")
    np.testing.assert_allclose([float(token["value"]) for token in found], np.sort(expected)[:-6:-1], rtol=1e-4)
    for token in found:
        assert expected[int(token["id"])] == pytest.approx(float(token["value"]), rel=1e-4)
    assert "softmax(W_U · LN_f(x))" in page.locator("#popover").inner_text()


def test_hover_and_arrows_open_the_top_five(tinyworld: LivingPage) -> None:
    expected = probabilities(tinyworld)
    with tinyworld.open({"view": "lens"}) as page:
        cells(page, "top", 10)
        page.hover('td[data-layer="3"][data-position="4"]')
        assert_popover(page, expected[3, 4])
        page.mouse.move(1, 1)
        page.locator("#lens-mode").focus()
        page.keyboard.press("Tab")
        assert_popover(page, expected[6, 9])  # the last token's prediction
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowLeft")
        assert_popover(page, expected[5, 8])
        page.keyboard.press("Escape")
        assert page.locator("#popover").count() == 0


@pytest.mark.parametrize("how", ["click", "Enter"])
def test_a_cell_selects_its_token(tinyworld: LivingPage, how: str) -> None:
    with tinyworld.open({"view": "lens"}) as page:
        cells(page, "top", 10)
        cell = page.locator('td[data-layer="2"][data-position="4"]')
        cell.click() if how == "click" else (cell.focus(), page.keyboard.press(how))
        assert page.evaluate("mlxGptPage.state.token") == 4
        assert page.locator('tr[data-position="4"]').get_attribute("aria-selected") == "true"


def test_typing_and_knocking_out_change_the_table(tinyworld: LivingPage) -> None:
    longer = f"{TEXT} She"
    with tinyworld.open({"view": "lens"}) as page:
        cells(page, "top", 10)
        page.locator("#text").press("End")
        page.locator("#text").type(" She")
        settle(page)
        page.wait_for_selector('td[data-position="10"]')
        assert_top(page, probabilities(tinyworld, longer), 11)
        page.evaluate("mlxGptPage.scale('mlps', '4', 0)")
        settle(page)
        edits = {"blocks.4.hook_mlp_out": lambda x, name: x * 0}
        assert_top(page, probabilities(tinyworld, longer, edits), 11)
