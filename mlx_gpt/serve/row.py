"""A text in the making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_gpt.generate.rng import row_key
from mlx_gpt.generate.settings import Settings
from mlx_gpt.generate.writer import Piece, Token, Writer
from mlx_gpt.text.tokenizer import Tokenizer

MAX_LOGPROBS = 5  # alternatives to a token that can be asked for


class Row:
    """The continuation of a prompt, given as ids; of none, a new text. It may be longer than one turn of a batch.

    ``owner`` is whoever asked for it, and ``index`` which of his texts it is: with the ``seed`` that makes its chance.
    ``echo`` is whether he wants the prompt back too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_positions: int,
        prompt: Sequence[int],
        settings: Settings,
        seed: int = 0,
        index: int = 0,
        owner: Any = None,
        echo: bool = False,
    ):
        self.owner, self.index, self.settings, self.echo = owner, index, settings, echo
        self.prompt = list(prompt)
        self.read = self.prompt or [tokenizer.eot_id]
        self.limit = min(settings.max_tokens, n_positions - len(self.read) + 1)  # the last is drawn and not looked at
        self.key = row_key(seed, index)
        self.n_chosen = 0  # tokens, also those that are still on their way
        self.n_said = 0  # tokens of the text
        self.cancelled = False  # nobody wants it any more
        self._end_id = tokenizer.eot_id
        self._writer = Writer(tokenizer, settings, self.limit)

    @property
    def reason(self) -> str | None:
        """Why it ended, once it has."""
        return self._writer.reason

    @property
    def n_seen(self) -> int:
        """How many tokens the model has looked at: the prompt's, and all but the newest."""
        return len(self.read) + self.n_chosen - 1

    def push(self, token: Token) -> list[Piece]:
        """What its next token sets free; nothing after the end."""
        self.n_said += not self.reason and token.id != self._end_id
        return self._writer.push(token)
