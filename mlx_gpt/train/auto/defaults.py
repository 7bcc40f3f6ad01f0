"""Default hyperparameters, from the size of the text, the speed of the machine and the time limit.

Pure arithmetic: the same text, machine and given settings lead to the same choices, each with its reason.

- ``model_size.py`` chooses the size of model and vocabulary.
- Batch size and learning rate follow the compute C of the run: 0.2920 C^0.3271 tokens in a step, and a peak learning
  rate of 0.3118 C^-0.1250 (Bi et al. 2024, DeepSeek LLM, section 3.1; fitted for AdamW).
- Up to four epochs, repeated text is nearly as good as new text; beyond about forty it adds nothing (Muennighoff et al.
  2023). Runs of more than four epochs have dropout, and stop when the validation loss no longer improves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil, log2
from typing import Any, NamedTuple

from mlx_gpt.config import GPTConfig
from mlx_gpt.train.auto.model_size import (
    MEMORY_SHARE,
    SIZE_FIELDS,
    TOKENS_PER_WEIGHT,
    TYPICAL_STEP,
    Choice,
    TextSize,
    architecture,
    choose_model,
)
from mlx_gpt.train.clock import RESERVE
from mlx_gpt.train.config import LENGTHS, TrainConfig
from mlx_gpt.train.machine import Machine, matrix_weights, seconds_per_token, training_flops
from mlx_gpt.train.memory import largest_batch
from mlx_gpt.train.optimizer import OPTIMIZERS
from mlx_gpt.train.units import format_large

MINUTES = 10.0  # of the whole command
MAX_EPOCHS, MAX_TUNING_EPOCHS = 40.0, 4.0
FRESH_EPOCHS = 4.0  # in which repeated text is as good as new
TUNING_SHARE = 0.05  # of the learning rate of training from scratch
EVAL_SPEEDUP = 2.5  # tokens evaluated in the time of training on one
EVAL_SECONDS, FINAL_SECONDS = 1.0, 5.0  # for a sample and a checkpoint; for the plot and the files at the end
MUON_ITERATIONS = 3  # as good as five for these model sizes, at less cost
PATIENCE = 4  # validation losses
MIN_STEPS, MIN_TOKENS_PER_STEP = 1000, 512  # fewer steps only if they would have fewer tokens than this


def choose(
    text: TextSize,
    machine: Machine,
    seconds: float,
    given: Mapping[str, Any],
    *,
    model: GPTConfig | None = None,
    processes: int = 1,
    tuning: bool = False,
) -> list[Choice]:
    """Choose all settings that are not ``given``, except the tokenizer, for a command that takes ``seconds``.

    ``model`` is the one to use, once ``machine`` is set to its measured speed. ``tuning`` means that the weights are
    pretrained. A given length leaves evaluations, and a given size dropout, unchosen.
    """
    given = {name: value for name, value in given.items() if name != "minutes"}  # already in ``seconds``
    config, size = choose_model(text, machine, seconds, given, processes, model)
    speed = processes / seconds_per_token(config, machine, TYPICAL_STEP)
    n_evaluations, windows, eval_seconds = _plan_evaluations(text, config, speed, seconds, given)
    train_seconds = max(0.3 * seconds, seconds - FINAL_SECONDS - eval_seconds)
    max_tokens = (MAX_TUNING_EPOCHS if tuning else MAX_EPOCHS) * text.train
    tokens = ceil(min(train_seconds * speed, max_tokens))
    batch, per_step = _choose_batch(config, machine, tokens, given, processes)
    has_length = any(name in given for name in LENGTHS)
    steps = ceil(tokens / per_step)
    if has_length:
        steps = TrainConfig.of(given).n_steps(per_step, text.train) or 1
    run = _Run(text, config, steps, steps * per_step, tuning)
    choices = [size, batch] if size else [batch]
    if not has_length:
        choices += _choose_length(run, train_seconds, speed, tokens >= max_tokens, processes)
    optimizer = _choose_optimizer(run, given)
    choices += [optimizer, _choose_learning_rate(run, {**optimizer.settings, **given})]
    if size:
        choices.append(_choose_dropout(run))
    if not has_length:
        choices.append(_choose_evaluations(run, n_evaluations, windows, given))
    rest = [Choice({k: value for k, value in one.settings.items() if k not in given}, one.reason) for one in choices]
    return [choice for choice in rest if choice.settings]


def choose_learning_rate(
    text: TextSize, given: Mapping[str, Any], processes: int = 1, tuning: bool = False
) -> list[Choice]:
    """Choose what remains where model, batch and length are ``given``."""
    config = architecture(given, text.vocab_size)
    per_step = processes * given["batch_size"] * given.get("accumulate", 1) * config.n_positions
    steps = TrainConfig.of(given).n_steps(per_step, text.train) or 1
    run = _Run(text, config, steps, steps * per_step, tuning)
    return [] if "learning_rate" in given else [_choose_learning_rate(run, given)]


def needs_measurement(names: Collection[str]) -> bool:
    """Return True if a setting that depends on the machine's speed is not among the given ``names``."""
    return not ({*SIZE_FIELDS, "batch_size"} <= {*names} and any(name in names for name in LENGTHS))


