"""Speculative decoding: a draft proposes several tokens, and the model verifies all of them in one step.

A proposal is accepted with a probability that keeps the model's distribution (Leviathan et al. 2023, section 2.3; Chen
et al. 2023); greedy text is the same token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_gpt.generate.decoder import NO_TOKEN, Decoder
from mlx_gpt.generate.history import History
from mlx_gpt.generate.rng import key_at
from mlx_gpt.generate.sampler import Sampler
from mlx_gpt.generate.sampling import draw, greedy
from mlx_gpt.generate.settings import SLIDE
from mlx_gpt.model.gpt import GPT

PROPOSE, ACCEPT, CORRECT = 0, 1, 2  # the uses of a key


class Proposal(NamedTuple):
    """The next n ids, (1, n), and the distributions they were drawn from, (1, n, V); None if nothing was drawn."""

    ids: mx.array
    q: mx.array | None


class PromptLookup:
    """Proposes the ids that followed the last occurrence of the text's last three or two ids (Saxena 2023)."""

    def propose(self, history: History, n: int) -> Proposal | None:
        ids = id_list(history.ids[0])
        for m in (3, 2):
            for start in range(len(ids) - m - 1, -1, -1):
                if ids[start : start + m] == ids[-m:]:
                    found = ids[start + m : start + m + n]
                    return Proposal(mx.array([found + found[-1:] * (n - len(found))]), None)
        return None


