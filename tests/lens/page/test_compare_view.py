"""Two pinned states beside each other have the numbers of Python's lens; a link restores pins and all else."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import OTHER, TEXT, LivingPage, settle, value

from mlx_gpt import lens

pytestmark = pytest.mark.browser
HEADS = {"heads": {"3.1": 0.5}}
EDITS = {"blocks.3.attn.hook_z": lambda z, name: z * mx.array([[1.0], [0.5]])}


def press(page: Any, action: str, name: str) -> None:
    page.get_by_role("button", name=f"{action} {name}", exact=True).click()
    settle(page)
    page.wait_for_function("() => !document.querySelector('.compare').hidden")


def assert_compared(
    page: Any, opened: LivingPage, sides: list[tuple[str, Any]], layer: int, head: int, rel: float = 1e-4
) -> None:
    """Assert the numbers of both sides, each a text and edits, after their last tokens."""
    ids = [opened.tokenizer.encode_prompt(text) for text, _ in sides]
    runs = [lens.trace(opened.model, [i], edits) for i, (_, edits) in zip(ids, sides, strict=True)]
    p, q = (np.array(mx.softmax(logits[0, -1], axis=-1, precise=True)) for logits, _ in runs)
    for name, expected in (("compare-a", p), ("compare-b", q)):
        ids_shown = page.eval_on_selector_all(f"[data-what={name}]", "all => all.map(x => x.dataset.id)")
        shown = [int(i) for i in ids_shown]
        assert {*np.argsort(-expected)[:6].tolist()} <= {*shown}
        found = [value(page, name, id=i) for i in shown]
        np.testing.assert_allclose(found, expected[shown], rtol=rel, atol=1e-6)
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(6)] + ["blocks.5.hook_resid_post"]
    for side, (_, activations) in zip("AB", runs, strict=True):
        expected = [mx.linalg.norm(activations[name][0, -1]).item() for name in streams]
        assert [value(page, "norm", side=side, layer=i) for i in range(7)] == pytest.approx(expected, rel=rel)
    patterns = [np.array(activations[f"blocks.{layer}.attn.hook_pattern"][0, head]) for _, activations in runs]
    T = min(map(len, ids))
    expected = [*patterns, patterns[1][:T, :T] - patterns[0][:T, :T]]
    for side, pattern in zip(("A", "B", "difference"), expected, strict=True):
        cell = page.locator(f"[data-what=compare-pattern][data-side={side}]")
        cell.focus()
        for query, key in ((0, 0), (1, 0), (T - 1, 2)):
            page.keyboard.press("Home")
            for _ in range(T):
                page.keyboard.press("ArrowUp")
            for _ in range(query):
                page.keyboard.press("ArrowDown")
            for _ in range(key):
                page.keyboard.press("ArrowRight")
            assert float(cell.get_attribute("data-value")) == pytest.approx(pattern[query, key], rel=rel, abs=1e-6)


def test_a_pin_is_compared_with_the_page_as_it_is_and_with_another_pin(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "compare"}) as page:
        press(page, "Pin", "A")
        page.fill("#text", OTHER)
        settle(page)
        assert_compared(page, tinyworld, [(TEXT, None), (OTHER, None)], 0, 0)
        page.evaluate("mlxGptPage.scale('heads', '3.1', 0.5)")
        settle(page)
        press(page, "Pin", "B")
        page.click("#tab-change")
        page.click("#reset")
        page.fill("#text", "Something else")
        page.click("#tab-compare")
        settle(page)
        page.select_option("#compare-layer", "4")
        page.select_option("#compare-head", "1")
        assert page.locator("[data-what=edits-B]").inner_text() == "L3H1 × 0.5"
        assert_compared(page, tinyworld, [(TEXT, None), (OTHER, EDITS)], 4, 1)


def test_a_pin_is_restored_and_removed(tinyworld: LivingPage) -> None:
    state = {"view": "compare", "pins": [None, {"text": OTHER, **HEADS, "temperature": 0.3}]}
    with tinyworld.open(state) as page:
        press(page, "Restore", "B")
        assert page.input_value("#text") == OTHER
        restored = page.evaluate("mlxGptPage.state")
        assert restored["heads"] == {"3.1": 0.5}
        assert restored["temperature"] == 0.3
        assert restored["view"] == "compare"
        press(page, "Unpin", "B")
        assert page.evaluate("mlxGptPage.state.pins") == []
        assert page.locator("[data-what=edits-B]").inner_text() == "not pinned; L3H1 × 0.5"


def test_tokens_that_differ_are_marked_and_a_press_selects_their_position(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "compare", "pins": [{}, {"text": OTHER}]}) as page:
        page.wait_for_function("() => document.querySelector('.pair')")
        a, b = (tinyworld.tokenizer.encode_prompt(text) for text in (TEXT, OTHER))
        marked = page.eval_on_selector_all(".pair.differs", "all => all.map(x => Number(x.dataset.position))")
        assert marked == [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        page.locator(".pair").nth(4).click()
        assert page.evaluate("mlxGptPage.state.token") == 4


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_copied_link_restores_the_state(tinyworld: LivingPage, clipboard: bool) -> None:
    state = {
        "text": "Ben & “Zoë” 🙂 #1 <b>", "other": OTHER, "view": "change", "layer": 2, "head": 1, "token": 3, "seed": 9,
        "mlps": {"2": -1.5}, "patch": {"layer": 1, "position": 2}, "topK": 7, "pins": [{**HEADS}, None],
    } | HEADS  # fmt: skip
    with tinyworld.open() as page:
        if clipboard:
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        else:
            page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.evaluate("state => mlxGptPage.set(mlxGptPage.checked(state))", state)
        settle(page)
        page.click("#copy-link")
        page.wait_for_function("() => document.querySelector('[data-what=copied]').textContent")
        link = page.evaluate("navigator.clipboard.readText()") if clipboard else page.input_value("#link")
        assert page.locator("#link").is_visible() != clipboard
        wanted = page.evaluate("mlxGptPage.state")
    assert "<b>" not in link
    assert "🙂" in unquote(link)
    with tinyworld.open(link=link.partition("#")[2]) as page:
        opened = page.evaluate("mlxGptPage.state")
        initial = page.evaluate("mlxGptPage.initial")
    assert opened == {**wanted, "pins": [{**initial, **HEADS}, None]}


def test_many_changes_are_written_to_the_address_as_one(tinyworld: LivingPage) -> None:
    with tinyworld.open() as page:
        for i in range(250):
            page.evaluate("seed => mlxGptPage.set({ seed })", i)
        page.wait_for_timeout(600)
        assert '{"seed":249}' in unquote(page.url)


def test_equal_states_differ_nowhere(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "compare", "pins": [{**HEADS}, {**HEADS, "seed": 1}]}) as page:
        page.wait_for_function("() => !document.querySelector('.compare').hidden")
        assert value(page, "compare-divergence") == 0
        shown = page.locator(".difference td:last-child").all_inner_texts()
        assert len(shown) > 6
        assert {*shown} == {"0"}


def test_comparing_says_so_where_a_text_is_empty(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "compare", "pins": [{"text": ""}, None]}) as page:
        page.wait_for_function("() => document.querySelector('[data-what=edits-A]').textContent === 'An empty text.'")
        assert page.locator(".compare").is_hidden()


def test_recorded_texts_are_compared(recorded: LivingPage) -> None:
    state = {"view": "compare", "pins": [{"text": TEXT}, {"text": OTHER, "heads": {"0.0": 0}}], "other": "unknown"}
    with recorded.open(state) as page:
        page.wait_for_function("() => !document.querySelector('.compare').hidden")
        assert_compared(page, recorded, [(TEXT, None), (OTHER, None)], 0, 0, rel=3e-3)  # recorded in float16
        assert "Only the 50 most probable tokens are recorded by name" in page.locator(".compare").inner_text()
        assert page.locator("[data-what=edits-B]").inner_text() == "no edits"
