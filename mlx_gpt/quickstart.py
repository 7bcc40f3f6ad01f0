"""``mlx-gpt quickstart``: train a small GPT on tinyworld in a few minutes, and compare it with what is known of it.

The quickstart is ``mlx-gpt train`` with settings for one corpus: a model that the measured speed of this machine can
train in the time, as many stories as it will see, and a count of the generated stories that follow tinyworld's rules.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mlx_gpt.config import GPTConfig
from mlx_gpt.device import cores
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import generate, generate_many
from mlx_gpt.model.gpt import GPT
from mlx_gpt.terminal import make_console
from mlx_gpt.text.corpora import TINYWORLD_TOKENIZER, tinyworld
from mlx_gpt.text.dataset import Dataset, dataset_from_texts
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld import stories as world
from mlx_gpt.train.awake import keep_awake
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.run import PLOT, lock_first_vacant, new_model, run
from mlx_gpt.train.signals import interruptible
from mlx_gpt.train.speed import measure_training_speed

PROMPT = "One sunny morning, Lily went to the garden."
TEMPERATURE = 0.7
N_SAMPLES = 100
N_EVALUATIONS = 3
EVAL_WINDOWS = 32
TIMED = 1.5  # seconds of training to measure its speed
END = 11.0  # seconds for the plot, files and table, with room for a first run that compiles kernels

N_VAL_STORIES = 200
FIRST_STORIES = 5_000  # for the vocabulary and the measurement of speed
MAX_STORIES = 500_000
TOKENS_PER_STORY = 90
EPOCHS = 3

TRAINING = TrainConfig(
    batch_size=16,
    optimizer="muon",
    muon_embeddings=True,
    muon_iterations=3,
    learning_rate=6e-3,
    muon_learning_rate=0.013,
    final_learning_rate=0.02,
    beta2=0.99,
    eval_windows=EVAL_WINDOWS,
)


class Preset(NamedTuple):
    """A model with its training settings, and the fewest training tokens that it is worth choosing for."""

    min_tokens: int
    model: GPTConfig
    training: TrainConfig


# A place is looked up through a name and the sentence it was last in, which takes several layers one after the other:
# depth is worth more here than width. 144 positions hold the longest story. The heads are 32 wide, not 64 as ``train``
# picks for a width of 128: the losses and success rates in the READMEs were measured so.
SHALLOW = Preset(
    0,
    GPTConfig(n_positions=144, n_embd=64, n_layer=2, n_head=2),
    replace(TRAINING, muon_learning_rate=0.03, schedule="wsd"),
)
DEEP = Preset(1_200_000, GPTConfig(n_positions=144, n_embd=64, n_layer=6, n_head=2, n_inner=64), TRAINING)
WIDE = Preset(12_000_000, GPTConfig(n_positions=144, n_embd=128, n_layer=6, n_head=4, n_inner=256), TRAINING)


def quickstart(minutes: float, out: Path, seed: int, allow_sleep: bool = False) -> None:
    """Train for ``minutes`` of wall time in all. Writes a model folder, a plot and samples to ``out``, or ``out-2``."""
    if not 0.2 <= minutes <= 24 * 60:
        raise UsageError(f"--minutes must be between 0.2 and {24 * 60}, not {minutes:g}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed must be 0 or above and below 2^64, not {seed}")
    console = make_console(highlight=False)
    with interruptible(), ExitStack() as stack:
        if not allow_sleep:
            keep_awake(console.print)
        _quickstart(minutes, lock_first_vacant(stack, out, console), seed, console)


def _quickstart(minutes: float, out: Path, seed: int, console: Console) -> None:
    deadline = time.perf_counter() + 60 * minutes
    console.print("[bold]tinyworld[/bold]: generating stories, learning their vocabulary, measuring the speed ...")
    dataset = dataset_from_texts("tinyworld", *tinyworld(FIRST_STORIES, N_VAL_STORIES, seed), TINYWORLD_TOKENIZER)
    preset, speed = choose_preset(
        lambda preset: measure_training_speed(preset.model, preset.training, dataset, TIMED),
        deadline - time.perf_counter(),
    )
    n_stories = stories_needed(speed * (deadline - time.perf_counter()))
    if n_stories > FIRST_STORIES:
        texts = tinyworld(n_stories, N_VAL_STORIES, seed, cores())
        dataset = dataset_from_texts("tinyworld", *texts, dataset.tokenizer)
    model = new_model(preset.model, dataset, seed)
    console.print(
        f"{max(n_stories, FIRST_STORIES):,} stories, {dataset.train.n_tokens:,} tokens, vocabulary "
        f"{dataset.tokenizer.vocab_size}; {model.n_parameters:,} parameters; {speed:,.0f} tokens/s\n"
    )
    samples: list[tuple[str, str]] = []

    def sample(label: str) -> None:
        text = "".join(generate(model, dataset.tokenizer, PROMPT, max_tokens=60, temperature=TEMPERATURE, seed=seed))
        samples.append((label, text))
        console.print(f"[bold]{label}[/bold]  {PROMPT}")
        console.print(" ".join(text.split()), style="cyan", markup=False)
        console.print()

    sample("before training")
    config = training_settings(preset, speed, deadline - time.perf_counter(), seed)
    val_loss = run(model, dataset, config, out, console, lambda step, done: sample(f"at {done:.0%}"))
    sample("after training")
    checked = check_stories(model, dataset.tokenizer, seed)
    _write_samples(out / "samples.md", samples, checked)
    console.print(_table(val_loss, dataset, checked))
    console.print(f"model {out}   plot {out / PLOT}   samples {out / 'samples.md'}\n\nNext:")
    for command in (
        f'mlx-gpt generate {out} --prompt "One rainy day, Tom went to the forest."',
        "mlx-gpt train --data shakespeare --out runs/shakespeare",
        "python examples/01_one_head.py",
    ):
        console.print(f"  {command}", style="bold", soft_wrap=True)


def choose_preset(measure: Callable[[Preset], float], seconds: float) -> tuple[Preset, float]:
    """Return the largest preset that can be trained on its ``min_tokens`` in the time, and its speed in tokens/s.

    ``measure`` returns the speed of a preset. Presets are measured from the second smallest up, since a larger one is
    slower and each measurement takes seconds.
    """
    chosen, speed = DEEP, measure(DEEP)
    if speed * seconds < DEEP.min_tokens:
        return SHALLOW, measure(SHALLOW)
    if speed * seconds >= WIDE.min_tokens and (wide_speed := measure(WIDE)) * seconds >= WIDE.min_tokens:
        chosen, speed = WIDE, wide_speed
    return chosen, speed


def stories_needed(n_tokens: float) -> int:
    """Return how many stories make ``n_tokens`` in ``EPOCHS`` epochs, up to ``MAX_STORIES``."""
    return min(MAX_STORIES, round(n_tokens / EPOCHS / TOKENS_PER_STORY))


def training_settings(preset: Preset, speed: float, seconds: float, seed: int) -> TrainConfig:
    """Return the settings of a run that ends, with its evaluations and samples, after ``seconds``."""
    T, B = preset.model.n_positions, preset.training.batch_size
    evaluated = (N_EVALUATIONS * EVAL_WINDOWS + N_VAL_STORIES + 2 * N_SAMPLES) * T  # tokens, forward only
    seconds = max(1.0, seconds - evaluated / (1.5 * speed) - END)
    steps = max(1.0, seconds * speed / (B * T))
    eval_every = max(1, round(steps / (N_EVALUATIONS + 1)))
    return replace(preset.training, minutes=seconds / 60, eval_every=eval_every, seed=seed)


@dataclass(frozen=True)
class CheckedStories:
    """Generated stories, each parsed by tinyworld's rules."""

    stories: list[str]
    parses: list[world.Parse]
    sentences: list[tuple[str, bool]]  # a random one of each story, and whether tinyworld contains it

    @property
    def n_valid_stories(self) -> int:
        return sum(parse.valid for parse in self.parses)

    @property
    def n_valid_sentences(self) -> int:
        return sum(valid for _, valid in self.sentences)