class _Run(NamedTuple):
    """The size of a run."""

    text: TextSize
    config: GPTConfig
    steps: int
    tokens: int
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


def _choose_batch(
    config: GPTConfig, machine: Machine, tokens: int, given: Mapping[str, Any], processes: int
) -> tuple[Choice, int]:
    """Batch size and accumulation, and the tokens of a step."""
    compute = training_flops(config) * tokens
    wanted = min(0.2920 * compute**0.3271, max(MIN_TOKENS_PER_STEP, tokens / MIN_STEPS))
    rows = 2 ** max(0, round(log2(max(1.0, wanted / (processes * config.n_positions)))))
    reason = f"{format_large(wanted, 'tokens')} in a step suit {compute:.0e} FLOP (Bi et al. 2024)"
    size, accumulate = given.get("batch_size"), given.get("accumulate", 1)
    if size is None:
        size = max(1, rows // accumulate)
        max_size = max(1, largest_batch(config, TrainConfig.of(given), round(MEMORY_SHARE * machine.memory)))
        if size > max_size:
            reason += ", in batches that fit in memory"
        while size > max_size:
            size, accumulate = (size + 1) // 2, accumulate if "accumulate" in given else 2 * accumulate
    per_step = processes * size * accumulate * config.n_positions
    return Choice({"batch_size": size, "accumulate": accumulate}, reason), per_step


def _choose_length(run: _Run, seconds: float, speed: float, capped: bool, processes: int) -> list[Choice]:
    reason = f"{seconds / 60:.1f} minutes at {speed:,.0f} tokens/s: {run.epochs:.2g} epochs"
    if capped:
        reason = f"{run.epochs:.0f} epochs; more would add nothing"
    limit = {"minutes": float(f"{seconds / 60 / (1 - RESERVE):.3g}")} if processes == 1 else {}  # clocks differ
    return [
        Choice({"steps": run.steps}, reason),
        Choice(limit, "of steps at most, in case they are slower than measured"),
    ]


def _choose_optimizer(run: _Run, given: Mapping[str, Any]) -> Choice:
    if run.tuning or given.get("optimizer", "muon") != "muon":
        return Choice({}, "")  # the updates of Muon are too large for pretrained weights
    reason = "fewer tokens to the same loss than AdamW (Jordan et al. 2024)"
    return Choice({"optimizer": "muon", "muon_iterations": MUON_ITERATIONS}, reason)


def _choose_learning_rate(run: _Run, settings: Mapping[str, Any]) -> Choice:
    """AdamW's learning rate; beside Muon it updates only embeddings, norms and biases, and may be higher."""
    max_rate = OPTIMIZERS[settings.get("optimizer", TrainConfig.optimizer)].max_learning_rate
    compute = 6 * TOKENS_PER_WEIGHT * run.weights**2 if run.tuning else run.compute
    rate = min(max_rate, 0.3118 * compute**-0.1250)
    reason = f"suits {compute:.0e} FLOP (Bi et al. 2024)"
    if run.tuning:
        rate, reason = TUNING_SHARE * rate, "a twentieth of that for training from scratch"
    return Choice({"learning_rate": float(f"{rate:.2g}")}, reason)


def _choose_dropout(run: _Run) -> Choice:
    """More dropout for more weights per token and more epochs."""
    pressure = run.epochs * run.weights / run.text.train if run.epochs > FRESH_EPOCHS else 0.0
    p = 0.0 if pressure < 10 else 0.1 if pressure < 100 else 0.2
    weights, tokens = format_large(run.weights, "weights"), format_large(run.text.train, "tokens")
    reason = f"{weights} see {tokens} {run.epochs:.0f} times"
    return Choice({"embd_pdrop": p, "resid_pdrop": p} if p else {}, reason)


def _plan_evaluations(
    text: TextSize, config: GPTConfig, speed: float, seconds: float, given: Mapping[str, Any]
) -> tuple[int, dict[str, int], float]:
    """Return the number of evaluations, their windows, and the seconds of all: 2 % in training and 4 % at the end."""
    n = min(40, max(3, round(3 * (seconds / 60) ** 0.5)))
    n_windows = max(1, ceil(text.val / config.n_positions))
    per_second = EVAL_SPEEDUP * speed / config.n_positions
    windows = given.get("eval_windows", min(n_windows, 256, max(4, round(0.02 * seconds * per_second / n))))
    final = given.get("final_windows", max(windows, round(0.04 * seconds * per_second))) or n_windows
    evaluated = n * (windows or n_windows) + 2 * min(final, n_windows)
    settings = {"eval_windows": windows} | ({"final_windows": final} if final < n_windows else {})
    return n, settings, n * EVAL_SECONDS + evaluated / per_second


def _choose_evaluations(run: _Run, n: int, windows: Mapping[str, int], given: Mapping[str, Any]) -> Choice:
    every = ceil(run.steps / (n + 1))
    settings = {"eval_every": every, "checkpoint_every": every, **windows}
    reason = f"{n} evaluations"
    if run.epochs > FRESH_EPOCHS and given.get("eval_every", 1) > 0:
        settings["patience"] = PATIENCE
        reason += f"; after {PATIENCE} without improvement the model overfits, and the run ends"
    return Choice(settings, reason)
