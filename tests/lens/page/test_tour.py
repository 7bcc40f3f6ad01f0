"""The guided tour: eight steps that tell the explanation with this model's numbers, by buttons and by link."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from helpers.browser import open_page

from mlx_gpt import load
from mlx_gpt.lens import trace
from mlx_gpt.lens.page import make_page

FOLDER = Path(__file__).parents[3] / "weights" / "tinyworld"
TEXT = "One sunny morning, Lily went to the garden."
VIEWS = ["stream", "head", "head", "attention", "head", "attention", "lens", "change"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tour") / "page.html"
    file.write_text(make_page(*load(FOLDER), [TEXT], "tinyworld")[0], encoding="utf-8")
    return file


def state(page: Any, name: str) -> Any:
    return page.evaluate(f"mlxGptPage.state.{name}")


def test_it_tells_eight_steps_with_the_pattern_s_numbers(browser: Any, file: Path) -> None:
    model, tokenizer = load(FOLDER)
    _, activations = trace(model, [tokenizer.encode_prompt(TEXT)], names="blocks.*.attn.hook_pattern")
    with open_page(browser, file) as page:
        page.get_by_role("button", name="Guided tour").click()
        for step, view in enumerate(VIEWS):
            page.get_by_text(f"step {step + 1} of 8").wait_for()
            assert state(page, "view") == view
            if view == "head":  # at the step of the view that it speaks of, of the two tokens it names
                current = page.locator(".steps > li[aria-current=step] h3").inner_text()
                assert current == {1: "Queries ask, keys answer", 2: "Mask", 4: "Values move"}[step]
                assert int(page.locator("#head-key").input_value()) == state(page, "key")
            if step == 3:  # the pattern weighs
                said = page.locator("[data-what=tour]").inner_text()
                layer, head, query = state(page, "layer"), state(page, "head"), state(page, "token")
                weight = activations[f"blocks.{layer}.attn.hook_pattern"][0, head, query, 1 : query - 1].max().item()
                (percent,) = re.findall(r"(\d+) %", said)
                assert abs(float(percent) - 100 * weight) < 0.51
            page.get_by_role("button", name="Finish" if step == 7 else "Next", exact=True).click()
        page.get_by_role("button", name="Guided tour").wait_for()
        assert state(page, "tour") is None


def test_a_link_restores_key_and_step_of_one_head(browser: Any, file: Path) -> None:
    link = "#" + quote(json.dumps({"view": "head", "layer": 3, "token": 5, "key": 2, "step": 3}))
    with open_page(browser, file, link) as page:
        page.get_by_text("Step 4 of 6").wait_for()
        assert page.locator("#head-key").input_value() == "2"
        page.keyboard.press("ArrowRight")  # another head: its own strongest key
        assert state(page, "key") is None


def test_a_link_opens_a_step_and_back_goes_to_the_one_before(browser: Any, file: Path) -> None:
    with open_page(browser, file, "#%7B%22tour%22%3A4%7D") as page:
        page.get_by_text("step 5 of 8").wait_for()
        page.get_by_role("button", name="Back", exact=True).click()
        page.get_by_text("step 4 of 8").wait_for()
        assert page.evaluate("document.activeElement.textContent") == "Back"
        page.get_by_role("button", name="End the tour").click()
        assert page.get_by_text("step 4 of 8").is_hidden()


@pytest.mark.parametrize("text", ["", "Lily", "x" * 2000])
def test_it_takes_any_text(text: str, browser: Any, file: Path) -> None:
    with open_page(browser, file) as page:
        page.locator("#text").fill(text)
        page.get_by_role("button", name="Guided tour").click()
        for _ in VIEWS[1:] if text else ():
            page.get_by_role("button", name="Next", exact=True).click()
        assert "NaN" not in page.locator("#page").inner_text()
