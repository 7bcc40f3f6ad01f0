"""The composition of the sampling rules: logits and the text so far in, the next id of each row out.

A new rule is a function in ``sampling.py``, a setting in ``settings.py`` and a line in one of the two tables below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from math import inf
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import MLXGPTError, ModelFolderError, UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.generate.decoder import NO_TOKEN, Inputs
from mlx_gpt.generate.history import History
from mlx_gpt.generate.rng import key_at
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.text.tokenizer import Tokenizer

# A setting and its rule, in the order of transformers (``generation/utils.py``, ``_get_logits_processor``). A rule
# takes the logits, the value of its setting and, in the first table, the history.
HISTORY_RULES: dict[str, Callable] = {
    "repetition_penalty": lambda logits, penalty, text: sampling.penalize_repetition(logits, text.ids, penalty),
    "frequency_penalty": lambda logits, penalty, text: sampling.penalize_frequency(logits, text.new, penalty),
    "presence_penalty": lambda logits, penalty, text: sampling.penalize_presence(logits, text.new, penalty),
    "no_repeat_ngram": lambda logits, n, text: sampling.block_ngrams(logits, text.ids, n),
    "ban": lambda logits, words, text: sampling.ban_sequences(logits, text.ids, words),
    "force": lambda logits, words, text: sampling.force_sequences(logits, text.new, left=text.left, **words),
}
DRAWING_RULES: dict[str, Callable] = {  # not used by rows of temperature 0
    "temperature": sampling.with_temperature,
    "top_k": sampling.keep_top_k,
    "top_p": sampling.keep_top_p,
    "min_p": sampling.keep_min_p,
    "typical_p": sampling.keep_typical,
}
OFF = {field.name: field.default for field in fields(GenerationSettings)} | {"temperature": 1.0}


class Use(NamedTuple):
    """A rule's value, a number or one for each row (B, 1), and the rows it changes, (B, 1); None for all."""

    value: Any
    rows: mx.array | None


