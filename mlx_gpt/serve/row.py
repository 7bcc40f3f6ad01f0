"""One row of a batch: a prompt, its settings, and the text generated so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_gpt.generate.rng import row_key
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.writer import Writer
from mlx_gpt.text.tokenizer import Tokenizer

MAX_LOGPROBS = 5  # alternatives per token that a request may ask for


class Row(Writer):
    """The continuation of a prompt, given as ids; an empty prompt starts a new text.

    ``owner`` is the job it belongs to, and ``index`` its place in that job, which with ``seed`` gives its random key.
    ``echo`` also returns the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_positions: int,
        prompt: Sequence[int],
        settings: GenerationSettings,
        seed: int = 0,
        index: int = 0,
        owner: Any = None,
        echo: bool = False,
    ):
        self.owner, self.index, self.settings, self.echo = owner, index, settings, echo
        self.prompt = list(prompt)
        self.input = self.prompt or [tokenizer.start_id]
        self.key = row_key(seed, index)
        self.cancelled = False
        room = n_positions - len(self.input) + 1  # the last token is not read
        super().__init__(tokenizer, settings, min(settings.max_tokens, room))
