"""From logits to the next id: one small function per rule, composed by ``make_sampler``.

Each rule takes logits (B, V) and returns logits (B, V): it forbids ids by setting them to -inf and leaves the others
as they are, so the softmax over the rest renormalises by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_gpt.errors import UsageError

Sampler = Callable[[mx.array], mx.array]  # logits (B, V) -> ids (B,)


def keep_vocabulary(logits: mx.array, vocab_size: int) -> mx.array:
    """Forbid the ids that the tokenizer does not have: a padded vocabulary's last rows mean nothing."""
    return mx.where(mx.arange(logits.shape[-1]) < vocab_size, logits, -mx.inf)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keep the k most probable ids, and those as probable as the k-th (Fan et al. 2018)."""
    k = min(k, logits.shape[-1])
    kth = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < kth, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the nucleus: the fewest most probable ids whose probabilities sum to at least p (Holtzman et al. 2020).

    An id stays if those more probable than it do not reach p by themselves; the first always stays.
    """
    order = mx.argsort(-logits, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    dropped = mx.take_along_axis(before >= p, mx.argsort(order, axis=-1), axis=-1)
    return mx.where(dropped, -mx.inf, logits)


def greedy(logits: mx.array) -> mx.array:
    """The most probable id."""
    return mx.argmax(logits, axis=-1)


def make_sampler(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, *, vocab_size: int | None = None
) -> Sampler:
    """Compose the rules, in this order: vocabulary, temperature, top-k, top-p, draw.

    Temperature 0 is greedy and draws nothing; ``top_k=0`` and ``top_p=1`` keep everything. The draw is from MLX's
    global random state (``mx.random.seed``). Raises ``UsageError`` for a value that makes no sense.
    """
    if not 0 <= temperature < float("inf"):
        raise UsageError(
            f"temperature must be 0 (greedy) or above, not {temperature}; 1 is the model's own distribution"
        )
    if top_k < 0:
        raise UsageError(f"top-k must be 0 (off) or a number of ids, not {top_k}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top-p must be above 0 and at most 1 (off), not {top_p}")

    def sample(logits: mx.array) -> mx.array:
        if vocab_size is not None and vocab_size < logits.shape[-1]:
            logits = keep_vocabulary(logits, vocab_size)
        if temperature == 0:
            return greedy(logits)
        logits = logits * (1 / temperature)
        if top_k:
            logits = keep_top_k(logits, top_k)
        if top_p < 1:
            logits = keep_top_p(logits, top_p)
        return mx.random.categorical(logits)

    return sample