class Vocabulary:
    """The ids of a tokenizer among those of a model, of which there may be more: ``known`` (V,), boolean."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        self.tokenizer = tokenizer
        self.known = np.zeros(size, dtype=bool)
        self.known[[*tokenizer.ranks.values(), *tokenizer.specials.values()]] = True

    def bias(self, logit_bias: Mapping[int, float]) -> np.ndarray:
        """Return the number to add to each logit, (V,): -inf for an unknown id. ``UsageError`` for a bias on one."""
        self.check_ids("--logit-bias", logit_bias)
        bias = np.where(self.known, np.float32(0), np.float32(-inf))
        bias[list(logit_bias)] = list(logit_bias.values())
        return bias

    def check_ids(self, name: str, ids: Iterable[int]) -> None:
        """Raise ``UsageError`` for an id that no token has."""
        for token_id in ids:
            if not (0 <= token_id < self.known.size and self.known[token_id]):
                last = self.known.nonzero()[0].max()
                raise UsageError(f"{name}: no token has id {token_id}; the vocabulary's ids are 0 to {last}")

    def banned(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word, without and with a space before it."""
        return [self.tokenizer.encode(space + word, is_start=False) for word in words for space in ("", " ")]

    def forced(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word with a space before it."""
        return [self.tokenizer.encode(" " + word.removeprefix(" ")) for word in words]


class Sampler:
    """Chooses the next ids of B rows by the ``settings`` of each row, or one for all, and by their ``keys`` (B, 2).

    Rows that share their settings have equally many generated tokens. Raises ``UsageError`` for settings that
    contradict the vocabulary or each other: a bias for an unknown id, a word both banned and forced.
    """

    def __init__(self, settings: Sequence[GenerationSettings], vocabulary: Vocabulary, keys: mx.array):
        self.settings, self.vocabulary, self.keys = settings, vocabulary, keys
        self.end_ids = vocabulary.tokenizer.end_ids
        for row in settings:
            self._refuse_contradictions(row)
        self._min_tokens = np.array([row.min_tokens for row in settings])
        if self._min_tokens.any():
            self._ends = np.zeros((len(settings), vocabulary.known.size), bool)  # ids that end a row's text
            for i, row in enumerate(settings):
                vocabulary.check_ids("stop_token_ids", row.stop_token_ids)
                self._ends[i, [*self.end_ids, *row.stop_token_ids]] = True
        self._bias: mx.array | None = None  # (B, V)
        if not vocabulary.known.all() or any(row.logit_bias or row.min_tokens for row in settings):
            self._bias = mx.array(np.stack([vocabulary.bias(row.logit_bias) for row in settings]))
        self._is_drawn = np.array([row.temperature > 0 for row in settings])
        self._uses = {name: self._uses_of(name) for name in (*HISTORY_RULES, *DRAWING_RULES)}
        self.needs_history = any(self._uses[name] for name in HISTORY_RULES)

    def inputs(self, history: History) -> Inputs:
        """Return the arrays that the next choice depends on besides the logits: inputs of a compiled step."""
        inputs = {name: use[0].value for name in DRAWING_RULES if _is_number(name) and (use := self._uses[name])}
        if self._is_drawn.any():
            inputs["keys"] = key_at(self.keys, history.n_new)
        if self._bias is not None:
            too_short = history.n_new[: len(self.settings)] < self._min_tokens
            inputs["bias"] = self._bias
            if too_short.any():
                inputs["bias"] = mx.where(mx.array(too_short[:, None] & self._ends), -mx.inf, self._bias)
        return inputs

    def choose(self, logits: mx.array, inputs: Inputs, history: History | None = None) -> mx.array:
        """Return the next id of each row, (B, V) -> (B,), int32; ``NO_TOKEN`` if all are forbidden or a logit is NaN.

        A pure function of arrays, unless ``needs_history``.
        """
        logits = self.apply_rules(logits, inputs, history)
        ids = sampling.draw(logits, inputs["keys"]) if self._is_drawn.any() else sampling.greedy(logits)
        if self._is_drawn.any() and not self._is_drawn.all():
            ids = mx.where(mx.array(self._is_drawn), ids, sampling.greedy(logits))
        return mx.where(mx.max(logits, axis=-1) > -mx.inf, ids.astype(mx.int32), NO_TOKEN)

    def apply_rules(self, logits: mx.array, inputs: Inputs, history: History | None = None) -> mx.array:
        """Return the logits after every rule, (B, V); the ids are drawn from their softmax."""
        if self._bias is not None:
            logits = logits + inputs["bias"]
        logits = self._apply(HISTORY_RULES, logits, inputs, history)
        return self._apply(DRAWING_RULES, logits, inputs)

    def _apply(self, rules: Mapping[str, Callable], logits: mx.array, inputs: Inputs, *history: Any) -> mx.array:
        for name, rule in rules.items():
            for value, rows in self._uses[name]:
                changed = rule(logits, inputs.get(name, value), *history)
                logits = changed if rows is None else mx.where(rows, changed, logits)
        return logits

    def _uses_of(self, name: str) -> list[Use]:
        """Return how often a rule is applied: once if its setting is a number, else once for each value of it."""
        values = [getattr(row, name) for row in self.settings]
        is_on = np.array([value != OFF[name] for value in values])
        if name in DRAWING_RULES:
            is_on &= self._is_drawn
        if not is_on.any():
            return []
        if _is_number(name):  # one for all rows, or (B, 1)
            numbers = np.array(values, np.float32)
            return [Use(mx.array(float(values[0])) if len(set(values)) == 1 else _column(numbers), _rows(is_on))]
        found = dict.fromkeys(value for value, on in zip(values, is_on, strict=True) if on)
        return [Use(self._encoded(name, x), _rows(is_on & np.array([value == x for value in values]))) for x in found]

    def _encoded(self, name: str, value: Any) -> Any:
        if name == "ban":
            return self.vocabulary.banned(value)
        return {"sequences": self.vocabulary.forced(value), "end_ids": self.end_ids} if name == "force" else value

    def _refuse_contradictions(self, settings: GenerationSettings) -> None:
        forced = self.vocabulary.forced(settings.force)
        forbidden = self.vocabulary.banned(settings.ban)
        forbidden += [[i] for i, bias in settings.logit_bias.items() if bias == -inf]
        for word, sequence in zip(settings.force, forced, strict=True):
            if any(sequence[i : i + len(ids)] == ids for ids in forbidden for i in range(len(sequence))):
                raise UsageError(f"--force {word!r} contradicts --ban or --logit-bias, which forbid it; drop one")
        needed = sum(map(len, forced))
        if needed > settings.max_tokens:
            raise UsageError(
                f"--force asks for words of {needed} tokens, --max-tokens allows {settings.max_tokens}; raise it"
            )


def no_token_error(settings: Sequence[GenerationSettings]) -> MLXGPTError:
    """Return the error of rows for which no id can be chosen: ``UsageError`` if their settings forbid all."""
    names = ("no_repeat_ngram", "ban", "min_tokens", "force")
    forbidding = [f"--{name.replace('_', '-')}" for name in names if any(getattr(row, name) for row in settings)]
    if any(-inf in row.logit_bias.values() for row in settings):
        forbidding.insert(0, "--logit-bias")
    if not forbidding:
        return ModelFolderError("the logits are not numbers (NaN): the weights are damaged, or overflow their dtype")
    return UsageError(f"all tokens are masked by {' and '.join(forbidding)}; relax one of them")


def _is_number(name: str) -> bool:
    return isinstance(OFF[name], float)


def _rows(is_on: np.ndarray) -> mx.array | None:
    return None if is_on.all() else _column(is_on)


def _column(values: np.ndarray) -> mx.array:
    return mx.array(values)[:, None]
