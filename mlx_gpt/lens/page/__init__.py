"""One HTML file that shows the inside of a model: living, it computes; recorded, it shows what was traced.

``bundle.py`` joins the file from ``page.html``, ``style.css`` and the modules in ``js/``, which begin at ``main.js``.
``living.py`` and ``recorded.py`` make its data.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_gpt.lens.page.bundle import join_page
from mlx_gpt.lens.page.living import living_data
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer

DEFAULT_TEXT = "The ancient oak tree provided cool shade on the hot summer day."


def make_page(model: GPT, tokenizer: Tokenizer, texts: Sequence[str] = (), name: str = "model") -> tuple[str, str]:
    """Return the HTML of a page, which opens with the first text or a default one, and a line about the page."""
    page = join_page(living_data(model, tokenizer, [*texts] or [DEFAULT_TEXT], name), f"{name} · mlx_gpt lens")
    return page, f"living page, {len(page) / 1e6:.1f} MB: it computes in the browser, offline"
