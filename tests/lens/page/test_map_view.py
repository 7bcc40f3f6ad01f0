"""The map of a page: the model's diagram, where a click chooses a layer, a head or a view."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.lens_model import random_model
from helpers.living_page import LivingPage, settle

from mlx_gpt.text.tokenizer import Tokenizer

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def living(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> LivingPage:
    model = random_model(vocab_size=257, n_positions=60)
    return LivingPage(browser, tmp_path_factory.mktemp("page"), model, Tokenizer.bytes())


@pytest.fixture
def page(living: LivingPage) -> Iterator[Any]:
    with living.open({"view": "map"}) as page:
        yield page


def names(page: Any, kind: str) -> set[str]:
    return set(
        page.eval_on_selector_all(f".map [data-{kind}] title", "nodes => nodes.map(n => n.textContent.split(' ')[0])")
    )


def state(page: Any) -> dict[str, Any]:
    settle(page)
    return page.evaluate("() => mlxGptPage.state")


def test_a_row_chooses_a_layer_and_the_opened_block_takes_its_names(page: Any) -> None:
    assert {"h.0.attn.c_attn.weight", "wte.weight"} <= names(page, "parameter")
    page.click('.map [aria-label="Layer 2"]')
    assert state(page)["layer"] == 2
    assert {"h.2.attn.c_attn.weight", "wte.weight"} <= names(page, "parameter")
    assert {"blocks.2.attn.hook_q", "hook_embed", "blocks.2.hook_resid_mid"} <= names(page, "activation")
    assert page.get_attribute('.map [aria-label="Layer 2"]', "aria-pressed") == "true"
    assert page.get_attribute('.map [aria-label="Layer 0"]', "aria-pressed") == "false"
    row = page.locator('.map [aria-label="Layer 2"] rect').first
    assert page.locator(".map .d-zoom").first.get_attribute("d").split("L")[0].split()[1] == row.get_attribute("y")


@pytest.mark.parametrize("key", ["Enter", " "])
def test_the_keyboard_chooses_a_head_and_opens_it(page: Any, key: str) -> None:
    page.focus('.map [aria-label="Head 3"]')
    page.keyboard.press(key)
    assert (state(page)["head"], state(page)["view"]) == (3, "head")
    assert page.is_visible("#view-head")


@pytest.mark.parametrize(
    ("heading", "view"), [("Attention", "attention"), ("Unembedding", "lens"), ("MLP (gelu_new)", "stream")]
)
def test_the_heading_of_a_part_opens_its_view(page: Any, heading: str, view: str) -> None:
    page.click(f'.map [aria-label="{heading}: open the view"]')
    assert state(page)["view"] == view
    assert page.is_visible(f"#view-{view}")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1400, "light")])
def test_it_scrolls_inside_the_page_and_has_its_colors(living: LivingPage, width: int, scheme: str) -> None:
    with living.open({"view": "map"}, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        line = "getComputedStyle(document.querySelector('.map .d-wide')).stroke"
        page.evaluate("() => document.body.append(Object.assign(document.createElement('i'), {id: 'probe'}))")
        page.evaluate("() => document.getElementById('probe').style.setProperty('color', 'var(--stream)')")
        assert page.evaluate(line) == page.evaluate("getComputedStyle(document.getElementById('probe')).color")
