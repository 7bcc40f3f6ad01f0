"""The view of the residual stream shows what each part adds to a token's vector and a logit, with Python's numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.living_page import TEXT, LivingPage, settle, value

from mlx_gpt import lens

pytestmark = pytest.mark.browser
LONG = "One sunny morning, Lily went to the garden and saw a big red ball near the old tree. " * 8
TEXTS = pytest.mark.parametrize("text", [TEXT, "Ben", LONG], ids=["ten tokens", "one token", "the whole context"])


def traced(opened: LivingPage, text: str = TEXT, edits: Any = None) -> tuple[mx.array, Any]:
    ids = opened.tokenizer.encode_prompt(text)[: opened.model.config.n_positions]
    return lens.trace(opened.model, [ids], edits)


def numbers(page: Any, what: str) -> dict[str, float]:
    """Return the numbers of a column by the labels of their parts or stages."""
    shown = page.eval_on_selector_all(f"[data-what={what}]", "all => all.map(x => ({...x.dataset}))")
    return {entry.get("part", entry.get("stage")): float(entry["value"]) for entry in shown}


def assert_column(page: Any, what: str, expected: dict[str, float], size: float = 0) -> None:
    """Assert a column's numbers to 1e-4; ``size`` is that of the terms in the sums, where they cancel."""
    found = numbers(page, what)
    found = {label: found[label] for label in expected}
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-4, atol=1e-5 * size)


def attribution(opened: LivingPage, activations: Any, position: int, target: int, versus: int | None, by: str) -> Any:
    direction = lens.logit_direction(opened.model, target, versus)
    values, labels = lens.logit_attribution(opened.model, activations, direction, by)
    return dict(zip(labels, np.array(values[:, 0, position]).tolist(), strict=True))


def assert_logits(
    page: Any, opened: LivingPage, run: Any, position: int, target: int, versus: int | None = None
) -> None:
    logits, activations = run
    values = attribution(opened, activations, position, target, versus, "layer")
    size = max(abs(x) for x in values.values())
    assert_column(page, "stream-value", values, size)
    expected = logits[0, position, target].item() - (0 if versus is None else logits[0, position, versus].item())
    for name in ("stream-total", "stream-model"):
        assert value(page, name) == pytest.approx(expected, rel=1e-4, abs=1e-5 * size)


@TEXTS
def test_the_parts_sum_to_the_logit_of_the_most_probable_token(tinyworld: LivingPage, text: str) -> None:
    run = traced(tinyworld, text)
    last = run[0].shape[1] - 1
    with tinyworld.open({"view": "stream", "text": text}) as page:
        assert_logits(page, tinyworld, run, last, int(run[0][0, last].argmax()))
        found = numbers(page, "stream-value")
        assert value(page, "stream-total") == pytest.approx(sum(found.values()), rel=1e-6)


@TEXTS
def test_norms_cosines_and_shares_are_those_of_the_vectors(tinyworld: LivingPage, text: str) -> None:
    _, activations = traced(tinyworld, text)
    parts, labels = lens.decompose_resid(tinyworld.model, activations)
    vectors = np.array(parts[:, 0, -1], np.float64)
    streams = np.cumsum(vectors, axis=0)
    last = streams[-1]
    with tinyworld.open({"view": "stream", "text": text}) as page:
        assert_column(page, "stream-norm", dict(zip(labels, np.linalg.norm(vectors, axis=1), strict=True)))
        stages = {str(i): np.linalg.norm(stream) for i, stream in enumerate(streams[1::2])}
        assert_column(page, "stream-norm", stages)
        shares = dict(zip(labels, vectors @ last / (last @ last), strict=True))
        assert_column(page, "stream-share", shares, size=1)
        assert sum(numbers(page, "stream-share").values()) == pytest.approx(1, abs=1e-5)
        before = zip(labels[2:], vectors[2:], streams[1:], strict=False)
        cosines = {label: a @ x / np.linalg.norm(a) / np.linalg.norm(x) for label, a, x in before}
        assert_column(page, "stream-cosine", cosines, size=1)


def test_a_layer_opens_into_its_heads_by_the_keyboard(tinyworld: LivingPage) -> None:
    logits, activations = traced(tinyworld)
    target = int(logits[0, -1].argmax())
    values = attribution(tinyworld, activations, -1, target, None, "head")
    ids = tinyworld.tokenizer.encode_prompt(TEXT)
    _, results = lens.trace(tinyworld.model, [ids], names="blocks.4.attn.hook_result")
    with tinyworld.open({"view": "stream"}) as page:
        assert page.locator('[data-row="L4H0"]').count() == 0
        page.locator('[data-open="4"]').focus()
        page.keyboard.press("Enter")
        rows = {label: values[label] for label in ("L4H0", "L4H1", "4_attn_bias")}
        assert_column(page, "stream-value", rows, size=1)
        assert sum(rows.values()) == pytest.approx(value(page, "stream-value", part="4_attn_out"), rel=1e-4)
        lengths = mx.linalg.norm(results["blocks.4.attn.hook_result"][0, -1], axis=-1)
        assert_column(page, "stream-norm", {"L4H0": lengths[0].item(), "L4H1": lengths[1].item()})
        assert page.locator('[data-open="4"]').get_attribute("aria-expanded") == "true"
        page.keyboard.press("Enter")  # the button has kept the focus
        assert page.locator('[data-row="L4H0"]').count() == 0


