"""The memory that a training step needs, told before it is taken.

Four things add up: the weights with their gradients and the optimizer's two moments, what the way back needs of each
block, what is alive for a moment in the one block that is computed, and the logits. The factors were fitted to
``mx.get_peak_memory`` of steps on a CPU and on an H100; ``tests/train/test_memory.py`` holds them to ``ERROR``.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import UsageError
from mlx_gpt.linux_cpu.kernels import keeps_pattern
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loss import ROWS, in_chunks
from mlx_gpt.train.machine import lanes

ERROR = 0.3  # the estimate may be off by this share of it
KEPT = 16.4  # numbers of the residual stream's width that a block keeps of each token
BENT = 8.0  # and where GELU does not make them again: twice the MLP's width
MASKS = 1.5  # and of masks, with dropout
MOMENTARY = 7.0  # numbers of that width that are alive in one block only
BLOCK = 256  # scores of each head and token that are alive there: attention goes in blocks of queries
LOGITS = 3.3  # numbers of each logit: itself, its exponential, its gradient
ON_A_GPU = 2.2  # there, where MLX has one kernel for the loss
RESIDUAL = 1.0  # numbers that --recompute keeps of a block: its input


def check_memory(config: GPTConfig, training: TrainConfig, memory: int) -> None:
    """``UsageError`` for a batch that cannot fit in so many bytes, with the largest that does.

    Where the estimate leaves room for hope, the batch is let through.
    """
    need = step_memory(config, training)
    if need * (1 - ERROR) <= memory:
        return
    fits = largest_batch(config, training, memory)
    again = 0 if training.recompute else largest_batch(config, replace(training, recompute=True), memory)
    ways = [f"the largest that fits is --batch-size {fits}"] if fits else []
    ways += [f"with --recompute it is {again}"] if again > fits else []
    if not ways:
        ways = ["not even one row fits: choose a smaller model (--n-layer, --n-embd) or a shorter --n-positions"]
    elif training.batch_size > 1:
        ways.append("--accumulate makes one step of several batches")
    raise UsageError(
        f"--batch-size {training.batch_size} needs about {need / 1e9:.1f} GB in a step, and this machine has "
        f"{memory / 1e9:.1f} GB; {'; '.join(ways)}"
    )


def largest_batch(config: GPTConfig, training: TrainConfig, memory: int) -> int:
    """The most rows that a batch can have in so many bytes; 0 if not even one fits."""
    fits, too_many = 0, 1
    while step_memory(config, replace(training, batch_size=too_many), spread=True) <= memory:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if step_memory(config, replace(training, batch_size=middle), spread=True) <= memory:
            fits = middle
        else:
            too_many = middle
    return fits


def step_memory(config: GPTConfig, training: TrainConfig, spread: bool = False) -> int:
    """Bytes that a step needs at its peak, about. ``spread`` counts a row number that divides badly as if it did well.

    On a CPU the rows of a batch are spread over streams, each of which has gradients of its own.
    """
    T, C, L, V = config.n_positions, config.n_embd, config.n_layer, config.vocab_size
    streams = 1 if training.recompute else lanes(training.batch_size, spread)
    rows = training.batch_size * config.n_positions
    width = 4 if training.dtype == "float32" else 2
    weights = (12 + 4 * streams + (0 if width == 4 else width)) * n_parameters(config)
    ours = on_cpu() and width == 4  # model/cpu.py: GELU and long attention that keep only what they were given
    # MLX's own keep the pattern, also on Metal; but cuDNN does not (backend/cuda/scaled_dot_product_attention.cpp).
    cudnn = not on_cpu() and mx.cuda.is_available() and width == 2 and T % 128 == 0 and config.head_dim % 8 == 0
    in_blocks = (cudnn or (ours and not keeps_pattern(T))) and not config.attn_pdrop
    pattern = 0 if in_blocks else config.n_head * T * (3 if config.attn_pdrop else 1)  # itself, masked, the mask
    block = (KEPT + BENT * (not ours) + MASKS * (config.resid_pdrop > 0)) * C + pattern
    kept = RESIDUAL * C * L + block if training.recompute else block * L
    momentary = MOMENTARY * C + config.n_head * (min(T, BLOCK) if in_blocks else T)
    chunked = in_chunks(rows // streams * V, getattr(mx, training.dtype))
    logits = (LOGITS if on_cpu() else ON_A_GPU) * V * (min(rows, ROWS * streams) if chunked else rows)
    return round(weights + width * rows * (kept + momentary) + 4 * logits)


def n_parameters(config: GPTConfig) -> int:
    """How many numbers the model has, without making it."""
    C, inner = config.n_embd, config.inner_dim
    block = 4 * C * C + 2 * C * inner + 9 * C + inner  # matrices, biases, norms
    embeddings = (config.vocab_size * (1 if config.tie_word_embeddings else 2) + config.n_positions) * C
    return config.n_layer * block + embeddings + 2 * C
