"""The rules by which the next token is chosen: each a small pure function of logits.

A rule takes logits (B, V) and returns logits (B, V). It forbids an id by -inf and leaves those that it keeps as they
are, so that the softmax over the rest renormalises by itself. Some also look at ``ids`` (B, L), the text so far, where
-1 stands for no token: the padding before a shorter row. ``sampler.py`` composes them, in the order of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

Number = float | mx.array  # in a compiled function an array, so that another value needs no other kernel

# Before temperature: what may be said at all.


def keep_ids(logits: mx.array, kept: mx.array) -> mx.array:
    """Forbid the ids that are not ``kept`` (V,): a padded vocabulary's last rows mean nothing to the tokenizer."""
    return mx.where(kept, logits, -mx.inf)


def add_bias(logits: mx.array, bias: mx.array) -> mx.array:
    """Add to each id's logit its ``bias`` (V,), which may be -inf."""
    return logits + bias


def forbid(logits: mx.array, token_id: int) -> mx.array:
    """Forbid one id, as that of ``<|endoftext|>`` while the text is too short to end."""
    return mx.where(mx.arange(logits.shape[-1]) == token_id, -mx.inf, logits)


def count_ids(ids: mx.array, vocab_size: int) -> mx.array:
    """How often each id occurs in each row: (B, L) -> (B, V), float32."""
    rows = mx.arange(ids.shape[0])[:, None]
    said = (ids >= 0).astype(mx.float32)
    return mx.zeros((ids.shape[0], vocab_size)).at[rows, mx.maximum(ids, 0)].add(said)


def penalize_repetition(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """Divide the positive logits of ids that occur in the text by ``penalty``, multiply the negative ones by it.

    Keskar et al. 2019, section 4.1, in the form that transformers gave it. The prompt counts.
    """
    penalized = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(count_ids(ids, logits.shape[-1]) > 0, penalized, logits)


def penalize_presence(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """Take ``penalty`` off the logits of ids that occur in ``ids``, here what was said after the prompt (OpenAI)."""
    return logits - penalty * (count_ids(ids, logits.shape[-1]) > 0)


def penalize_frequency(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """Take ``penalty`` off a logit for each time that its id occurs in ``ids``, as above (OpenAI)."""
    return logits - penalty * count_ids(ids, logits.shape[-1])


def block_ngrams(logits: mx.array, ids: mx.array, n: int) -> mx.array:
    """Forbid what would complete a run of ``n`` ids that the text already holds (Paulus et al. 2017, section 2.5)."""
    B, L = ids.shape
    if n > L:
        return logits
    begun = mx.ones((B, L - n + 1), dtype=mx.bool_)  # window by window: does it begin as the text ends?
    for j in range(n - 1):
        now = ids[:, L - n + 1 + j : L - n + 2 + j]
        begun = begun & (ids[:, j : L - n + 1 + j] == now) & (now >= 0)
    return mx.where(count_ids(mx.where(begun, ids[:, n - 1 :], -1), logits.shape[-1]) > 0, -mx.inf, logits)


def ban_sequences(logits: mx.array, ids: mx.array, sequences: Sequence[Sequence[int]]) -> mx.array:
    """Forbid the last id of each sequence where the text ends with the ids before it."""
    vocabulary = mx.arange(logits.shape[-1])
    for *beginning, last in sequences:
        begun = ends_with(ids, beginning)[:, None]
        logits = mx.where(begun & (vocabulary == last), -mx.inf, logits)
    return logits


def force_sequences(
    logits: mx.array, ids: mx.array, sequences: Sequence[Sequence[int]], end_id: int, left: mx.array
) -> mx.array:
    """See to it that each sequence is said: the text may not end without, and once the missing ones need all the tokens
    that may still come, ``left`` (B, 1), they alone may come, in their order and whatever forbids them.

    ``ids`` is what was said after the prompt.
    """
    B = ids.shape[0]
    vocabulary = mx.arange(logits.shape[-1])
    needed, due = mx.zeros((B, 1), mx.int32), mx.full((B, 1), -1)  # tokens; the id to say next
    for sequence in reversed(sequences):  # so that the first that is missing has the last word
        missing = ~contains(ids, sequence)[:, None]
        needed = mx.where(missing, needed + len(sequence), needed)
        due = mx.where(missing, next_of(ids, sequence)[:, None], due)
    logits = mx.where((needed > 0) & (vocabulary == end_id), -mx.inf, logits)
    return mx.where((needed >= left) & (due >= 0), mx.where(vocabulary == due, 0, -mx.inf), logits)


def contains(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """Whether the ids of each row hold the sequence: (B, L) -> (B,)."""
    B, L = ids.shape
    windows = L - len(sequence) + 1
    if windows < 1:
        return mx.zeros((B,), dtype=mx.bool_)
    found = mx.ones((B, windows), dtype=mx.bool_)
    for j, token_id in enumerate(sequence):
        found = found & (ids[:, j : j + windows] == token_id)
    return mx.any(found, axis=-1)


def ends_with(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """Whether each row ends with the sequence, as every row does with an empty one: (B, L) -> (B,)."""
    return contains(ids[:, max(0, ids.shape[1] - len(sequence)) :], sequence)


def next_of(ids: mx.array, sequence: Sequence[int]) -> mx.array:
    """The id that goes on with a sequence, as far as each row ends with its beginning: (B, L) -> (B,)."""
    due = mx.full((ids.shape[0],), sequence[0])
    for said in range(1, len(sequence)):
        due = mx.where(ends_with(ids, sequence[:said]), sequence[said], due)
    return due


# Temperature and what comes after it: which of the probable ones.


def with_temperature(logits: mx.array, temperature: Number) -> mx.array:
    """Below 1 the probable become more probable, above 1 all become more alike: logits divided by it.

    The highest becomes 0 first, so that nothing overflows at the lowest temperatures.
    """
    return (logits - mx.max(logits, axis=-1, keepdims=True)) / mx.maximum(temperature, 1e-30)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k most probable ids, and those as probable as the k-th (Fan et al. 2018)."""
    k = min(k, logits.shape[-1])
    kth = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < kth, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: Number) -> mx.array:
    """Keep the nucleus: the fewest most probable ids whose probabilities sum to at least p (Holtzman et al. 2020).

    Those as probable as the last of them stay too.
    """
    rising = mx.sort(logits, axis=-1)
    so_far = mx.cumsum(mx.softmax(rising, axis=-1, precise=True), axis=-1)  # of an id and all less probable ones
    last = mx.min(mx.where(so_far > 1 - p, rising, rising[:, -1:]), axis=-1, keepdims=True)
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
    so_far = mx.cumsum(mx.take_along_axis(probabilities, order, axis=-1), axis=-1)
    n = mx.minimum(mx.sum(so_far < p, axis=-1, keepdims=True), logits.shape[-1] - 1)
    farthest = mx.take_along_axis(distance, mx.take_along_axis(order, n, axis=-1), axis=-1)
    return mx.where(distance > farthest, -mx.inf, logits)


# The choice.


def greedy(logits: mx.array) -> mx.array:
    """The most probable id: (B, V) -> (B,)."""
    return mx.argmax(logits, axis=-1)


def draw(logits: mx.array, keys: mx.array) -> mx.array:
    """An id from each row's distribution, by the row's own key: (B, V), (B, 2) -> (B,).

    A row's draw does not depend on the rows beside it.
    """
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)
