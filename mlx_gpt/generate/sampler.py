"""The rules that some settings ask for, composed: logits and the text so far in, the next id out."""

from __future__ import annotations

from math import inf

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.generate.decoder import Inputs
from mlx_gpt.generate.rng import key_at
from mlx_gpt.generate.settings import Settings
from mlx_gpt.text.tokenizer import Tokenizer

NOTHING = -1  # drawn where the rules forbid every id


class Said:
    """The text so far, for the rules that look back: ``ids`` (B, L), and of them ``new``, what came after the prompt.

    Shorter prompts begin with -1. ``limits`` (B,) is how many tokens each row may say, ``left`` (B, 1) how many more.
    """

    def __init__(self, prompt: mx.array, limits: mx.array):
        self.limits = limits
        self.n_new = 0
        self._n_prompt = prompt.shape[1]
        self._parts = [prompt]

    def add(self, tokens: mx.array) -> None:
        """Put tokens at the end: one for each row, (B,), or T of them, (B, T)."""
        self._parts.append(tokens)
        self.n_new += tokens.shape[1] if tokens.ndim == 2 else 1

    def then(self, tokens: mx.array) -> Said:
        """What would be said with these tokens more."""
        longer = Said(self._parts[0], self.limits)
        longer.n_new, longer._n_prompt, longer._parts = self.n_new, self._n_prompt, list(self._parts)
        longer.add(tokens)
        return longer

    @property
    def ids(self) -> mx.array:
        if len(self._parts) > 1:  # put together when a rule asks, and only then
            B = self.limits.shape[0]
            self._parts = [mx.concatenate([part.reshape(B, -1) for part in self._parts], axis=1)]
        return self._parts[0]

    @property
    def new(self) -> mx.array:
        return self.ids[:, self._n_prompt :]

    @property
    def left(self) -> mx.array:
        return (self.limits - self.n_new)[:, None]


