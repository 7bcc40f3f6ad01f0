"""The browser of a session, and in it the page's modules without the page."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import browser  # noqa: F401  # a fixture
from helpers.living_page import recorded, rounded, tinyworld  # noqa: F401  # a fixture

from mlx_gpt.lens.page.bundle import join_modules
from mlx_gpt.lens.page.living import living_data, tokenizer_data
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

MODULES = Path(__file__).with_name("modules.js")
Arrays = dict[str, np.ndarray]


class Modules:
    """The modules of ``js/`` in a page of their own. ``open`` gives them the data of a living page."""

    def __init__(self, page: Any):
        self.page = page

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of ``modules.js`` with values that JSON can hold."""
        return self.page.evaluate(f"(given) => modules.{function}(...given)", [*arguments])

    def open(self, model: GPT, tokenizer: Tokenizer) -> GPT:
        """Open a model; return it with the weights of the page, rounded to float16."""
        self("open", living_data(model, tokenizer, [], "test"))
        return rounded(model)

    def open_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Open a tokenizer alone."""
        self("openTokenizer", tokenizer_data(tokenizer))

    def trace(self, ids: list[int], edits: dict[str, Any] | None = None, names: list[str] | None = None) -> Arrays:
        """Return activations of a text, by default those that Python's trace stores, and the logits."""
        shapes, numbers = self("trace", ids, edits or {}, names)
        values = np.frombuffer(base64.b64decode(numbers), "<f4")
        ends = np.cumsum([np.prod(shape) for _, shape in shapes])
        parts = np.split(values, ends[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


@pytest.fixture(scope="session")
def modules(browser: Any) -> Iterator[Modules]:  # noqa: F811
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.add_script_tag(content=f'(() => {{ "use strict"; {join_modules(MODULES)} }})()')
    yield Modules(page)
    context.close()
