"""What knocking out, scaling and patching change in the page, and the text it generates, are those of Python's lens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens
from mlx_gpt.train.loss import mean_loss

pytestmark = pytest.mark.browser
OTHER = "One sunny morning, Tom went to the garden."
H = 2
Edits = dict[str, Callable]


def head(layer: int, head: int, factor: float = 0) -> Edits:
    scale = mx.where(mx.arange(H) == head, factor, 1)[:, None]
    return {f"blocks.{layer}.attn.hook_z": lambda z, name: z * scale}


def mlp(layer: int, factor: float = 0) -> Edits:
    return {f"blocks.{layer}.hook_mlp_out": lambda x, name: x * factor}


def ids_of(opened: LivingPage, text: str = TEXT) -> list[int]:
    return opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]


def patch(opened: LivingPage, layer: int, position: int, other: str = OTHER) -> Edits:
    name = f"blocks.{layer}.hook_resid_pre"
    _, source = lens.trace(opened.model, [ids_of(opened, other)], names=name)

    def edit(x: mx.array, name: str) -> mx.array:
        if x.shape[1] > position:
            x[:, position] = source[name][:, position]
        return x

    return {name: edit}


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def assert_effect(page: Any, opened: LivingPage, edits: Edits, text: str = TEXT) -> None:
    """Assert that probabilities, divergence and losses are those of Python with these edits."""
    settle(page)
    ids = mx.array([ids_of(opened, text)])
    before, after = (lens.trace(opened.model, ids, e, ())[0] for e in ({}, edits))
    p, q = (softmax(np.array(x[0, -1], np.float64)) for x in (before, after))
    shown = [int(x) for x in page.eval_on_selector_all("[data-what=effect-a]", "all => all.map(x => x.dataset.id)")]
    assert set(shown) == {*np.argsort(-p)[:6].tolist(), *np.argsort(-q)[:6].tolist()}
    for name, expected in (("effect-a", p), ("effect-b", q), ("effect-difference", q - p)):
        found = [value(page, name, id=i) for i in shown]
        atol = 3e-5 if name == "effect-difference" else 1e-6  # of probabilities up to 1
        np.testing.assert_allclose(found, expected[shown], rtol=1e-4, atol=atol)
    assert value(page, "effect-divergence") == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-3, abs=1e-6)
    if len(ids[0]) > 1:
        for name, logits in (("loss-before", before), ("loss-after", after)):
            assert value(page, name) == pytest.approx(mean_loss(logits[:, :-1], ids[:, 1:]).item(), rel=1e-4)


def switch(page: Any, part: str) -> Any:
    return page.locator(f'[data-part="{part}"]')


def test_a_click_knocks_out_a_head_and_another_brings_it_back(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change"}) as page:
        switch(page, "L3H1").click()
        assert switch(page, "L3H1").inner_text() == "off"
        assert_effect(page, tinyworld, head(3, 1))
        switch(page, "MLP 0").click()
        assert_effect(page, tinyworld, head(3, 1) | mlp(0))
        assert page.locator("[data-what=edits]").inner_text() == "L3H1 knocked out, MLP 0 knocked out"
        switch(page, "MLP 0").click()
        assert_effect(page, tinyworld, head(3, 1))
        page.click("#reset")
        settle(page)
        assert page.evaluate("mlxGptPage.edited") is None
        assert switch(page, "L3H1").get_attribute("aria-pressed") == "false"


def test_the_slider_and_the_field_scale_the_chosen_part(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change", "layer": 2, "head": 1}) as page:
        page.locator("#factor").press("End")
        assert_effect(page, tinyworld, head(2, 1, 2))
        for _ in range(10):
            page.locator("#factor").press("ArrowLeft")
        assert page.locator("[data-what=edits]").inner_text() == "L2H1 × 1.5"
        assert_effect(page, tinyworld, head(2, 1, 1.5))
        switch(page, "MLP 4").click()
        page.fill("#factor-typed", "-1.5")
        assert_effect(page, tinyworld, head(2, 1, 1.5) | mlp(4, -1.5))
        page.fill("#factor-typed", "99")
        assert_effect(page, tinyworld, head(2, 1, 1.5) | mlp(4, -1.5))


def test_the_keyboard_reaches_and_presses_every_switch(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change"}) as page:
        switch(page, "L0H0").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.part") == "MLP 2"
        page.keyboard.press("Enter")
        assert_effect(page, tinyworld, mlp(2))
        assert page.evaluate("document.activeElement.dataset.part") == "MLP 2"


def generated(page: Any, title: str) -> list[int]:
    return page.eval_on_selector_all(f'[data-title="{title}"] span', "all => all.map(x => Number(x.dataset.id))")


def finish(page: Any) -> None:
    page.wait_for_function("() => document.getElementById('generate').textContent === 'Generate'")


def test_greedy_text_with_and_without_edits_is_pythons(tinyworld: LivingPage) -> None:
    edits = head(3, 1) | patch(tinyworld, 2, 4)
    state = {
        "view": "change",
        "temperature": 0,
        "heads": {"3.1": 0},
        "other": OTHER,
        "patch": {"layer": 2, "position": 4},
    }
    with tinyworld.open(state) as page:
        page.click("#generate")
        finish(page)
        texts = [generated(page, title) for title in ("Unchanged", "With the edits")]
        differs = page.eval_on_selector_all(
            '[data-title="Unchanged"] span', "all => all.map(x => x.className === 'differs')"
        )
    for found, e in zip(texts, ({}, edits), strict=True):
        assert found == lens.generate(tinyworld.model, [ids_of(tinyworld)], 20, edits=e)[0].tolist()
    assert differs == [a != b for a, b in zip(*texts, strict=True)]
    assert any(differs)


def test_a_sampled_text_is_the_one_sampled_token_by_token_and_can_be_stopped(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change", "temperature": 1.2, "seed": 3}) as page:
        page.click("#generate")
        finish(page)
        at_once = generated(page, "Unchanged")
        for _ in range(5):
            page.click("#sample")
            settle(page)
        assert page.evaluate("mlxGptPage.run.ids.slice(-5)") == at_once[:5]
        assert generated(page, "Unchanged") == []  # that of another text
        page.select_option("#length", "160")
        page.click("#generate")
        page.wait_for_function("() => document.querySelectorAll('[data-what=generated] span').length > 2")
        page.click("#generate")
        count = len(generated(page, "Unchanged"))
        page.wait_for_timeout(200)
        assert len(generated(page, "Unchanged")) == count < 100


def test_a_pressed_cell_patches_that_position_from_the_second_text(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change"}) as page:
        page.fill("#other", OTHER)
        settle(page)
        cell = page.locator("[data-layer='0'][data-position='4'].switch")
        cell.click()
        assert_effect(page, tinyworld, patch(tinyworld, 0, 4))
        assert page.evaluate("mlxGptPage.state.patch") == {"layer": 0, "position": 4}
        first, second, edited = (value(page, f"logit-difference-{name}") for name in ("first", "second", "edited"))
        assert first < 0 < second == pytest.approx(edited, rel=1e-5)  # the texts differ in this token only
        cell.click()
        settle(page)
        assert page.evaluate("mlxGptPage.edited") is None
        page.fill("#other", "")
        settle(page)
        assert page.locator(".patches").is_hidden()


def finish_sweep(page: Any, name: str) -> None:
    page.wait_for_function(f"() => document.getElementById('{name}').textContent !== 'Stop'")


def test_the_loss_without_each_head_is_that_of_ablate_heads(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change"}) as page:
        page.click("#sweep-parts")
        finish_sweep(page, "sweep-parts")
        ids = [ids_of(tinyworld)]
        expected = lens.ablate_heads(tinyworld.model, ids)
        for layer, row in enumerate(expected.tolist()):
            for i, rise in enumerate(row):
                assert value(page, "ablated", name=f"{layer}.{i}") == pytest.approx(rise, rel=1e-4, abs=2e-6)
        loss, without = (
            mean_loss(lens.trace(tinyworld.model, ids, e, ())[0][:, :-1], mx.array(ids)[:, 1:]) for e in ({}, mlp(3))
        )
        assert value(page, "ablated", name="3") == pytest.approx((without - loss).item(), rel=1e-4, abs=2e-6)


def test_the_logit_difference_with_each_patch_is_that_of_activation_patching(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change", "other": OTHER}) as page:
        page.click("#sweep-patches")
        finish_sweep(page, "sweep-patches")
        clean, corrupted = ids_of(tinyworld, OTHER), ids_of(tinyworld)
        right = mx.argmax(lens.trace(tinyworld.model, [clean], (), ())[0][0, -1]).item()
        order = np.argsort(-np.array(lens.trace(tinyworld.model, [corrupted], (), ())[0][0, -1]))
        wrong = next(int(i) for i in order if i != right)
        metric = lens.logit_difference(right, wrong)
        expected = np.array(lens.activation_patching(tinyworld.model, [clean], [corrupted], metric))
        found = [[value(page, "patched", layer=layer, position=p) for p in range(len(clean))] for layer in range(6)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_without_each_head_is_that_of_the_edited_model(tinyworld: LivingPage) -> None:
    with tinyworld.open({"view": "change", "heads": {"3.0": 0}, "mlps": {"2": 0.5}}) as page:
        page.click("#sweep-parts")
        finish_sweep(page, "sweep-parts")
        edits = head(3, 0) | mlp(2, 0.5)
        expected = lens.ablate_heads(tinyworld.model, [ids_of(tinyworld)], edits=edits)
        for layer, row in enumerate(expected.tolist()):
            for i, rise in enumerate(row):
                assert value(page, "ablated", name=f"{layer}.{i}") == pytest.approx(rise, rel=1e-4, abs=2e-6)
        assert value(page, "ablated", name="3.0") == 0
        switch(page, "L1H0").click()
        settle(page)
        assert page.locator("[data-what=ablated]:visible").count() == 0


@pytest.mark.parametrize("text", ["Lily", ""])
def test_a_sweep_ends_when_the_text_changes(tinyworld: LivingPage, text: str) -> None:
    with tinyworld.open({"view": "change", "text": "Lily went to the garden. " * 20}) as page:
        page.click("#sweep-parts")
        page.fill("#text", text)
        settle(page)
        page.fill("#text", "Tom")
        settle(page)
        assert page.inner_text("#sweep-parts") == "Loss without each part"
        assert page.locator("[data-what=ablated]:visible").count() == 0


HOSTILE = [
    {"heads": {"9.9": 0}, "mlps": {"-1": 2}, "patch": {"layer": 99, "position": -1}},
    {"heads": [1], "mlps": "x", "patch": [], "temperature": "hot", "topK": 1e99, "topP": -1, "seed": 1.5},
    {"heads": {"3.1": 1e300}, "mlps": {"0": None}, "temperature": -3, "pins": {"a": 1}},
    {"heads": {"__proto__": 1, "3.1": "0"}, "patch": {"layer": 2, "position": 143}, "other": 5},
    {"pins": [None, 5, "x", {"text": 7, "pins": [[]]}], "view": "change", "text": None, "other": "x" * 30000},
    [1, 2],
    "text",
]


@pytest.mark.parametrize("state", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("view", ["change", "compare"])
def test_a_hostile_link_leaves_the_page_working(tinyworld: LivingPage, view: str, state: Any) -> None:
    with tinyworld.open({**state, "view": view} if isinstance(state, dict) else state) as page:
        page.click("#tab-change")
        settle(page)
        page.click("#reset") if page.locator("#reset").is_enabled() else None
        switch(page, "L1H0").click()
        assert_effect(page, tinyworld, head(1, 0))


@pytest.mark.parametrize("link", ["%E0%A4%A", "{", "%7B%22heads", "[" * 9000, '{"pins":[' * 3000], ids=range(5))
def test_a_damaged_link_is_reported_and_opens_the_first_text(tinyworld: LivingPage, link: str) -> None:
    with tinyworld.open(link=link) as page:
        assert "The link is damaged" in page.locator(".input").first.inner_text()
        assert page.input_value("#text") == TEXT
        page.fill("#text", "Lily")
        settle(page)
        assert "damaged" not in page.locator(".input").first.inner_text()


def test_what_a_link_loses_is_reported_and_the_rest_is_read(tinyworld: LivingPage) -> None:
    state = {"text": "x" * 20000, "heads": {"1.0": 0, "9.9": 0, "2.1": "off"}, "layer": 2, "pins": [{"seed": -1}]}
    with tinyworld.open(state) as page:
        note = page.locator(".input").first.inner_text()
        assert "left out: text of 20000 characters, some heads, seed." in note
        assert page.input_value("#text") == TEXT
        assert page.evaluate("[mlxGptPage.state.heads, mlxGptPage.state.layer]") == [{"1.0": 0}, 2]


def test_pins_within_pins_are_left_out(tinyworld: LivingPage) -> None:
    nested = '{"pins":[' * 2000 + "]}" * 2000
    with tinyworld.open(link=nested) as page:
        assert page.evaluate("mlxGptPage.state.pins.map((pin) => pin.pins)") == [[]]


@pytest.mark.parametrize("text", ["One", "Lily went to the garden. " * 40])
@pytest.mark.parametrize("width", [360, 1440])
def test_texts_of_one_token_and_of_a_full_context_can_be_changed(tinyworld: LivingPage, text: str, width: int) -> None:
    state = {"view": "change", "text": text, "other": text.replace("Lily", "Tom"), "heads": {"0.0": 0}}
    with tinyworld.open(state, viewport={"width": width, "height": 800}) as page:
        assert_effect(page, tinyworld, head(0, 0), text)
        assert page.locator("#generate").is_disabled() == (len(ids_of(tinyworld, text)) == 144)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if text == "One":
            assert "two tokens" in page.locator(".change").inner_text()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_recorded_page_says_what_it_shows_instead_of_a_change(recorded: LivingPage, width: int) -> None:
    with recorded.open({"view": "change", "heads": {"0.0": 0}}, viewport={"width": width, "height": 800}) as page:
        view = page.locator("#view-change")
        assert "Changing the model needs a living page" in view.inner_text()
        assert view.locator("input, select, table, :disabled").count() == 0
        for name in ("Residual stream", "Logit lens", "Compare"):
            page.click("#tab-change")
            view.get_by_role("button", name=name).click()
            assert page.locator("nav [aria-selected=true]").inner_text() == name