class DraftModel:
    """Proposes tokens of a smaller model with the same vocabulary, drawn by the same rules."""

    def __init__(self, model: GPT, sampler: Sampler):
        self.decoder = Decoder(model)
        self.sampler = sampler
        self._start = 0  # where its context begins in the text
        self._cached: list[int] = []  # the ids in its cache

    def propose(self, history: History, n: int) -> Proposal | None:
        if n > self.decoder.model.config.n_positions // 2:
            return None
        logits = self._read(id_list(history.ids[0]), n)
        ids: list[mx.array] = []
        q: list[mx.array] = []
        for _ in range(n):
            if ids:
                logits = self.decoder.step(ids[-1])[:, -1]
            q.append(distribution(self.sampler, logits, history))
            drawn = draw_from(q[-1], key_at(self.sampler.keys, history.n_new, PROPOSE))
            ids.append(mx.maximum(drawn, 0)[:, None])
            history = history.then(ids[-1])
        proposal = Proposal(mx.concatenate(ids, axis=1), mx.stack(q, axis=1))
        self._cached += id_list(proposal.ids[0, :-1])
        return proposal

    def _read(self, text: list[int], n: int) -> mx.array:
        """Return the logits after the text, (1, V), reading only what differs from the ids in the cache."""
        P = self.decoder.model.config.n_positions
        if len(text) - self._start + n > P:
            self._start = max(0, len(text) - P // 2)
        ids = text[self._start :]
        n_equal = min(common_prefix(self._cached, ids), len(ids) - 1)
        self._cached = ids
        if not n_equal:
            return self.decoder.prefill(mx.array([ids]))
        self.decoder.rewind(self.decoder.offset - n_equal)
        new = mx.array([ids[n_equal:]])
        return self.decoder.step(new)[:, -1] if new.size <= 2 else self.decoder.extend(new)


Draft = PromptLookup | DraftModel  # their ``propose`` gives the next n tokens of a text, or None


def speculate(
    decoder: Decoder, sampler: Sampler, draft: Draft, history: History, logits: mx.array
) -> Iterator[tuple[list[int], mx.array]]:
    """Yield the ids that follow the prompt in ``history``, some at each step, and the logits of each, (ids, V).

    The decoder has read the prompt, and ``logits`` (1, V) follow it. Ends when the context is full unless it slides:
    then its last half is read again.
    """
    settings, P = sampler.settings[0], decoder.model.config.n_positions
    n = settings.guesses
    while True:
        ids = sampler.choose(logits, sampler.inputs(history), history)  # (1,)
        history = history.then(ids[:, None])
        yield id_list(ids), logits
        while decoder.offset + n < P and (proposal := draft.propose(history, n)):
            logits = decoder.step(mx.concatenate([history.ids[:, -1:], proposal.ids], axis=1))  # (1, n + 1, V)
            prefixes = [history.then(proposal.ids[:, :i]) for i in range(n + 1)]
            p = mx.stack([distribution(sampler, logits[:, i], text) for i, text in enumerate(prefixes)], axis=1)
            keys = [key_at(sampler.keys, history.n_new, use) for use in (ACCEPT, CORRECT)]
            n_kept, correction = accept(p, proposal, *keys)
            kept = int(n_kept.item())  # type: ignore[arg-type]
            decoder.rewind(n - kept)
            new = mx.concatenate([proposal.ids[:, :kept], correction[:, None]], axis=1)
            history = history.then(new)
            yield id_list(new[0]), logits[0, : kept + 1]
        if decoder.offset < P:
            logits = decoder.step(history.ids[:, -1:])[:, -1]
        elif settings.context == SLIDE:
            logits = decoder.prefill(history.ids[:, -(P // 2) :])
        else:
            return


def accept(p: mx.array, proposal: Proposal, accept_keys: mx.array, correct_keys: mx.array) -> tuple[mx.array, mx.array]:
    """Return how many of the n proposals are accepted, (B,), and the id that follows them, (B,).

    ``p`` (B, n + 1, V) is the model's distribution before each proposal and after the last. Proposal x is accepted with
    probability min(1, p(x) / q(x)). In place of the first rejected one, an id is drawn from max(0, p - q), normalized;
    after all n, from p.
    """
    drawn = proposal.ids[:, :, None]  # (B, n, 1)
    n = drawn.shape[1]
    p_drawn = mx.take_along_axis(p[:, :n], drawn, axis=-1)[..., 0]  # (B, n)
    if proposal.q is None:
        q_drawn, residual = mx.ones_like(p_drawn), mx.where(mx.arange(p.shape[-1]) == drawn, 0, p[:, :n])
    else:
        q_drawn = mx.take_along_axis(proposal.q, drawn, axis=-1)[..., 0]
        residual = mx.maximum(p[:, :n] - proposal.q, 0)
    u = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))(accept_keys)
    kept = mx.sum(mx.cumprod((u * q_drawn < p_drawn).astype(mx.int32), axis=1), axis=1)  # (B,)
    residual = mx.concatenate([residual, p[:, n:]], axis=1)  # (B, n + 1, V)
    residual = mx.take_along_axis(residual, kept[:, None, None], axis=1)[:, 0]  # (B, V)
    return kept, draw_from(residual, correct_keys)


def distribution(sampler: Sampler, logits: mx.array, history: History) -> mx.array:
    """Return the sampler's distribution of the known ids, (B, V'); one-hot at temperature 0, 0 if all are forbidden."""
    logits = sampler.apply_rules(logits, sampler.inputs(history), history)
    logits = logits[:, : sampler.vocabulary.tokenizer.vocab_size]
    possible = mx.max(logits, axis=-1, keepdims=True) > -mx.inf
    if sampler.settings[0].temperature:
        p = mx.softmax(logits, axis=-1, precise=True)
    else:
        p = (mx.arange(logits.shape[-1]) == greedy(logits)[:, None]).astype(mx.float32)
    return mx.where(possible, p, 0)


def draw_from(p: mx.array, keys: mx.array) -> mx.array:
    """Draw an id from unnormalized probabilities, ``NO_TOKEN`` where all are 0: (B, V) -> (B,)."""
    return mx.where(mx.max(p, axis=-1) > 0, draw(mx.log(p), keys).astype(mx.int32), NO_TOKEN)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many ids at the beginning of both lists are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def id_list(ids: mx.array) -> list[int]:
    """Return ids, (L,), as a list."""
    return [int(i) for i in ids.tolist()]  # type: ignore[union-attr, arg-type]
