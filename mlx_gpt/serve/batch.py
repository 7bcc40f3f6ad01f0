"""Texts of different requests side by side: each has settings of its own, and joins or leaves at any turn.

All rows stand at the same slot of the cache (``generate/decoder.py``); one that joins has padding before it. Its
numbers are those it would have alone, and it draws by its own key, so its text does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_gpt.generate import sampling
from mlx_gpt.generate.decoder import Decoder, side_by_side
from mlx_gpt.generate.generation import as_tokens, logprobs
from mlx_gpt.generate.writer import Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.row import MAX_LOGPROBS, Row
from mlx_gpt.serve.rules import Rules
from mlx_gpt.text.tokenizer import Tokenizer

TOGETHER = 1024  # tokens of prompts that are read at once, unless one alone is longer
POSITIONS = 256  # of a prompt, whose logits are in memory at once

Ids = tuple[int, ...]


class Batch:
    """Rows under way: ``add`` some, take their tokens ``turn`` by turn, ``keep`` those that have not ended.

    ``cache_bits`` keeps their cache in half precision (16) or quantized (8, 4).
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, cache_bits: int | None = None):
        self._model = model
        self._decoder, self._reader = Decoder(model, cache_bits), Decoder(model, cache_bits)
        self._rules = Rules([], known_ids(tokenizer, model.config.vocab_size))
        self._newest = mx.zeros((0,), mx.int32)  # (B,) ids that the decoder has not read yet
        self._on_their_way: list[tuple[list[Row], list[mx.array]]] = []  # whose, and what was chosen

    @property
    def rows(self) -> list[Row]:
        return self._rules.rows

    def add(self, rows: list[Row]) -> None:
        """Read the prompts of some rows and let these go on beside the others. Equal prompts are read once."""
        for prompts in alike(list(dict.fromkeys(tuple(row.read) for row in rows))):
            joining = [row for row in rows if tuple(row.read) in prompts]
            which = [prompts.index(tuple(row.read)) for row in joining]
            logits = self._reader.prefill(side_by_side(prompts, self._model.config.vocab_size))
            self._reader.keep(which)
            self._decoder.join(self._reader)
            rules = Rules(joining, self._rules.known)
            self._newest = mx.concatenate([self._newest, self._take(rules, logits[mx.array(which)])])
            self._rules = self._rules.join(rules)

    def turn(self) -> Iterator[tuple[Row, Token]]:
        """The next tokens of the rows. While they are on their way to their reader, the ones after are computed."""
        if not self._on_their_way:
            self._advance()
        ready, self._on_their_way = self._on_their_way, []
        if all(row.n_chosen < row.limit for row in self.rows):
            self._advance()
        for rows, chosen in ready:
            yield from zip(rows, as_tokens(chosen), strict=True)

    def keep(self, rows: list[Row]) -> None:
        """Go on with these only."""
        kept = [i for i, row in enumerate(self.rows) if row in rows]
        if len(kept) == len(self.rows):
            return
        self._rules = self._rules.keep(kept)
        self._newest = self._newest[mx.array(kept, mx.int32)] if kept else self._newest[:0]
        if kept:
            self._decoder.keep(kept)
        else:
            self._decoder.cache, self._on_their_way = [], []

    def prompt_tokens(self, row: Row) -> list[Token]:
        """The tokens of a row's prompt; where it was asked for, with how probable the model found them."""
        ids, tokens = row.prompt, [Token(i) for i in row.prompt]
        if row.settings.logprobs is None or len(ids) < 2:  # before the first there is nothing to tell
            return tokens
        x = self._model.hidden([ids])
        for start in range(0, len(ids) - 1, POSITIONS):
            following = ids[start + 1 : start + 1 + POSITIONS]
            logits = self._model.logits(x[:, start : start + len(following)])[0]
            chosen = logprobs(logits, mx.array(following), MAX_LOGPROBS)
            tokens[start + 1 : start + 1 + len(following)] = as_tokens([mx.array(following), *chosen])
        return tokens

    def _advance(self) -> None:
        """Choose one id more for every row."""
        self._close_up()
        logits = self._decoder.step(self._newest[:, None])[:, -1]
        self._newest = self._take(self._rules, logits)

    def _close_up(self) -> None:
        """Give slots back that only rows needed which have left: where they are many, or none is left to go on."""
        used, longest = self._decoder.offset, max(row.n_seen for row in self.rows)
        if 2 * longest < used or used == self._model.config.n_positions > longest:
            self._decoder.forget(used - longest)

    def _take(self, rules: Rules, logits: mx.array) -> mx.array:
        """Let rows choose by these logits, (B, V); the ids, (B,), are on their way."""
        ids = rules.choose(logits)
        looked_at = any(row.settings.logprobs is not None for row in rules.rows)
        chosen = [ids, *logprobs(logits, ids, MAX_LOGPROBS)] if looked_at else [ids]
        mx.async_eval(chosen)
        self._on_their_way.append((rules.rows, chosen))
        return ids


def known_ids(tokenizer: Tokenizer, vocab_size: int) -> mx.array:
    """(V,): 0 for each id, -inf for those that only pad the model's vocabulary."""
    known = np.zeros(vocab_size, dtype=bool)
    known[[*tokenizer.ranks.values(), *tokenizer.specials.values()]] = True
    return sampling.keep_ids(mx.zeros((vocab_size,)), mx.array(known))


def alike(prompts: list[Ids]) -> list[list[Ids]]:
    """The prompts in groups to be read together: of like length, so that at most half of what is read is padding."""
    groups: list[list[Ids]] = []
    for prompt in sorted(prompts, key=len):
        group = [*groups[-1], prompt] if groups else []
        size = len(prompt) * len(group)
        if group and size <= min(TOGETHER, 2 * sum(map(len, group))):
            groups[-1] = group
        else:
            groups.append([prompt])
    return groups
