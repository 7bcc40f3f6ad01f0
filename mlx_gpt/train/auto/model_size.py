"""The size of a model and its vocabulary, for a text, a machine and a time limit.

For a given compute the loss is lowest at about 20 tokens per weight (Hoffmann et al. 2022). A model may have up to ten
times more weights than the text has tokens, as nanoGPT's for Tiny Shakespeare; it then sees the text repeatedly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from math import ceil, log
from typing import Any, NamedTuple

from mlx_gpt.config import GPTConfig
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token
from mlx_gpt.train.memory import step_memory
from mlx_gpt.train.units import format_large

MODEL_SIZES = (  # n_layer, n_embd, n_positions
    *((1, 32, 64), (2, 64, 128), (3, 96, 128), (4, 128, 256), (5, 192, 256), (6, 256, 256), (6, 384, 256)),
    *((8, 512, 512), (10, 640, 512), (12, 768, 1024), (24, 1024, 1024), (36, 1280, 1024), (48, 1600, 1024)),
)
SIZE_FIELDS = ("n_layer", "n_embd", "n_head", "n_positions")
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS_PER_WEIGHT = 20.0
MAX_WEIGHTS_PER_TOKEN = 10.0
MIN_BYTES_PER_ID = 1000
MEMORY_SHARE = 0.7  # of the memory, for a training step
TYPICAL_STEP = 4096  # tokens in a step, assumed until it is chosen


class TextSize(NamedTuple):
    """Numbers of training and validation tokens, and of ids in the vocabulary."""

    train: int
    val: int
    vocab_size: int


class Choice(NamedTuple):
    """Settings by the names of their flags, and the reason for their values."""

    settings: dict[str, Any]
    reason: str


def choose_tokenizer(n_bytes: int, machine: Machine, seconds: float) -> Choice:
    """Choose a vocabulary for a text: no id is too rare, and the head has no more weights than the blocks."""
    configs = [architecture(_fit(*size, {}, 1 << 20), 1024) for size in MODEL_SIZES]
    model = min(configs, key=lambda config: _mismatch(config, machine, seconds))
    by_text, by_model = n_bytes // MIN_BYTES_PER_ID, max(VOCABULARIES[0], 12 * model.n_layer * model.n_embd)
    sizes = [size for size in VOCABULARIES if size <= min(by_text, by_model)]
    if not sizes:
        return Choice(
            {"tokenizer": "bytes"}, f"{format_large(n_bytes, 'B')} of text are too few to learn a vocabulary from"
        )
    reason = f"at least {format_large(MIN_BYTES_PER_ID, 'B')} for each id in {format_large(n_bytes, 'B')} of text"
    if by_model < by_text:
        reason = "with more ids most of the weights would be those of the head"
    return Choice({"tokenizer": f"bpe:{sizes[-1]}"}, reason)


def choose_model(
    text: TextSize,
    machine: Machine,
    seconds: float,
    given: Mapping[str, Any],
    processes: int,
    model: GPTConfig | None,
) -> tuple[GPTConfig, Choice | None]:
    """Choose the size that sees 20 tokens per weight in the time, or ``model``. The choice is None if all is given."""
    if given.keys() >= {*SIZE_FIELDS}:
        return architecture(given, text.vocab_size), None
    configs = [architecture({**_fit(*size, given, text.train), **given}, text.vocab_size) for size in MODEL_SIZES]
    one_row, memory = TrainConfig(batch_size=1), MEMORY_SHARE * machine.memory
    possible = [config for config in configs if step_memory(config, one_row) <= memory] or configs[:1]
    max_weights = MAX_WEIGHTS_PER_TOKEN * text.train
    allowed = [config for config in possible if matrix_weights(config) <= max_weights] or configs[:1]
    mismatch = partial(_mismatch, machine=machine, seconds=processes * seconds)
    config = model or min(allowed, key=mismatch)
    weights = format_large(matrix_weights(config), "weights")
    reason = f"{weights}: about {TOKENS_PER_WEIGHT:.0f} tokens for each in the time (Hoffmann et al. 2022)"
    if config == allowed[-1] != possible[-1] and config != min(possible, key=mismatch):
        reason = f"{weights}: a larger model would memorize {format_large(text.train, 'tokens')}"
    return config, Choice({name: getattr(config, name) for name in SIZE_FIELDS}, reason)


def architecture(settings: Mapping[str, Any], vocab_size: int) -> GPTConfig:
    """Return the model configuration among the settings of a run."""
    names = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size, **{name: value for name, value in settings.items() if name in names})


def _fit(layers: int, width: int, positions: int, given: Mapping[str, Any], n_tokens: int) -> dict[str, int]:
    """A model of about this size that agrees with ``given``."""
    heads = given.get("n_head")
    width = given.get("n_embd", width if not heads else ceil(width / heads) * heads)
    if not heads:  # head_dim about 32, or 64, which Metal's fused attention supports
        max_heads = max(1, width // (64 if width >= 128 else 32))
        heads = max(n for n in range(1, max_heads + 1) if width % n == 0)
    max_positions = max(8, 1 << (n_tokens // 16).bit_length())  # a power of two: 8 to 16 windows, or more
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": min(positions, max_positions)}


def _mismatch(config: GPTConfig, machine: Machine, seconds: float) -> float:
    """|log| of the tokens seen in the time by 20 tokens per weight: 0 for a compute-optimal model."""
    tokens = seconds / seconds_per_token(config, machine, TYPICAL_STEP)
    return abs(log(tokens / (TOKENS_PER_WEIGHT * matrix_weights(config))))