def test_another_token_and_target_are_chosen_by_clicks(tinyworld: LivingPage) -> None:
    run = traced(tinyworld)
    likely = np.argsort(-np.array(run[0][0, 4]))
    with tinyworld.open({"view": "stream"}) as page:
        page.click('.token[data-position="4"]')
        assert_logits(page, tinyworld, run, 4, int(likely[0]))
        page.select_option("#stream-target", str(likely[2]))
        assert_logits(page, tinyworld, run, 4, int(likely[2]))
        page.select_option("#stream-versus", str(likely[1]))
        assert_logits(page, tinyworld, run, 4, int(likely[2]), int(likely[1]))
        page.wait_for_function("() => decodeURIComponent(location.hash).includes('versus')")
        page.reload()  # the link holds the choice
        settle(page)
        assert_logits(page, tinyworld, run, 4, int(likely[2]), int(likely[1]))


@pytest.mark.parametrize("stage", [0, 3, 6])
def test_a_number_of_the_vector_is_shown_with_its_sum(tinyworld: LivingPage, stage: int) -> None:
    _, activations = traced(tinyworld)
    name = f"blocks.{stage}.hook_resid_pre" if stage < 6 else "blocks.5.hook_resid_post"
    vector = np.array(activations[name][0, -1])
    with tinyworld.open({"view": "stream"}, viewport={"width": 1440, "height": 1600}) as page:
        strip = page.locator(f'[data-what="stream-vector"][data-stage="{stage}"]')
        box = strip.bounding_box()
        page.mouse.move(box["x"] + box["width"] * (10 + 0.5) / 64, box["y"] + box["height"] / 2)
        assert strip.get_attribute("data-column") == "10"
        assert float(strip.get_attribute("data-value")) == pytest.approx(vector[10], rel=1e-4)
        strip.press("ArrowRight")
        assert float(strip.get_attribute("data-value")) == pytest.approx(vector[11], rel=1e-4)
        popover = page.locator("#popover").inner_text().replace("−", "-")
        formula, filled = popover.splitlines()[:2]
        assert formula.startswith("x[11] ")
        assert formula.endswith("token + position" if stage == 0 else "before + attention + MLP")
        total, terms = filled.split(" = ")
        assert eval(terms) == pytest.approx(float(total), abs=0.2)  # of three digits each
        assert float(total) == pytest.approx(vector[11], rel=6e-3)
        assert page.locator('[data-what="stream-vector"][data-column="11"]').count() == 7  # marked in all strips
        page.keyboard.press("Escape")
        assert page.locator("#popover").count() == 0


def test_a_knocked_out_head_and_a_patch_leave_the_sum_equal_to_the_logit(tinyworld: LivingPage) -> None:
    other = "One sunny morning, Tom went to the garden."
    ids = tinyworld.tokenizer.encode_prompt(TEXT)
    name = "blocks.2.hook_resid_pre"
    source = traced(tinyworld, other)[1][name]
    off = mx.array([1.0, 0.0])[:, None]
    edits = {"blocks.3.attn.hook_z": lambda z, _: z * off}
    edits[name] = lambda x, _: mx.where((mx.arange(len(ids)) == 4)[:, None], source, x)
    run = lens.trace(tinyworld.model, [ids], edits)
    logit = run[0][0, 4].max().item()
    state = {"view": "stream", "token": 4, "other": other, "patch": {"layer": 2, "position": 4}, "heads": {"3.1": 0}}
    with tinyworld.open(state) as page:
        assert value(page, "stream-model") == pytest.approx(logit, rel=1e-4)
        found = numbers(page, "stream-value")
        assert "2_patch" in found
        assert sum(found.values()) == pytest.approx(logit, rel=1e-4)
        assert value(page, "stream-norm", stage=2) == pytest.approx(mx.linalg.norm(source[0, 4]).item(), rel=1e-4)
        page.click('[data-open="3"]')
        assert value(page, "stream-norm", part="L3H1") == 0


@pytest.mark.parametrize("width", [360, 1440])
def test_the_view_fits_its_width(tinyworld: LivingPage, width: int) -> None:
    with tinyworld.open({"view": "stream"}, viewport={"width": width, "height": 800}) as page:
        page.click('[data-open="4"]')
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.querySelector('.stream').getBoundingClientRect().right") < width
