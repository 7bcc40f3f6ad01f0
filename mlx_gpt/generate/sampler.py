"""The rules that some settings ask for, composed: logits and the text so far in, the next id out."""

from __future__ import annotations

from math import inf

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.generate.settings import Settings
from mlx_gpt.text.tokenizer import Tokenizer

NOTHING = -1  # drawn where the rules forbid every id


class Said:
    """The text so far, for the rules that look back: ``ids`` (B, L), and of them ``new``, what came after the prompt.

    Shorter rows begin with -1. ``left`` (B, 1) is the number of tokens that may still come.
    """

    def __init__(self, prompt: mx.array, left: mx.array):
        self.left = left
        self.n_new = 0
        self._n_prompt = prompt.shape[1]
        self._parts = [prompt]

    def then(self, tokens: mx.array) -> Said:
        """The text with T tokens more, (B, T)."""
        longer = Said(self._parts[0], self.left - tokens.shape[1])
        longer.n_new, longer._n_prompt = self.n_new + tokens.shape[1], self._n_prompt
        longer._parts = [*self._parts, tokens.astype(mx.int32)]
        return longer

    @property
    def ids(self) -> mx.array:
        if len(self._parts) > 1:  # put together when a rule asks, and only then
            self._parts = [mx.concatenate(self._parts, axis=1)]
        return self._parts[0]

    @property
    def new(self) -> mx.array:
        return self.ids[:, self._n_prompt :]


class Sampler:
    """Chooses the next id as ``settings`` say. ``vocab_size`` is the model's, which may be padded.

    Raises ``UsageError`` for what the vocabulary does not allow: a bias for an id that is not there, a word that is
    both banned and forced.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer, vocab_size: int):
        self.settings = settings
        self.end_id = tokenizer.eot_id
        known = np.zeros(vocab_size, dtype=bool)
        known[[*tokenizer.ranks.values(), *tokenizer.specials.values()]] = True
        self._known = None if known.all() else mx.array(known)
        self._bias = _bias(settings, known) if settings.logit_bias else None
        self._banned = [ids for word in settings.ban for ids in (tokenizer.encode(word), tokenizer.encode(" " + word))]
        self._forced = [tokenizer.encode(" " + word.removeprefix(" ")) for word in settings.force]
        self._refuse_contradictions()

    def __call__(self, logits: mx.array, said: Said, keys: mx.array) -> mx.array:
        """The next id of each row, ``NOTHING`` where all are forbidden: (B, V) -> (B,), int32.

        Each row draws by its own key, (B, 2).
        """
        logits = self.rule(logits, said)
        ids = sampling.draw(logits, keys) if self.settings.temperature else sampling.greedy(logits)
        if not self._forbidding():
            return ids.astype(mx.int32)
        return mx.where(mx.max(logits, axis=-1) > -mx.inf, ids.astype(mx.int32), NOTHING)

    def rule(self, logits: mx.array, said: Said) -> mx.array:
        """The logits after every rule; their softmax is what is drawn from.

        The order is that of transformers (``generation/utils.py``, ``_get_logits_processor``). Temperature 0 takes
        the most probable id, and what narrows the choice further would not change it.
        """
        logits = self.what_may_be_said(logits, said)
        return self.which_of_the_probable(logits) if self.settings.temperature else logits

    def what_may_be_said(self, logits: mx.array, said: Said) -> mx.array:
        """The rules before temperature: they forbid, or change what is probable."""
        given = self.settings
        if self._known is not None:
            logits = sampling.keep_ids(logits, self._known)
        if self._bias is not None:
            logits = sampling.add_bias(logits, self._bias)
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
        if said.n_new < given.min_tokens:
            logits = sampling.forbid(logits, self.end_id)
        if self._forced:
            logits = sampling.force_sequences(logits, said.new, self._forced, self.end_id, said.left)
        return logits

    def which_of_the_probable(self, logits: mx.array) -> mx.array:
        """Temperature, and the rules after it: they leave the improbable out."""
        given = self.settings
        if given.temperature != 1:
            logits = sampling.with_temperature(logits, given.temperature)
        if given.top_k:
            logits = sampling.keep_top_k(logits, given.top_k)
        if given.top_p < 1:
            logits = sampling.keep_top_p(logits, given.top_p)
        if given.min_p:
            logits = sampling.keep_min_p(logits, given.min_p)
        if given.typical_p < 1:
            logits = sampling.keep_typical(logits, given.typical_p)
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
