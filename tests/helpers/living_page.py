"""The page of the model in weights/ in Chromium, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from helpers.browser import open_page
from mlx_gpt.lens.page import make_page, page_map
from mlx_gpt.lens.page.bundle import join_page
from mlx_gpt.lens.page.living import half_weights
from mlx_gpt.lens.page.recorded import recorded_data
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "weights/tinyworld"
TEXT = "One sunny morning, Lily went to the garden."
OTHER = "One sunny morning, Tom went to the river."


def rounded(model: GPT) -> GPT:
    """Return a model with the weights that its living page has, rounded to float16."""
    copy = GPT(model.config)
    weights = {name: mx.array(weight.astype(np.float32)) for name, weight in half_weights(model).items()}
    copy.update(tree_unflatten([*weights.items()]))
    return copy


class LivingPage:
    """The page of a model: a file to open, and the model and tokenizer that it has."""

    def __init__(self, browser: Any, folder: Path, model: GPT, tokenizer: Tokenizer, html: str):
        self.browser, self.file = browser, folder / "page.html"
        self.model, self.tokenizer = model, tokenizer
        self.file.write_text(html, encoding="utf-8")

    @contextmanager
    def open(self, state: Any = None, *, link: str = "", **context: Any) -> Iterator[Any]:
        """Open the page with a state, or the ``link`` that holds it; wait until everything is computed."""
        link = quote(json.dumps(state)) if state is not None else link
        with open_page(self.browser, self.file, f"#{link}", **context) as page:
            settle(page)
            yield page


def settle(page: Any) -> None:
    """Wait until a page has computed what its state needs."""
    page.wait_for_function("() => globalThis.mlxGptPage && !mlxGptPage.busy")


def value(page: Any, what: str, **data: Any) -> float:
    """Return the number that a page shows under a name, such as value(page, "next", id=5)."""
    attributes = "".join(f'[data-{name}="{v}"]' for name, v in data.items())
    return float(page.locator(f'[data-what="{what}"]{attributes}').first.get_attribute("data-value"))


@pytest.fixture(scope="session")
def tinyworld(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> LivingPage:
    """Return the page of the model in weights/, which opens with ``TEXT``."""
    model, tokenizer = load(FOLDER)
    html, _ = make_page(model, tokenizer, [TEXT], "test")
    return LivingPage(browser, tmp_path_factory.mktemp("page"), rounded(model), tokenizer, html)


@pytest.fixture(scope="session")
def recorded(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> LivingPage:
    """Return a page of the same model that cannot compute, with two recorded texts."""
    model, tokenizer = load(FOLDER)
    html = join_page(recorded_data(model, tokenizer, [TEXT, OTHER], "test") | page_map(model, "test"), "test")
    return LivingPage(browser, tmp_path_factory.mktemp("recorded"), model, tokenizer, html)
