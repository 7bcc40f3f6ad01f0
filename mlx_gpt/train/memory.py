"""An estimate of the memory that a training step needs.

It adds up the weights with their gradients and the optimizer's two moments, the activations that each block saves for
the backward pass, the temporaries of one block, and the logits. The factors were fitted to ``mx.get_peak_memory`` on a
CPU and on an H100; ``tests/train/test_memory.py`` holds them to ``ERROR``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import cores, n_lanes, on_cpu
from mlx_gpt.errors import UsageError
from mlx_gpt.model import ops
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loss import CHUNK, in_chunks
from mlx_gpt.train.machine import matrix_weights

MAX_BATCH = 1 << 32
ERROR = 0.3  # relative error of the estimate
# Numbers per token, in units of the residual stream's width:
SAVED = 16.4  # that a block saves for the backward pass
MASKS_SAVED = 1.5  # that dropout saves besides
INPUT_SAVED = 1.0  # that --recompute saves of a block
TEMPORARY = 7.0  # that one block at a time holds
SCORES = 256  # scores per head and token that attention in blocks of queries holds
LOGITS, LOGITS_GPU, LOGITS_GPU_CHUNK = 3.3, 1.1, 2.2  # numbers per logit; on a GPU the whole loss is one kernel


def check_memory(config: GPTConfig, training: TrainConfig, memory: int) -> None:
    """Raise ``UsageError`` for a batch that needs more than ``memory`` bytes even if the estimate is ``ERROR`` high."""
    need = step_memory(config, training)
    if need * (1 - ERROR) <= memory:
        return
    fits = largest_batch(config, training, memory)
    recomputed = 0 if training.recompute else largest_batch(config, replace(training, recompute=True), memory)
    ways = [f"the largest that fits is --batch-size {fits}"] if fits else []
    ways += [f"with --recompute it is {recomputed}"] if recomputed > fits else []
    if not ways:
        ways = ["not even one row fits: choose a smaller model (--n-layer, --n-embd) or a shorter --n-positions"]
    elif training.batch_size > 1:
        ways.append("--accumulate makes one step of several batches")
    raise UsageError(
        f"--batch-size {training.batch_size} needs about {need / 1e9:.1f} GB in a step, and this machine has "
        f"{memory / 1e9:.1f} GB; {'; '.join(ways)}"
    )


def largest_batch(config: GPTConfig, training: TrainConfig, memory: int) -> int:
    """Return the largest batch size that fits in ``memory`` bytes; 0 if a single row does not fit."""

    def need(batch_size: int) -> int:
        return step_memory(config, replace(training, batch_size=batch_size), max_lanes=True)

    return bisect_right(range(1, MAX_BATCH), memory, key=need)


def step_memory(config: GPTConfig, training: TrainConfig, max_lanes: bool = False) -> int:
    """Estimate the peak memory of a training step, in bytes.

    Each lane of a batch has its own gradients. ``max_lanes`` assumes one lane per core also for batch sizes that do not
    divide evenly, so that the estimate grows with the batch size.
    """
    T, C, L, V = config.n_positions, config.n_embd, config.n_layer, config.vocab_size
    B = training.batch_size
    lanes = 1 if training.recompute else n_lanes(min(B, cores()) if max_lanes else B)
    n_tokens = B * T
    width = 4 if training.dtype == "float32" else 2
    weights = (12 + 4 * lanes + (0 if width == 4 else width)) * n_parameters(config)
    dtype = getattr(mx, training.dtype)
    # MLX's attention saves its pattern, also on Metal; cuDNN does not (backend/cuda/scaled_dot_product_attention.cpp).
    cudnn = not on_cpu() and mx.cuda.is_available() and width == 2 and T % 128 == 0 and config.head_dim % 8 == 0
    in_blocks = (cudnn or not ops.saves_pattern(T, dtype)) and not config.attn_pdrop
    patterns = 3 if config.attn_pdrop else 1  # with dropout also the masked pattern and the mask
    pattern = 0 if in_blocks else config.n_head * T * patterns
    block = (SAVED + MASKS_SAVED * (config.resid_pdrop > 0)) * C + pattern
    saved = INPUT_SAVED * C * L + block if training.recompute else block * L
    temporary = TEMPORARY * C + config.n_head * (min(T, SCORES) if in_blocks else T)
    chunked = in_chunks(n_tokens // lanes * V, dtype)
    per_logit = LOGITS if on_cpu() else LOGITS_GPU_CHUNK if chunked else LOGITS_GPU
    logits = per_logit * V * (min(n_tokens, CHUNK * lanes) if chunked else n_tokens)
    return round(weights + width * n_tokens * (saved + temporary) + 4 * logits)


def n_parameters(config: GPTConfig) -> int:
    """Count the parameters of a model without creating it."""
    C = config.n_embd
    biases_and_norms = config.n_layer * (9 * C + config.inner_dim) + 2 * C
    embeddings = (config.n_positions + (0 if config.tie_word_embeddings else config.vocab_size)) * C
    return matrix_weights(config) + biases_and_norms + embeddings
