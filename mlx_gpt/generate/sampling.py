"""The sampling rules, each a pure function of logits (B, V) that returns logits (B, V).

A rule forbids an id by -inf; the softmax over the rest renormalises. Some rules also depend on ``ids`` (B, L), the text
so far, padded with -1 at the beginning. A number may be an array of one per row, (B, 1). ``sampler.py`` composes the
rules in the order of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

Number = float | mx.array  # in a compiled function an array, so that a new value needs no new kernel

# Before temperature: penalized, forbidden and forced ids.


def forbid(logits: mx.array, ids: Sequence[int]) -> mx.array:
    """Forbid some ids, such as the end tokens while the text is too short to end."""
    is_forbidden = mx.any(mx.arange(logits.shape[-1])[:, None] == mx.array([*ids], mx.int32), axis=-1)  # (V,)
    return mx.where(is_forbidden, -mx.inf, logits)


def count_ids(ids: mx.array, vocab_size: int) -> mx.array:
    """Count the occurrences of each id in each row: (B, L) -> (B, V), float32."""
    rows = mx.arange(ids.shape[0])[:, None]
    is_token = (ids >= 0).astype(mx.float32)
    return mx.zeros((ids.shape[0], vocab_size)).at[rows, mx.maximum(ids, 0)].add(is_token)


def penalize_repetition(logits: mx.array, ids: mx.array, penalty: Number) -> mx.array:
    """Divide the positive logits of ids that occur in the text by ``penalty``, multiply the negative ones by it.

    Keskar et al. 2019, section 4.1, in transformers' form. The prompt counts.
    """
    penalized = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(count_ids(ids, logits.shape[-1]) > 0, penalized, logits)


def penalize_presence(logits: mx.array, ids: mx.array, penalty: Number) -> mx.array:
    """Subtract ``penalty`` from the logits of ids that occur in ``ids``, the generated text (OpenAI)."""
    return logits - penalty * (count_ids(ids, logits.shape[-1]) > 0)


def penalize_frequency(logits: mx.array, ids: mx.array, penalty: Number) -> mx.array:
    """Subtract ``penalty`` from a logit for each occurrence of its id in ``ids``, the generated text (OpenAI)."""
    return logits - penalty * count_ids(ids, logits.shape[-1])


def block_ngrams(logits: mx.array, ids: mx.array, n: int) -> mx.array:
    """Forbid the ids that would complete an n-gram of the text (Paulus et al. 2017, section 2.5)."""
    B, L = ids.shape
    if n > L:
        return logits
    matches = mx.ones((B, L - n + 1), dtype=mx.bool_)  # windows that begin with the last n - 1 ids
    for j in range(n - 1):
        last = ids[:, L - n + 1 + j : L - n + 2 + j]
        matches = matches & (ids[:, j : L - n + 1 + j] == last) & (last >= 0)
    return mx.where(count_ids(mx.where(matches, ids[:, n - 1 :], -1), logits.shape[-1]) > 0, -mx.inf, logits)


def ban_sequences(logits: mx.array, ids: mx.array, sequences: Sequence[Sequence[int]]) -> mx.array:
    """Forbid the last id of each sequence where the text ends with the ids before it."""
    vocabulary = mx.arange(logits.shape[-1])
    for *prefix, last in sequences:
        logits = mx.where(ends_with(ids, prefix)[:, None] & (vocabulary == last), -mx.inf, logits)
    return logits


def force_sequences(
    logits: mx.array, ids: mx.array, sequences: Sequence[Sequence[int]], end_ids: Sequence[int], left: mx.array
) -> mx.array:
    """Require each sequence in ``ids``, the generated text.

    The text may not end without them. Once the missing ones need all of the ``left`` (B, 1) tokens, only their ids are
    allowed, in order, even if another rule forbids them.
    """
    B = ids.shape[0]
    vocabulary = mx.arange(logits.shape[-1])
    needed, next_id = mx.zeros((B, 1), mx.int32), mx.full((B, 1), -1)
    for sequence in reversed(sequences):  # the first that is missing decides the next id
        missing = ~contains(ids, sequence)[:, None]
        needed = mx.where(missing, needed + len(sequence), needed)
        next_id = mx.where(missing, next_of(ids, sequence)[:, None], next_id)
    logits = mx.where(needed > 0, forbid(logits, end_ids), logits)
    return mx.where((needed >= left) & (next_id >= 0), mx.where(vocabulary == next_id, 0, -mx.inf), logits)


def contains(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """Return True for rows that contain the sequence: (B, L) -> (B,)."""
    B, L = ids.shape
    windows = L - len(sequence) + 1
    if windows < 1:
        return mx.zeros((B,), dtype=mx.bool_)
    found = mx.ones((B, windows), dtype=mx.bool_)
    for j, token_id in enumerate(sequence):
        found = found & (ids[:, j : j + windows] == token_id)
    return mx.any(found, axis=-1)


def ends_with(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """Return True for rows that end with the sequence, as all do with an empty one: (B, L) -> (B,)."""
    return contains(ids[:, max(0, ids.shape[1] - len(sequence)) :], sequence)


def next_of(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """Return the id of a sequence that continues its longest prefix at the end of each row: (B, L) -> (B,)."""
    next_id = mx.full((ids.shape[0],), sequence[0])
    for n in range(1, len(sequence)):
        next_id = mx.where(ends_with(ids, sequence[:n]), sequence[n], next_id)
    return next_id


# The distribution to draw from: temperature and truncation.


def with_temperature(logits: mx.array, temperature: Number) -> mx.array:
    """Divide the logits by ``temperature``: below 1 sharpens the distribution, above 1 flattens it.

    The maximum is subtracted first, so that low temperatures do not overflow.
    """
    return (logits - mx.max(logits, axis=-1, keepdims=True)) / mx.maximum(temperature, 1e-30)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k most probable ids, and ids as probable as the k-th (Fan et al. 2018)."""
    k = min(k, logits.shape[-1])
    kth = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < kth, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: Number) -> mx.array:
    """Keep the nucleus: the fewest most probable ids whose probabilities sum to at least p (Holtzman et al. 2020).

    Ids as probable as the last of them are kept too.
    """
    ascending = mx.sort(logits, axis=-1)
    cumulative = mx.cumsum(mx.softmax(ascending, axis=-1, precise=True), axis=-1)
    last = mx.min(mx.where(cumulative > 1 - p, ascending, ascending[:, -1:]), axis=-1, keepdims=True)
    return mx.where(logits < last, -mx.inf, logits)


