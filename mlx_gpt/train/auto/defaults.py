"""Settings that nobody gave, picked from the amount of text, the speed of the machine and the time that there is.

Everything here is arithmetic: the same text, machine and given settings give the same picks, each with its reason.

- How large model and vocabulary are, ``model_size.py`` says.
- Batch and learning rate follow the compute C of the run: 0.2920 C^0.3271 tokens in a step, at a peak rate of 0.3118
  C^-0.1250 (Bi et al. 2024, DeepSeek LLM, section 3.1; fitted for AdamW).
- A text that is read again is worth nearly as much as a new one for four epochs, and nothing after some forty
  (Muennighoff et al. 2023). Such a run has dropout, and stops where validation no longer improves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil, log2
from typing import Any, NamedTuple

from mlx_gpt.config import GPTConfig
from mlx_gpt.train.auto.model_size import (
    ROOM,
    SIZE,
    STEP,
    TOKENS_PER_WEIGHT,
    Measured,
    Pick,
    Text,
    architecture,
    pick_model,
    short,
)
from mlx_gpt.train.clock import IN_HAND
from mlx_gpt.train.config import COUNTED, TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token, training_flops
from mlx_gpt.train.memory import largest_batch
from mlx_gpt.train.optimizer import OPTIMIZERS

MINUTES = 10.0  # of wall time, everything included
EPOCHS, TUNING_EPOCHS = 40.0, 4.0  # at most
NEW = 4.0  # epochs for which a text is as good as new
TUNING = 0.05  # of the learning rate from scratch
FORWARD = 2.5  # tokens measured in the time that training on one takes
LOOK, END = 1.0, 5.0  # seconds for a sample and a checkpoint; for the plot and the files at the end
MUON_ITERATIONS = 3  # as good as five in these sizes, and less work
PATIENCE = 4  # validation losses
STEPS, SMALLEST_STEP = 1000, 512  # so many steps there should be, unless they have fewer tokens than that


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
    config, model = pick_model(text, machine, seconds, given, processes, measured)
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


def _pick_batch(
    config: GPTConfig, machine: Machine, tokens: int, given: Mapping[str, Any], processes: int
) -> tuple[Pick, int]:
    """Rows of a batch and batches of a step, and the tokens of a step."""
    compute = training_flops(config) * tokens
    wanted = min(0.2920 * compute**0.3271, max(SMALLEST_STEP, tokens / STEPS))
    rows = 2 ** max(0, round(log2(max(1.0, wanted / (processes * config.n_positions)))))
    why = f"{short(wanted)}tokens in a step suit {compute:.0e} FLOP (Bi et al. 2024)"
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
    return min(OPTIMIZERS[optimizer].max_learning_rate, 0.3118 * compute**-0.1250)


def _pick_dropout(run: _Run) -> Pick:
    """The more weights see the same text the more often, the more dropout."""
    pressure = run.epochs * run.weights / run.text.train if run.epochs > NEW else 0.0
    p = 0.0 if pressure < 10 else 0.1 if pressure < 100 else 0.2
    why = f"{short(run.weights)}weights see {short(run.text.train)}tokens {run.epochs:.0f} times"
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
