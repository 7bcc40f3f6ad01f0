"""A model, a text and edits, which the views look at, and the names of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.hooks import Activations, Edit
from mlx_gpt.lens.trace import trace
from mlx_gpt.lens.views.view import Array
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, the ids of a text, (T,) or none, and the edits under which it is run."""

    model: GPT
    tokenizer: Tokenizer
    ids: Sequence[int] = ()
    edits: Mapping[str, Edit] = field(default_factory=dict)

    def trace(self, *names: str) -> tuple[mx.array, Activations]:
        """Return logits (1, T, V) and activations of the edited run."""
        return trace(self.model, self.tokens, self.edits, names)

    @property
    def tokens(self) -> mx.array:
        """The ids as a batch, (1, T). Raises ``UsageError`` for a text that is empty."""
        if not len(self.ids):
            raise UsageError("the text is empty; give at least one token")
        return mx.array([self.ids], mx.int32)

    @property
    def positions(self) -> list[str]:
        """Names of the positions: ``0 The``, ``1 ·tree``."""
        return [f"{i} {label}" for i, label in enumerate(self.labels(self.ids))]

    def labels(self, ids: Any) -> list[str]:
        """Return the texts of ids (n,) as labels."""
        return [token_label(self.tokenizer, int(i)) for i in ids]

    def likely(self) -> list[int]:
        """Return the ids of the three most probable next tokens of the unedited run, in order."""
        logits = trace(self.model, self.tokens, names=())[0][0, -1]
        return [int(i) for i in np.array(mx.argsort(-logits)[:3])]

    def pair(self, answer: str | None, wrong: str | None) -> tuple[int, int]:
        """Return the ids of two next tokens to compare; by default the most probable ones."""
        given = self.token(answer, "--answer"), self.token(wrong, "--wrong")
        likely = [i for i in self.likely() if i not in given]
        right, other = (likely.pop(0) if token is None else token for token in given)
        return right, other

    def token(self, text: str | None, flag: str) -> int | None:
        """Return the id of a text of one token, None for none. Raises ``UsageError`` that names several tokens."""
        if text is None:
            return None
        ids = self.tokenizer.encode(text, allow_special=True, is_start=False)
        if len(ids) != 1:
            found = ", ".join(self.labels(ids[:8])) or "none"
            is_word = text and len(self.tokenizer.encode(f" {text}", is_start=False)) == 1
            hint = f"; with a space before it, {' ' + text!r}, it is one" if is_word else ""
            raise UsageError(f"{flag} {text!r} must be one token, not {len(ids)} ({found}){hint}")
        if ids[0] >= self.model.config.vocab_size:
            raise UsageError(f"{flag} {text!r} is token {ids[0]}, and the model has {self.model.config.vocab_size}")
        return ids[0]


def numbers(x: mx.array) -> Array:
    """Return the values of an array of any dtype for NumPy."""
    return np.array(x.astype(mx.float32))


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return the text of an id, printable, with · for a space before it: ``·tree``, ``\n``, ``\xf0``."""
    try:
        text = tokenizer.token_bytes(token_id).decode(errors="backslashreplace")
    except ValueError:  # in a padded vocabulary
        return f"id {token_id}"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"·{text[1:]}" if text.startswith(" ") else text
