"""The map leads from the whole model to any number of any activation, Python's, and shows what it is made of."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens
from mlx_gpt.lens.names import ActivationNames, has_heads, is_attention_map

pytestmark = pytest.mark.browser
LONG = "One sunny morning, Lily went to the garden and saw a big red ball near the old tree. " * 8
HEAD = 1


def activations_of(opened: LivingPage, text: str = TEXT) -> dict[str, np.ndarray]:
    """Return the activations that the map offers, without the axis of a batch."""
    ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
    names = ActivationNames(opened.model.config)
    wanted = [name for name in [*names.stored, *names.by_name] if not name.endswith("hook_in")]
    _, activations = lens.trace(opened.model, [ids], names=wanted)
    return {name: np.array(activations[name][0]) for name in wanted}


def matrix(name: str, activation: np.ndarray) -> np.ndarray:
    """Return the rows and columns that are shown of an activation: those of one head where it has heads."""
    if not has_heads(name):
        return activation
    return activation[HEAD] if is_attention_map(name) else activation[:, HEAD]


def go(page: Any, place: str, cell: Any = None) -> None:
    layer = re.match(r"blocks\.(\d+)", place)
    state = {"zoom": place, "cell": cell, "head": HEAD} | ({"layer": int(layer[1])} if layer else {})
    page.evaluate("(state) => mlxGptPage.set(state)", state)


def crumbs(page: Any) -> list[str]:
    return page.eval_on_selector_all("[data-crumb]", "all => all.map(x => x.textContent)")


@pytest.mark.parametrize("text", [TEXT, "Ben"], ids=["ten tokens", "one token"])
def test_every_activation_is_python_s_and_its_formula_gives_its_value(tinyworld: LivingPage, text: str) -> None:
    random = np.random.default_rng(0)
    activations = activations_of(tinyworld, text)
    with tinyworld.open({"view": "map", "text": text}) as page:
        offered = page.eval_on_selector_all("#map-activation option", "all => all.map(x => x.value)")
        assert {*offered} == {"", *activations}
        for name, activation in activations.items():
            if re.match(r"blocks\.[1245]\.", name):
                continue
            shown = matrix(name, activation)
            row = int(random.integers(shown.shape[0]))
            column = int(random.integers(row + 1 if is_attention_map(name) else shown.shape[1]))
            go(page, name, [row, column])
            size = float(np.abs(shown[np.isfinite(shown)]).max())
            found = value(page, "number", name=name)
            assert found == pytest.approx(shown[row, column], rel=1e-4, abs=1e-5 * size), name
            shape = " × ".join(map(str, activation.shape))
            assert page.locator("[data-what=shape]").inner_text().startswith(f"{shape} (")
            filled = page.locator("[data-what=filled]").inner_text().replace("−", "-")
            result = float(re.split(r" = |^", filled.splitlines()[-1])[-1])
            assert result == pytest.approx(shown[row, column], rel=6e-3, abs=2e-3), f"{name}: {filled}"


def test_a_key_of_the_future_has_no_score(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "map"}) as page:
        go(page, "blocks.2.attn.hook_attn_scores", [3, 7])
        assert value(page, "number", index="1,3,7") == -np.inf
        assert "future" in page.locator("[data-what=filled]").inner_text()


def test_clicks_lead_from_the_stack_to_one_number_and_back(tinyworld: LivingPage) -> None:
    activations = activations_of(tinyworld)
    pattern = activations["blocks.3.attn.hook_pattern"][1]
    with tinyworld.open({"view": "map"}) as page:
        for place in ("blocks.3", "blocks.3.attn", "blocks.3.attn.head.1", "blocks.3.attn.hook_pattern"):
            page.click(f'[data-go="{place}"]')
        assert crumbs(page) == ["Stack", "Block 3", "Attention", "Head 1", "hook_pattern"]
        heat = page.locator("[data-what=activation]")
        heat.scroll_into_view_if_needed()
        box = heat.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 4.5 / 10, box["y"] + box["height"] * 6.5 / 10)
        assert value(page, "number", index="1,6,4") == pytest.approx(pattern[6, 4], rel=1e-4)
        assert "“␣to” looks at “␣Lily”" in page.locator(".detail").inner_text()
        page.click('[data-crumb="blocks.3"]')
        assert crumbs(page) == ["Stack", "Block 3"]
        norm = np.linalg.norm(activations["blocks.3.hook_mlp_out"][-1])
        assert value(page, "part-norm", part="blocks.3.mlp") == pytest.approx(norm, rel=1e-4)


def test_the_keyboard_chooses_numbers_and_goes_back(tinyworld: LivingPage) -> None:
    q = activations_of(tinyworld)["blocks.2.attn.hook_q"][:, HEAD]
    with tinyworld.open({"view": "map", "layer": 2, "head": HEAD, "zoom": "blocks.2.attn.hook_q"}) as page:
        heat = page.locator("[data-what=activation]")
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
            heat.press(key)
        assert float(heat.get_attribute("data-value")) == pytest.approx(q[2, -1], rel=1e-4)
        assert "hook_q[token 2, head 1, number 31]" in page.locator("#popover").inner_text()
        page.keyboard.press("Enter")
        assert value(page, "number", index="2,1,31") == pytest.approx(q[2, -1], rel=1e-4)
        assert page.evaluate("mlxGptPage.state.head") == HEAD  # arrows stay in the heat map
        norm = page.locator("[data-what=row-norm]")
        norm.press("ArrowDown")
        row = int(norm.get_attribute("data-row"))
        assert float(norm.get_attribute("data-value")) == pytest.approx(np.linalg.norm(q[row]), rel=1e-4)
        page.keyboard.press("Escape")  # closes the popover
        for depth in (5, 4, 3, 2, 1, 1):
            page.keyboard.press("Escape")
            assert page.locator("[data-what=number]").is_visible() is False
            assert len(crumbs(page)) == depth


@pytest.mark.parametrize("how", ["click", "Enter"])
def test_a_box_of_the_diagram_leads_to_its_activation(tinyworld: LivingPage, how: str) -> None:
    post = activations_of(tinyworld)["blocks.2.mlp.hook_post"]
    with tinyworld.open({"view": "map", "layer": 2}, viewport={"width": 1440, "height": 1400}) as page:
        box = page.locator('.map [data-activation="blocks.0.mlp.hook_post"]')
        assert (box.text_content() or "").endswith("10×64")
        box.click() if how == "click" else box.press(how)
        assert crumbs(page) == ["Stack", "Block 2", "MLP", "hook_post"]
        for name, number in (("min", post.min()), ("mean", post.mean()), ("max", post.max())):
            assert value(page, f"activation-{name}") == pytest.approx(number, rel=1e-4, abs=1e-6)
        assert page.locator('.map a.chosen[data-activation="blocks.0.mlp.hook_post"]').count() == 1
        assert "Block 2" in (page.locator(".map").text_content() or "")


def test_another_text_changes_the_number_in_place(tinyworld: LivingPage) -> None:
    state = {"view": "map", "zoom": "blocks.1.hook_resid_post", "layer": 1, "cell": [2, 5]}
    with tinyworld.open(state) as page:
        page.fill("#text", LONG)
        settle(page)
        expected = activations_of(tinyworld, LONG)["blocks.1.hook_resid_post"]
        assert len(expected) == 144
        assert value(page, "number", index="2,5") == pytest.approx(expected[2, 5], rel=1e-4)
        page.fill("#text", "Ben")
        settle(page)
        assert page.locator("[data-what=number]").count() == 0  # that row is gone
        page.fill("#text", "")
        page.fill("#text", "Ben went home")
        settle(page)


@pytest.mark.parametrize("zoom", ["", "blocks.3", "blocks.3.attn.head.1", "blocks.3.attn.hook_pattern", "hook_unembed"])
@pytest.mark.parametrize("width", [360, 1440])
def test_the_map_fits_its_width(tinyworld: LivingPage, width: int, zoom: str) -> None:
    state = {"view": "map", "zoom": zoom, "layer": 3, "head": 1, "cell": [2, 1], "text": LONG}
    with tinyworld.open(state, viewport={"width": width, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        parts = page.eval_on_selector_all("#view-map .chart, #view-map .map", "all => all.map(x => x.scrollWidth)")
        assert max(parts) <= width
