"""How large a model and its vocabulary are to be, for a text, a machine and a time.

With a budget of compute the loss is lowest at about 20 tokens for each weight (Hoffmann et al. 2022). A model may have
ten times more weights than the text has tokens, as nanoGPT's for Tiny Shakespeare, which then it reads again and again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from math import ceil, log
from typing import Any, NamedTuple

from mlx_gpt.config import GPTConfig
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token
from mlx_gpt.train.memory import step_memory

MODELS = (  # layers, width, positions
    *((1, 32, 64), (2, 64, 128), (3, 96, 128), (4, 128, 256), (5, 192, 256), (6, 256, 256), (6, 384, 256)),
    *((8, 512, 512), (10, 640, 512), (12, 768, 1024), (24, 1024, 1024), (36, 1280, 1024), (48, 1600, 1024)),
)
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS_PER_WEIGHT = 20.0
WEIGHTS_PER_TOKEN = 10.0  # of the text, at most
BYTES_PER_ID = 1000  # of text, at least, for each id of a vocabulary
ROOM = 0.7  # of the memory
STEP = 4096  # tokens in a step, where it is not known yet
SIZE = ("n_layer", "n_embd", "n_head", "n_positions")


class Text(NamedTuple):
    """How much text there is: tokens to train on and to measure by, and ids of the vocabulary."""

    train: int
    val: int
    vocab_size: int


class Measured(NamedTuple):
    """A model that has been tried, and its speed in tokens/s of all processes."""

    config: GPTConfig
    speed: float


class Pick(NamedTuple):
    """Some settings, by the names of their flags, and why."""

    settings: dict[str, Any]
    why: str


def pick_tokenizer(n_bytes: int, machine: Machine, seconds: float) -> Pick:
    """The vocabulary for so many bytes of text: none of its ids too rare, and its head no larger than the blocks."""
    layers, width, _ = MODELS[_model_for(machine, seconds)]
    rare, head = n_bytes // BYTES_PER_ID, max(VOCABULARIES[0], 12 * layers * width)
    fit = [size for size in VOCABULARIES if size <= min(rare, head)]
    if not fit:
        return Pick({"tokenizer": "bytes"}, f"{short(n_bytes)}B of text are too few to learn a vocabulary from")
    why = f"at least {short(BYTES_PER_ID)}B for each id in {short(n_bytes)}B of text"
    if head < rare:
        why = "with more ids most of the weights would be those of the head"
    return Pick({"tokenizer": f"bpe:{fit[-1]}"}, why)


def pick_model(
    text: Text,
    machine: Machine,
    seconds: float,
    given: Mapping[str, Any],
    processes: int,
    measured: Measured | None,
) -> tuple[GPTConfig, Pick | None]:
    """The size at which the tokens that there is time for come to about 20 for each weight; no pick if it is given."""
    if given.keys() >= {*SIZE}:
        return architecture(given, text.vocab_size), None
    sizes = [architecture({**_size(*size, given, text.train), **given}, text.vocab_size) for size in MODELS]
    one_row, room = TrainConfig(batch_size=1), ROOM * machine.memory
    possible = [size for size in sizes if step_memory(size, one_row) <= room] or sizes[:1]
    allowed = [size for size in possible if matrix_weights(size) <= WEIGHTS_PER_TOKEN * text.train] or sizes[:1]

    def off(config: GPTConfig) -> float:
        tokens = processes * seconds / seconds_per_token(config, machine, STEP)
        return abs(log(tokens / (TOKENS_PER_WEIGHT * matrix_weights(config))))

    config = measured.config if measured else min(allowed, key=off)
    weights = short(matrix_weights(config))
    why = f"{weights}weights: about {TOKENS_PER_WEIGHT:.0f} tokens for each in the time (Hoffmann et al. 2022)"
    if config == allowed[-1] != possible[-1] and config != min(possible, key=off):
        why = f"{weights}weights: a larger one would learn {short(text.train)}tokens by heart"
    return config, Pick({name: getattr(config, name) for name in SIZE}, why)


def architecture(settings: Mapping[str, Any], vocab_size: int) -> GPTConfig:
    """The model of some settings."""
    known = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size, **{name: value for name, value in settings.items() if name in known})


def _size(layers: int, width: int, positions: int, given: Mapping[str, Any], n_tokens: int) -> dict[str, int]:
    """A model of about that size that agrees with what is given."""
    heads = given.get("n_head")
    width = given.get("n_embd", width if not heads else ceil(width / heads) * heads)
    if not heads:  # heads of about 32 numbers, or of 64, which Metal's fused attention has
        wanted = max(1, width // (64 if width >= 256 else 32))
        heads = max(n for n in range(1, wanted + 1) if width % n == 0)
    most = 8  # windows should be many: a power of two
    while most * 16 <= n_tokens:
        most *= 2
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": min(positions, most)}


def _model_for(machine: Machine, seconds: float) -> int:
    """Which of ``MODELS`` suits the time, whatever the text, with a vocabulary of 1024."""

    def off(i: int) -> float:
        config = architecture(_size(*MODELS[i], {}, 1 << 20), 1024)
        tokens = seconds / seconds_per_token(config, machine, STEP)
        return abs(log(tokens / (TOKENS_PER_WEIGHT * matrix_weights(config))))

    return min(range(len(MODELS)), key=off)


def short(value: float) -> str:
    """A number before its unit: ``1.12 M``."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} "
