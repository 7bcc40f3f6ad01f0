"""MLX's memory limits during a session of generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gpt.model.gpt import GPT

WIRED_FROM = 1 << 30  # bytes of weights; smaller ones are read back in less time than wiring takes
RESERVE = 1 << 29  # bytes beyond weights and cache: activations, logits, the sampler
FREED = 64 << 20  # least bytes of freed buffers that are kept


@contextmanager
def memory_limits(model: GPT, rows: int = 1) -> Iterator[None]:
    """Limit MLX's memory while texts of ``rows`` rows at once are generated; restore the limits on exit.

    Without the limit on freed buffers those of every text length stay allocated. On Metal large weights and their cache
    are kept resident, or the system may page them out between steps. Use it once per session, not per text: each
    change of the wired limit moves all weights. On exit the limits are restored even if waiting for the GPU raises.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    with ExitStack() as on_exit:  # the last callback runs first, and all of them run
        on_exit.callback(mx.set_cache_limit, mx.set_cache_limit(max(weight_bytes // 10, FREED)))
        if mx.metal.is_available() and weight_bytes >= WIRED_FROM:
            config = model.config
            cache = 2 * 4 * rows * config.n_layer * config.n_positions * config.n_embd  # keys and values, in float32
            most = int(mx.device_info()["max_recommended_working_set_size"])
            needed = min(weight_bytes + cache + RESERVE, most)
            on_exit.callback(mx.set_wired_limit, mx.set_wired_limit(needed))
            on_exit.callback(mx.synchronize)  # the weights stay wired until no kernel reads them
        yield