class Sampler:
    """Chooses the next id as ``settings`` say. ``vocab_size`` is the model's, which may be padded.

    Raises ``UsageError`` for what the vocabulary does not allow: a bias for an id that is not there, a word that is
    both banned and forced.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer, vocab_size: int):
        self.settings = settings
        self.end_id = tokenizer.eot_id
        self.vocab_size = tokenizer.vocab_size
        known = np.zeros(vocab_size, dtype=bool)
        known[[*tokenizer.ranks.values(), *tokenizer.specials.values()]] = True
        self._offset = sampling.keep_ids(mx.zeros((vocab_size,)), mx.array(known))
        if settings.logit_bias:
            self._offset = sampling.add_bias(self._offset, _bias(settings, known))
        self._shifts = bool(not known.all() or settings.logit_bias or settings.min_tokens)
        self._banned = [ids for word in settings.ban for ids in (tokenizer.encode(word), tokenizer.encode(" " + word))]
        self._forced = [tokenizer.encode(" " + word.removeprefix(" ")) for word in settings.force]
        self._refuse_contradictions()
        penalties = (settings.repetition_penalty != 1, settings.frequency_penalty, settings.presence_penalty)
        self.looks_back = any((*penalties, settings.no_repeat_ngram, self._banned, self._forced))
        numbers = ("temperature", "top_p", "min_p", "typical_p") if settings.temperature else ()
        self._numbers = {name: mx.array(getattr(settings, name)) for name in numbers}

    def inputs(self, said: Said, keys: mx.array) -> Inputs:
        """The arrays that the choice after ``said`` depends on, besides the logits: for a compiled step."""
        inputs = dict(self._numbers)
        if self.settings.temperature:
            inputs["keys"] = key_at(keys, said.n_new)
        if self._shifts:
            short = said.n_new < self.settings.min_tokens
            inputs["offset"] = sampling.forbid(self._offset, self.end_id) if short else self._offset
        return inputs

    def choose(self, logits: mx.array, inputs: Inputs, said: Said | None = None) -> mx.array:
        """The next id of each row, ``NOTHING`` where all are forbidden: (B, V) -> (B,), int32.

        A pure function of arrays, unless the rules look back: then it needs what was ``said``.
        """
        logits = self.rule(logits, inputs, said)
        ids = sampling.draw(logits, inputs["keys"]) if self.settings.temperature else sampling.greedy(logits)
        if not self._forbidding():
            return ids.astype(mx.int32)
        return mx.where(mx.max(logits, axis=-1) > -mx.inf, ids.astype(mx.int32), NOTHING)

    def rule(self, logits: mx.array, inputs: Inputs, said: Said | None = None) -> mx.array:
        """The logits after every rule; their softmax is what is drawn from.

        The order is that of transformers (``generation/utils.py``, ``_get_logits_processor``).
        """
        if self._shifts:
            logits = logits + inputs["offset"]  # the vocabulary, the bias, the end while the text is too short
        if self.looks_back:
            assert said is not None
            logits = self._look_back(logits, said)
        return self._narrow(logits, inputs) if self.settings.temperature else logits

    def _look_back(self, logits: mx.array, said: Said) -> mx.array:
        """The rules that depend on the text so far."""
        given = self.settings
        if given.repetition_penalty != 1:
            logits = sampling.penalize_repetition(logits, said.ids, given.repetition_penalty)
        if given.frequency_penalty:
            logits = sampling.penalize_frequency(logits, said.new, given.frequency_penalty)
        if given.presence_penalty:
            logits = sampling.penalize_presence(logits, said.new, given.presence_penalty)
        if given.no_repeat_ngram:
            logits = sampling.block_ngrams(logits, said.ids, given.no_repeat_ngram)
        if self._banned:
            logits = sampling.ban_sequences(logits, said.ids, self._banned)
        if self._forced:
            logits = sampling.force_sequences(logits, said.new, self._forced, self.end_id, said.left)
        return logits

    def _narrow(self, logits: mx.array, inputs: Inputs) -> mx.array:
        """Temperature, and the rules that then leave the improbable out."""
        given = self.settings
        if given.temperature != 1:
            logits = sampling.with_temperature(logits, inputs["temperature"])
        if given.top_k:
            logits = sampling.keep_top_k(logits, given.top_k)
        if given.top_p < 1:
            logits = sampling.keep_top_p(logits, inputs["top_p"])
        if given.min_p:
            logits = sampling.keep_min_p(logits, inputs["min_p"])
        if given.typical_p < 1:
            logits = sampling.keep_typical(logits, inputs["typical_p"])
        return logits

    def nothing_left(self) -> UsageError:
        """What to raise where every id is forbidden: it names the rules that forbid."""
        return UsageError(f"no token is left to say: {' and '.join(self._forbidding())} forbid all; relax one of them")

    def _forbidding(self) -> list[str]:
        given = self.settings
        rules = {
            "--logit-bias": given.logit_bias,
            "--no-repeat-ngram": given.no_repeat_ngram,
            "--ban": given.ban,
            "--min-tokens": given.min_tokens,
            "--force": given.force,
        }
        return [flag for flag, setting in rules.items() if setting]

    def _refuse_contradictions(self) -> None:
        for word, forced in zip(self.settings.force, self._forced, strict=True):
            forbidden = self._banned + [[i] for i, bias in self.settings.logit_bias.items() if bias == -inf]
            if any(forced[i : i + len(ids)] == ids for ids in forbidden for i in range(len(forced))):
                raise UsageError(f"--force {word!r} contradicts --ban or --logit-bias, which forbid it; drop one")
        needed = sum(map(len, self._forced))
        if needed > self.settings.max_tokens:
            raise UsageError(
                f"--force asks for words of {needed} tokens, --max-tokens allows {self.settings.max_tokens}; raise it"
            )


def _bias(settings: Settings, known: np.ndarray) -> mx.array:
    bias = np.zeros(known.size, dtype=np.float32)
    for token_id, value in settings.logit_bias.items():
        if not (0 <= token_id < known.size and known[token_id]):
            raise UsageError(
                f"logit-bias: no token has id {token_id}; the vocabulary's ids are 0 to {known.nonzero()[0].max()}"
            )
        bias[token_id] = value
    return mx.array(bias)
