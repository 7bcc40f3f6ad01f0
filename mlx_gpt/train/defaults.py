"""Settings that nobody gave, picked from the amount of text, the speed of the machine and the time that there is.

Everything here is arithmetic: the same text, machine and given settings give the same picks, each with its reason.

- Size: with a budget of compute the loss is lowest at about 20 tokens for each weight (Hoffmann et al. 2022).
- Batch and learning rate follow the compute C of the run: 0.2920 C^0.3271 tokens in a step, at a peak rate of 0.3118
  C^-0.1250 (Bi et al. 2024, DeepSeek LLM, section 3.1; fitted for AdamW).
- A text that is read again is worth nearly as much as a new one for four epochs, and nothing after some forty
  (Muennighoff et al. 2023). A model may then have ten times more weights than the text has tokens, as nanoGPT's for
  Tiny Shakespeare, but with dropout, and it stops where validation no longer improves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from math import ceil, log, log2
from typing import Any, NamedTuple

from mlx_gpt.config import GPTConfig
from mlx_gpt.train.config import COUNTED, TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token, training_flops
from mlx_gpt.train.memory import largest_batch, step_memory
from mlx_gpt.train.pace import IN_HAND

MINUTES = 10.0  # of wall time, everything included
MODELS = (  # layers, width, positions
    *((1, 32, 64), (2, 64, 128), (3, 96, 128), (4, 128, 256), (5, 192, 256), (6, 256, 256), (6, 384, 256)),
    *((8, 512, 512), (10, 640, 512), (12, 768, 1024), (24, 1024, 1024), (36, 1280, 1024), (48, 1600, 1024)),
)
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS_PER_WEIGHT = 20.0
WEIGHTS_PER_TOKEN = 10.0  # of the text, at most
EPOCHS, TUNING_EPOCHS = 40.0, 4.0  # at most
NEW = 4.0  # epochs for which a text is as good as new
BYTES_PER_ID = 1000  # of text, at least, for each id of a vocabulary
ROOM = 0.7  # of the memory
TUNING = 0.05  # of the learning rate from scratch
FORWARD = 2.5  # tokens measured in the time that training on one takes
LOOK, END = 1.0, 5.0  # seconds for a sample and a checkpoint; for the plot and the files at the end
HIGHEST_RATE = {"adamw": 0.004, "muon": 0.01}  # tried on small models, for which the formula was not fitted
MUON_ITERATIONS = 3  # as good as five in these sizes, and less work
PATIENCE = 4  # validation losses
STEPS, SMALLEST_STEP = 1000, 512  # so many steps there should be, unless they have fewer tokens than that
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
        return Pick({"tokenizer": "bytes"}, f"{_short(n_bytes)}B of text are too few to learn a vocabulary from")
    why = f"at least {_short(BYTES_PER_ID)}B for each id in {_short(n_bytes)}B of text"
    if head < rare:
        why = "with more ids most of the weights would be those of the head"
    return Pick({"tokenizer": f"bpe:{fit[-1]}"}, why)


def pick(
    text: Text,
    machine: Machine,
    seconds: float,
    given: Mapping[str, Any],
    *,
    measured: Measured | None = None,
    processes: int = 1,
    tuning: bool = False,
) -> list[Pick]:
    """All settings but the tokenizer, for ``seconds`` of wall time; those that are ``given`` stay as they are.

    ``measured`` is the model to take, once it has been tried; without it the speed is estimated. ``tuning`` says that
    the model is trained already. Evaluations are picked where the length is, dropout where the model is.
    """
    given = {name: value for name, value in given.items() if name != "minutes"}  # which are in seconds already
    config, model = _pick_model(text, machine, seconds, given, processes, measured)
    speed = measured.speed if measured else processes / seconds_per_token(config, machine, STEP)
    looks = _looks(text, config, speed, seconds, given)
    training = max(0.3 * seconds, seconds - END - _looking(text, config, speed, looks))
    most = (TUNING_EPOCHS if tuning else EPOCHS) * text.train
    tokens = ceil(min(training * speed, most))
    batch, per_step = _pick_batch(config, machine, tokens, given, processes)
    has_length = any(name in given for name in COUNTED)
    steps = _given_steps(given, per_step, text.train) if has_length else ceil(tokens / per_step)
    run = _Run(text, config, steps, steps * per_step, tuning)
    picks = [batch] if model is None else [model, batch]
    if not has_length:
        picks.append(_pick_length(run, training, speed, capped=tokens >= most))
        picks += [_pick_limit(training)] if processes == 1 else []  # each has its own clock
    optimizer = _pick_optimizer(run)
    used = {**optimizer.settings, **given}.get("optimizer", "adamw")
    picks += [optimizer, _pick_rate(run, used)]
    if model:
        picks.append(_pick_dropout(run))
    if not has_length:
        picks.append(_pick_looks(run, looks))
    left = [Pick({name: value for name, value in one.settings.items() if name not in given}, one.why) for one in picks]
    return [one for one in left if one.settings]


def pick_rate(text: Text, given: Mapping[str, Any], processes: int = 1, tuning: bool = False) -> list[Pick]:
    """What is left to pick where a model, a batch and a length are given."""
    config = architecture(given, text.vocab_size)
    per_step = processes * given["batch_size"] * given.get("accumulate", 1) * config.n_positions
    steps = _given_steps(given, per_step, text.train)
    run = _Run(text, config, steps, steps * per_step, tuning)
    return [] if "learning_rate" in given else [_pick_rate(run, given.get("optimizer", "adamw"))]


def nothing_to_measure(names: Collection[str]) -> bool:
    """Whether so much is given that the machine's speed has no say."""
    return {*SIZE, "batch_size"} <= {*names} and not {*COUNTED}.isdisjoint(names)


