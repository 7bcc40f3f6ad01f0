"""Several tokens for one reading of the weights: something quick guesses ahead, the model looks at all guesses at once.

A guess stays with such a probability that the text is the model's own (Leviathan et al. 2023, section 2.3; Chen et al.
2023): taken greedily it is the same text, drawn it comes from the same distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.rng import key_at
from mlx_gpt.generate.sampler import NOTHING, Said, Sampler
from mlx_gpt.generate.sampling import draw, greedy
from mlx_gpt.generate.settings import SLIDE
from mlx_gpt.model.gpt import GPT

GUESS, ACCEPT, CORRECT = 0, 1, 2  # what a key is used for


class Guess(NamedTuple):
    """The next n ids, (1, n), and the distributions they were drawn from, (1, n, V); None where they are certain."""

    ids: mx.array
    q: mx.array | None


class Draft(Protocol):
    """What guesses the next n tokens of a text; None where nothing comes to mind."""

    def guess(self, said: Said, keys: mx.array, n: int) -> Guess | None: ...


class PromptLookup:
    """Guesses that the text goes on as it did when its last ids were said before (Saxena 2023, prompt lookup)."""

    def guess(self, said: Said, keys: mx.array, n: int) -> Guess | None:
        ids = numbers(said.ids[0])
        for m in (3, 2):
            for start in range(len(ids) - m - 1, -1, -1):
                if ids[start : start + m] == ids[-m:]:
                    found = ids[start + m : start + m + n]
                    return Guess(mx.array([found + found[-1:] * (n - len(found))]), None)
        return None


class DraftModel:
    """A smaller model of the same vocabulary, which guesses by the same rules."""

    def __init__(self, model: GPT, sampler: Sampler):
        self.decoder = Decoder(model)
        self.sampler = sampler
        self._start = 0  # where in the text its context begins
        self._seen: list[int] = []  # the ids in its cache

    def guess(self, said: Said, keys: mx.array, n: int) -> Guess | None:
        if n > self.decoder.model.config.n_positions // 2:
            return None
        logits = self._read(numbers(said.ids[0]), n)
        ids: list[mx.array] = []
        q: list[mx.array] = []
        for _ in range(n):
            if ids:
                logits = self.decoder.step(ids[-1][:, None])[:, -1]
            q.append(distribution(self.sampler, logits, said, keys))
            ids.append(mx.maximum(draw_from(q[-1], key_at(keys, said.n_new, GUESS)), 0))
            said = said.then(ids[-1])
        guess = Guess(mx.stack(ids, axis=1), mx.stack(q, axis=1))
        self._seen += numbers(guess.ids[0, :-1])
        return guess

    def _read(self, text: list[int], n: int) -> mx.array:
        """Logits after the text, (1, V). Of its beginning the cache knows as much as agrees with what it has seen."""
        P = self.decoder.model.config.n_positions
        if len(text) - self._start + n > P:
            self._start = max(0, len(text) - P // 2)
        ids = text[self._start :]
        known = 0
        while known < min(len(self._seen), len(ids) - 1) and self._seen[known] == ids[known]:
            known += 1
        self._seen = ids
        if not known:
            return self.decoder.prefill(mx.array([ids]))
        self.decoder.rewind(self.decoder.offset - known)
        new = mx.array([ids[known:]])
        return self.decoder.step(new)[:, -1] if new.size <= 2 else self.decoder.read(new)


def speculate(
    decoder: Decoder, sampler: Sampler, draft: Draft, said: Said, logits: mx.array, keys: mx.array
) -> Iterator[tuple[list[int], mx.array]]:
    """The ids that follow the prompt in ``said``, some at each step of the model, and the logits of each, (ids, V).

    The decoder has read the prompt, and ``logits`` (1, V) are what the model says after it. Ends where the context is
    full, unless it is to slide: then its last half is read anew.
    """
    P, n, slide = decoder.model.config.n_positions, sampler.settings.guesses, sampler.settings.context == SLIDE
    while True:
        ids = sampler.choose(logits, sampler.inputs(said, keys), said)  # (1,)
        said.add(ids)
        yield numbers(ids), logits
        while decoder.offset + n < P and (guess := draft.guess(said, keys, n)):
            logits = decoder.step(mx.concatenate([said.ids[:, -1:], guess.ids], axis=1))  # (1, n + 1, V)
            p = mx.stack(
                [distribution(sampler, logits[:, i], said.then(guess.ids[:, :i]), keys) for i in range(n + 1)], axis=1
            )
            n_kept, correction = accept(p, guess, key_at(keys, said.n_new, ACCEPT), key_at(keys, said.n_new, CORRECT))
            kept = int(n_kept.item())  # type: ignore[arg-type]
            decoder.rewind(n - kept)
            new = mx.concatenate([guess.ids[:, :kept], correction[:, None]], axis=1)
            said.add(new)
            yield numbers(new[0]), logits[0, : kept + 1]
        if decoder.offset < P:
            logits = decoder.step(said.ids[:, -1:])[:, -1]
        elif slide:
            logits = decoder.prefill(said.ids[:, -(P // 2) :])
        else:
            return


def accept(p: mx.array, guess: Guess, accept_keys: mx.array, correct_keys: mx.array) -> tuple[mx.array, mx.array]:
    """How many of the n guesses are kept, (B,), and the id that comes after them, (B,).

    ``p`` (B, n + 1, V) is what the model says comes after each guess. A guess x is kept with probability
    min(1, p(x) / q(x)). At the first that is not, x is drawn from what p gives more than q, which makes up for it
    exactly; after all of them, from p.
    """
    drawn = guess.ids[:, :, None]  # (B, n, 1)
    n = drawn.shape[1]
    p_drawn = mx.take_along_axis(p[:, :n], drawn, axis=-1)[..., 0]  # (B, n)
    if guess.q is None:
        q_drawn, rest = mx.ones_like(p_drawn), mx.where(mx.arange(p.shape[-1]) == drawn, 0, p[:, :n])
    else:
        q_drawn = mx.take_along_axis(guess.q, drawn, axis=-1)[..., 0]
        rest = mx.maximum(p[:, :n] - guess.q, 0)
    u = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))(accept_keys)
    kept = mx.sum(mx.cumprod((u * q_drawn < p_drawn).astype(mx.int32), axis=1), axis=1)  # (B,)
    rest = mx.concatenate([rest, p[:, n:]], axis=1)  # (B, n + 1, V)
    rest = mx.take_along_axis(rest, kept[:, None, None], axis=1)[:, 0]  # (B, V)
    return kept, draw_from(rest, correct_keys)


def distribution(sampler: Sampler, logits: mx.array, said: Said, keys: mx.array) -> mx.array:
    """What the sampler draws from, (B, V); a 1 for the most probable at temperature 0; all 0 where all is forbidden."""
    logits = sampler.rule(logits, sampler.inputs(said, keys), said)[:, : sampler.vocab_size]
    possible = mx.max(logits, axis=-1, keepdims=True) > -mx.inf
    if sampler.settings.temperature:
        p = mx.softmax(logits, axis=-1, precise=True)
    else:
        p = (mx.arange(logits.shape[-1]) == greedy(logits)[:, None]).astype(mx.float32)
    return mx.where(possible, p, 0)


def draw_from(p: mx.array, keys: mx.array) -> mx.array:
    """An id from probabilities that need not sum to one, ``NOTHING`` where all are 0: (B, V) -> (B,)."""
    return mx.where(mx.max(p, axis=-1) > 0, draw(mx.log(p), keys).astype(mx.int32), NOTHING)


def numbers(ids: mx.array) -> list[int]:
    """Ids, (L,), out of MLX."""
    return [int(i) for i in ids.tolist()]  # type: ignore[union-attr, arg-type]