def check_stories(model: GPT, tokenizer: Tokenizer, seed: int, n: int = N_SAMPLES) -> CheckedStories:
    """Generate n stories from an empty prompt at ``TEMPERATURE``; parse each, and a random sentence of each."""
    n_positions = model.config.n_positions
    stories = generate_many(model, tokenizer, [""] * n, max_tokens=n_positions, temperature=TEMPERATURE, seed=seed)
    rng = random.Random(seed)
    sentences = [rng.choice(world.split_sentences(story) or [""]) for story in stories]
    parses = [world.parse_story(story) for story in stories]
    return CheckedStories(stories, parses, [(sentence, world.is_sentence(sentence)) for sentence in sentences])


def _write_samples(path: Path, samples: Sequence[tuple[str, str]], checked: CheckedStories) -> None:
    lines = [f"# The same prompt\n\n{PROMPT}\n"]
    lines += [f"- {label}: {text.strip()}" for label, text in samples]
    lines += ["\n# Stories from an empty prompt, and where they break the rules\n"]
    for story, parse in zip(checked.stories, checked.parses, strict=True):
        lines += [f"- {story}", f"  - **{parse.error or 'valid'}**"]
    lines += ["\n# Sentences that tinyworld does not contain\n"]
    lines += [f"- {sentence}" for sentence, valid in checked.sentences if not valid]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(val_loss: float, dataset: Dataset, checked: CheckedStories) -> Table:
    table = Table(title="Validation loss", title_justify="left", min_width=60)
    table.add_column("")
    table.add_column("nats per token", justify="right")
    labels = {"ln V": "uniform probabilities (ln V)", "unigram": "token frequencies (unigram entropy)"}
    labels |= {"bigram": "frequencies of pairs (bigram entropy)", "best possible": "the rules (best possible)"}
    rows = [(labels[name], f"{loss:.3f}") for name, loss in dataset.baselines.items()]
    rows.insert(-1, ("this model", f"[bold]{val_loss:.3f}[/bold]"))
    rows.append(("above the best possible", f"{val_loss - dataset.baselines['best possible']:.3f}"))
    for row in rows:
        table.add_row(*row)
    table.add_section()
    sampled = f"sampled at temperature {TEMPERATURE:g}"
    table.add_row(f"valid sentences, of {len(checked.sentences)} {sampled}", str(checked.n_valid_sentences))
    table.add_row(f"valid whole stories, of {len(checked.stories)} {sampled}", str(checked.n_valid_stories))
    return table
