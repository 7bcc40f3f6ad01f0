"""One HTML file that shows the inside of a model: living, it computes; recorded, it shows what was traced.

``bundle.py`` joins the file from ``page.html``, ``style.css`` and the modules in ``js/``, which begin at ``main.js``.
``living.py`` and ``recorded.py`` make its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlx_gpt.errors import TokenizerError, UsageError
from mlx_gpt.generate.generation import generate
from mlx_gpt.lens.diagram import draw_diagram
from mlx_gpt.lens.diagram.svg import STYLE
from mlx_gpt.lens.page.bundle import join_page
from mlx_gpt.lens.page.living import living_data
from mlx_gpt.lens.page.recorded import recorded_data
from mlx_gpt.lens.weights import n_weights
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

EXPLANATION = "The ancient oak tree provided cool shade on the hot summer day."
LIVING_SIZE = 8_000_000  # characters of a page that computes; about 3 million parameters
LIVING_PARAMETERS = 4_000_000  # more are never tried


def make_page(model: GPT, tokenizer: Tokenizer, texts: Sequence[str] = (), name: str = "model") -> tuple[str, str]:
    """Return the HTML of a page, which opens with the first text or a default one, and a line about the page.

    The page computes if it is then smaller than 8 MB; else it is recorded, and shows these texts only. Raises
    ``UsageError`` for an empty text in a recorded page.
    """
    size = n_weights(model)
    texts, title = [*texts] or [default_text(model, tokenizer)], f"{name} · mlx_gpt lens"
    reason = f"the model has {size:,} parameters, too many for a page that computes, which has at most 8 MB"
    if size <= LIVING_PARAMETERS:
        try:
            page = join_page(living_data(model, tokenizer, texts, name) | page_map(model, name), title)
            if len(page) <= LIVING_SIZE:
                return page, f"living page, {len(page) / 1e6:.1f} MB: it computes in the browser, offline"
        except UsageError as error:  # weights that float16 cannot hold
            reason = str(error)
    data = recorded_data(model, tokenizer, texts, name)
    page = join_page(data | page_map(model, name), title)
    return page, f"recorded page, {len(page) / 1e6:.1f} MB, of {recorded_texts(data, texts)}: {reason}"


def default_text(model: GPT, tokenizer: Tokenizer) -> str:
    """Return the sentence of the explanation, or a generated one for a vocabulary that lacks its words."""
    with suppress(TokenizerError):  # a character that the vocabulary lacks
        if len(tokenizer.encode_prompt(EXPLANATION)) <= 2 * len(EXPLANATION.split()):
            return EXPLANATION
    tokens = min(24, model.config.n_positions - 1)
    return "".join(generate(model, tokenizer, max_tokens=tokens, temperature=0.7, seed=0)) if tokens else EXPLANATION


def page_map(model: GPT, name: str) -> dict[str, str]:
    """Return the diagram of a model without its style, which the page's policy would refuse; the page has it."""
    return {"diagram": draw_diagram(model, name=name, fold=False).replace(f"<style>{STYLE}</style>", "")}


def recorded_texts(data: dict[str, Any], texts: Sequence[str]) -> str:
    """Say how many texts of those asked for a recorded page has, and how many tokens."""
    recorded, asked = len(data["texts"]), len({*texts})
    tokens = sum(len(recording["ids"]) for recording in data["recordings"])
    cut = ", the beginning of a longer text" if any(text not in texts for text in data["texts"]) else ""
    return f"{recorded} of {asked} texts, {tokens} tokens{cut}"