class _Run(NamedTuple):
    """What is decided so far."""

    text: Text
    config: GPTConfig
    steps: int
    tokens: int  # seen in all of them
    tuning: bool

    @property
    def epochs(self) -> float:
        return self.tokens / self.text.train

    @property
    def weights(self) -> int:
        return matrix_weights(self.config)

    @property
    def compute(self) -> float:
        """FLOP."""
        return training_flops(self.config) * self.tokens


def architecture(settings: Mapping[str, Any], vocab_size: int) -> GPTConfig:
    """The model of some settings."""
    known = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size, **{name: value for name, value in settings.items() if name in known})


def _pick_model(
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
    weights = _short(matrix_weights(config))
    why = f"{weights}weights: about {TOKENS_PER_WEIGHT:.0f} tokens for each in the time (Hoffmann et al. 2022)"
    if config == allowed[-1] != possible[-1] and config != min(possible, key=off):
        why = f"{weights}weights: a larger one would learn {_short(text.train)}tokens by heart"
    return config, Pick({name: getattr(config, name) for name in SIZE}, why)


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


def _pick_batch(
    config: GPTConfig, machine: Machine, tokens: int, given: Mapping[str, Any], processes: int
) -> tuple[Pick, int]:
    """Rows of a batch and batches of a step, and the tokens of a step."""
    compute = training_flops(config) * tokens
    wanted = min(0.2920 * compute**0.3271, max(SMALLEST_STEP, tokens / STEPS))
    rows = 2 ** max(0, round(log2(max(1.0, wanted / (processes * config.n_positions)))))
    why = f"{_short(wanted)}tokens in a step suit {compute:.0e} FLOP (Bi et al. 2024)"
    size, times = given.get("batch_size"), given.get("accumulate", 1)
    if size is None:
        size = max(1, rows // times)
        shape = TrainConfig(**{name: given[name] for name in ("dtype", "recompute") if name in given})
        fits = max(1, largest_batch(config, shape, round(ROOM * machine.memory)))
        while size > fits:
            size, times = (size + 1) // 2, times if "accumulate" in given else 2 * times
            why += ", in batches that fit in memory" if "memory" not in why else ""
    per_step = processes * size * times * config.n_positions
    return Pick({"batch_size": size, "accumulate": times}, why), per_step


def _given_steps(given: Mapping[str, Any], per_step: int, per_epoch: int) -> int:
    return TrainConfig(**{name: given[name] for name in COUNTED if name in given}).n_steps(per_step, per_epoch) or 1


def _pick_length(run: _Run, seconds: float, speed: float, capped: bool) -> Pick:
    why = f"{seconds / 60:.1f} minutes at {speed:,.0f} tokens/s: {run.epochs:.2g} times through the text"
    if capped:
        why = f"{run.epochs:.0f} times through the text; more would add nothing"
    return Pick({"steps": run.steps}, why)


def _pick_limit(seconds: float) -> Pick:
    limit = float(f"{seconds / 60 / (1 - IN_HAND):.3g}")
    return Pick({"minutes": limit}, "for the steps at most, should they turn out slower than measured")


def _pick_optimizer(run: _Run) -> Pick:
    if run.tuning:
        return Pick({}, "")  # its steps are too long for weights that are good already
    why = "fewer tokens to the same loss than AdamW (Jordan et al. 2024)"
    return Pick({"optimizer": "muon", "muon_iterations": MUON_ITERATIONS}, why)


def _pick_rate(run: _Run, optimizer: str) -> Pick:
    """AdamW's; beside Muon it moves only embeddings, norms and biases, and may be higher."""
    if run.tuning:
        trained = _rate(6 * TOKENS_PER_WEIGHT * run.weights**2, optimizer)
        return Pick({"learning_rate": _rounded(TUNING * trained)}, "a twentieth of what suits such a model at first")
    rate = _rounded(_rate(run.compute, optimizer))
    return Pick({"learning_rate": rate}, f"suits {run.compute:.0e} FLOP (Bi et al. 2024)")


def _rate(compute: float, optimizer: str) -> float:
    return min(HIGHEST_RATE[optimizer], 0.3118 * compute**-0.1250)


def _pick_dropout(run: _Run) -> Pick:
    """The more weights see the same text the more often, the more dropout."""
    pressure = run.epochs * run.weights / run.text.train if run.epochs > NEW else 0.0
    p = 0.0 if pressure < 10 else 0.1 if pressure < 100 else 0.2
    why = f"{_short(run.weights)}weights see {_short(run.text.train)}tokens {run.epochs:.0f} times"
    return Pick({"embd_pdrop": p, "resid_pdrop": p} if p else {}, why)


class _Looks(NamedTuple):
    """Evaluations: how many, over how many windows each, and over how many at the end (0: all)."""

    n: int
    windows: int
    last: int
    wanted: bool


def _looks(text: Text, config: GPTConfig, speed: float, seconds: float, given: Mapping[str, Any]) -> _Looks:
    """So many that they take 2 % of the time on the way, and 4 % at the end."""
    T = config.n_positions
    n = min(40, max(3, round(3 * (seconds / 60) ** 0.5)))
    there = max(1, ceil(text.val / T))
    in_a_second = FORWARD * speed / T
    windows = given.get("eval_windows", min(there, 256, max(4, round(0.02 * seconds * in_a_second / n))))
    last = given.get("final_windows", max(windows, round(0.04 * seconds * in_a_second)))
    return _Looks(n, windows, 0 if last >= there else last, given.get("eval_every", 1) > 0)


def _looking(text: Text, config: GPTConfig, speed: float, looks: _Looks) -> float:
    """Seconds that they take."""
    T = config.n_positions
    there = ceil(text.val / T)
    windows = looks.n * (looks.windows or there) + 2 * (looks.last or there)
    return looks.n * LOOK + windows * T / (FORWARD * speed)


def _pick_looks(run: _Run, looks: _Looks) -> Pick:
    every = ceil(run.steps / (looks.n + 1))
    settings = {"eval_every": every, "checkpoint_every": every, "eval_windows": looks.windows}
    settings |= {"final_windows": looks.last} if looks.last else {}
    if run.epochs <= NEW or not looks.wanted:
        return Pick(settings, f"{looks.n} looks on the way")
    why = f"{looks.n} looks on the way; after {PATIENCE} without a new best it has begun to learn by heart, and ends"
    return Pick(settings | {"patience": PATIENCE}, why)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _short(value: float) -> str:
    """A number before its unit: ``1.12 M``."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} "
