"""Continuous batching: rows with settings of their own join and leave the batch at any turn.

All rows end at the same slot of the cache (``generate/decoder.py``); shorter ones begin with padding. Each row has its
own position and random key, so its text does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_gpt.generate.decoder import Decoder, pad_rows
from mlx_gpt.generate.generation import as_tokens, with_logprobs
from mlx_gpt.generate.history import History
from mlx_gpt.generate.sampler import Sampler, Vocabulary
from mlx_gpt.generate.writer import Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.row import MAX_LOGPROBS, Row
from mlx_gpt.text.tokenizer import Tokenizer

MAX_GROUP = 1024  # prompt tokens read at once, unless a single prompt is longer
POSITIONS = 256  # of a prompt, whose logits are in memory at once

NO_ROWS = History(mx.zeros((0, 0), mx.int32), [])

Ids = tuple[int, ...]


class Batch:
    """The rows in progress: ``add`` some, take their tokens ``turn`` by turn, ``keep`` those that have not ended.

    ``cache_bits`` stores their cache in half precision (16) or quantized (8, 4).
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, cache_bits: int | None = None):
        self.rows: list[Row] = []
        self._model, self._vocabulary = model, Vocabulary(tokenizer, model.config.vocab_size)
        self._decoder, self._prefiller = Decoder(model, cache_bits), Decoder(model, cache_bits)
        self._sampler: Sampler  # of the rows; set when the first are added
        self._history = NO_ROWS
        self._newest = mx.zeros((0,), mx.int32)  # (B,) ids that the decoder has not read yet
        self._pending: list[tuple[list[Row], list[mx.array]]] = []  # rows and their choices being computed

    def add(self, rows: list[Row]) -> None:
        """Read the prompts of new rows and choose their first tokens. Equal prompts are read once."""
        for prompts in similar_lengths(list(dict.fromkeys(tuple(row.input) for row in rows))):
            joining = [row for row in rows if tuple(row.input) in prompts]
            indices = [prompts.index(tuple(row.input)) for row in joining]
            padded = pad_rows(prompts, self._model.config.vocab_size)
            logits = self._prefiller.prefill(padded)
            self._prefiller.keep(indices)
            self._decoder.join(self._prefiller)
            history = History(padded[mx.array(indices)], [row.limit for row in joining])
            ids, history = self._choose(joining, self._sampler_of(joining), history, logits[mx.array(indices)])
            self._newest = mx.concatenate([self._newest, ids])
            self._history = self._history.join(history)
            self.rows = [*self.rows, *joining]
        self._sampler = self._sampler_of(self.rows)

    def turn(self) -> Iterator[tuple[Row, Token]]:
        """Yield the next token of each row, after starting the computation of the ones that follow."""
        if not self._pending:
            self._advance()
        ready, self._pending = self._pending, []
        if (self._history.n_new < self._history.limits).all():
            self._advance()
        for rows, chosen in ready:
            yield from zip(rows, as_tokens(chosen), strict=True)

    def keep(self, rows: list[Row]) -> None:
        """Keep these rows only."""
        kept = [i for i, row in enumerate(self.rows) if row in rows]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self._decoder.cache, self._pending, self._history = [], [], NO_ROWS
            self._newest = self._newest[:0]
            return
        self._sampler = self._sampler_of(self.rows)
        self._newest = self._newest[mx.array(kept)]
        self._decoder.keep(kept)
        self._history = self._history.keep(kept)

    def prompt_tokens(self, row: Row) -> list[Token]:
        """Return the tokens of a row's prompt, with log-probabilities if requested; the first has none."""
        ids, tokens = row.prompt, [Token(i) for i in row.prompt]
        if row.settings.logprobs is None or len(ids) < 2:
            return tokens
        x = self._model.hidden([ids])
        for start in range(0, len(ids) - 1, POSITIONS):
            following = ids[start + 1 : start + 1 + POSITIONS]
            logits = self._model.logits(x[:, start : start + len(following)])[0]
            chosen = with_logprobs(mx.array(following), logits, MAX_LOGPROBS)
            tokens[start + 1 : start + 1 + len(following)] = as_tokens(chosen)
        return tokens

    def _advance(self) -> None:
        """Start the computation of one more token for every row."""
        self._drop_empty_slots()
        logits = self._decoder.step(self._newest[:, None])[:, -1]
        self._newest, self._history = self._choose(self.rows, self._sampler, self._history, logits)

    def _drop_empty_slots(self) -> None:
        """Free the slots that only rows needed which have left: if they are many, or no other slot is free."""
        used = self._decoder.offset
        longest = max(len(row.input) + int(n) - 1 for row, n in zip(self.rows, self._history.n_new, strict=True))
        if 2 * longest < used or used == self._model.config.n_positions > longest:
            self._decoder.drop_slots(used - longest)
            self._history = self._history.drop_columns(used - longest)

    def _choose(
        self, rows: list[Row], sampler: Sampler, history: History, logits: mx.array
    ) -> tuple[mx.array, History]:
        """Choose the next id of each row by these logits, (B, V) -> (B,), and start their computation."""
        ids = sampler.choose(logits, sampler.inputs(history), history)
        wants_logprobs = any(row.settings.logprobs is not None for row in rows)
        chosen = with_logprobs(ids, logits, MAX_LOGPROBS if wants_logprobs else None)
        mx.async_eval(chosen)
        self._pending.append((rows, chosen))
        return ids, history.then(ids[:, None])

    def _sampler_of(self, rows: list[Row]) -> Sampler:
        keys = mx.array(np.array([row.key for row in rows]))
        return Sampler([row.settings for row in rows], self._vocabulary, keys)


def similar_lengths(prompts: list[Ids]) -> list[list[Ids]]:
    """Group prompts to be read together, so that at most half of what is read is padding."""
    groups: list[list[Ids]] = []
    for prompt in sorted(prompts, key=len):
        group = [*groups[-1], prompt] if groups else []
        size = len(prompt) * len(group)
        if group and size <= min(MAX_GROUP, 2 * sum(map(len, group))):
            groups[-1] = group
        else:
            groups.append([prompt])
    return groups