def keep_min_p(logits: mx.array, p: Number) -> mx.array:
    """Keep the ids that are at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    return mx.where(logits < mx.max(logits, axis=-1, keepdims=True) + mx.log(mx.array(p)), -mx.inf, logits)


def keep_typical(logits: mx.array, p: Number) -> mx.array:
    """Keep the ids whose surprise -log p is nearest to the entropy, until they sum to p (Meister et al. 2023)."""
    surprise = mx.logsumexp(logits, axis=-1, keepdims=True) - logits
    probabilities = mx.exp(-surprise)
    entropy = mx.sum(mx.where(probabilities > 0, probabilities * surprise, 0), axis=-1, keepdims=True)
    distance = mx.abs(surprise - entropy)
    order = mx.argsort(distance, axis=-1)
    cumulative = mx.cumsum(mx.take_along_axis(probabilities, order, axis=-1), axis=-1)
    n = mx.minimum(mx.sum(cumulative < p, axis=-1, keepdims=True), logits.shape[-1] - 1)
    farthest = mx.take_along_axis(distance, mx.take_along_axis(order, n, axis=-1), axis=-1)
    return mx.where(distance > farthest, -mx.inf, logits)


# The choice of an id.


def greedy(logits: mx.array) -> mx.array:
    """Return the most probable id: (B, V) -> (B,)."""
    return mx.argmax(logits, axis=-1)


def draw(logits: mx.array, keys: mx.array) -> mx.array:
    """Draw an id from each row's distribution with the row's own key: (B, V), (B, 2) -> (B,)."""
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)
