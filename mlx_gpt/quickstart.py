"""``mlx-gpt quickstart``: a small GPT learns to tell stories of tinyworld, and is marked.

Everything here is what ``mlx-gpt train --data tinyworld`` and ``mlx-gpt generate`` do, with the settings chosen for a
number of minutes on the machine at hand, and the result held against what is known of that world.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.files import unused
from mlx_gpt.generate.generation import generate, generate_many
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.corpora import tinyworld as tinyworld_corpus
from mlx_gpt.text.dataset import Dataset, dataset_from_texts
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.windows import endless_batches
from mlx_gpt.tinyworld import stories as tinyworld
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.run import Run, new_model, run
from mlx_gpt.train.step import make_train_step

PROMPT = "One sunny morning, Lily went to the garden."
TEMPERATURE = 0.7
N_SAMPLES = 100
N_LOOKS = 3  # evaluations on the way

N_VAL_STORIES = 200
EVAL_WINDOWS = 32
BATCH_SIZE = 16
VOCABULARY = "bpe:980"  # nearly every word is one token: a name that is copied is copied whole
MUON_ITERATIONS = 3  # as good here as five, at three fifths of their cost


class Size(NamedTuple):
    """A model, and how many tokens it should be able to see before it is worth choosing."""

    tokens: int
    muon_learning_rate: float
    schedule: str
    architecture: GPTConfig


# To find who is where takes a look at a name, from there one at its place, from there one at what is there: depth is
# worth more here than width. With four layers one seed of two learned no lesson; five saw more tokens in the time, and
# told no more stories right. The positions are just enough for the longest story.
DEEP = GPTConfig(n_positions=144, n_embd=64, n_layer=6, n_head=2, n_inner=64)
SIZES = (  # from small to large
    Size(0, 0.03, "wsd", GPTConfig(n_positions=144, n_embd=64, n_layer=2, n_head=2)),
    Size(1_200_000, 0.013, "cosine", DEEP),
)


def quickstart(minutes: float, out: Path, seed: int) -> None:
    """Train for ``minutes`` of wall time, everything included; leave a model folder, a plot and samples in ``out``."""
    if not 0.2 <= minutes <= 24 * 60:
        raise UsageError(f"--minutes must be between 0.2 and {24 * 60}, not {minutes:g}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed must be 0 or above and below 2^64, not {seed}")
    deadline = time.perf_counter() + 60 * minutes
    out = unused(out)
    console = Console()
    console.print("[bold]tinyworld[/bold]: telling stories and learning their vocabulary ...", highlight=False)
    n_stories = min(200_000, max(2_000, round(5_000 * minutes)))
    dataset = dataset_from_texts("tinyworld", *tinyworld_corpus(n_stories, N_VAL_STORIES, seed), VOCABULARY)
    size, speed = _choose_size(dataset, deadline)
    model = new_model(size.architecture, dataset, seed)
    console.print(
        f"{n_stories:,} stories, {dataset.train.n_tokens:,} tokens, vocabulary {dataset.tokenizer.vocab_size}; "
        f"{model.n_parameters:,} parameters; {speed:,.0f} tokens/s\n",
        highlight=False,
    )
    told: list[tuple[str, str]] = []

    def tell(when: str) -> None:
        text = "".join(generate(model, dataset.tokenizer, PROMPT, max_tokens=60, temperature=TEMPERATURE, seed=seed))
        told.append((when, text))
        console.print(f"[bold]{when}[/bold]  {PROMPT}", highlight=False)
        console.print(" ".join(text.split()), style="cyan", markup=False, highlight=False)
        console.print()

    tell("before training")
    config = _settings(size, speed, deadline, seed)
    result = run(model, dataset, config, out, console, lambda step, done: tell(f"at {done:.0%}"))
    tell("after training")
    judgement = judge(model, dataset.tokenizer, seed)
    _write_samples(out / "samples.md", told, judgement)
    console.print(_table(result, dataset, judgement))
    _say_next(console, result)


@dataclass(frozen=True)
class Judgement:
    """Stories that a model told by itself, each with what tinyworld says of it."""

    stories: list[str]
    parses: list[tinyworld.Parse]
    sentences: list[tuple[str, bool]]  # one of each story, and whether tinyworld has it

    @property
    def valid_stories(self) -> int:
        return sum(parse.valid for parse in self.parses)

    @property
    def valid_sentences(self) -> int:
        return sum(valid for _, valid in self.sentences)


def judge(model: GPT, tokenizer: Tokenizer, seed: int, n: int = N_SAMPLES) -> Judgement:
    """Let the model tell n stories from nothing; read each, and one sentence of each, taken by lot."""
    longest = model.config.n_positions
    stories = generate_many(model, tokenizer, [""] * n, max_tokens=longest, temperature=TEMPERATURE, seed=seed)
    rng = random.Random(seed)
    sentences = [rng.choice(tinyworld.split_sentences(story) or [""]) for story in stories]
    return Judgement(
        stories,
        [tinyworld.parse_story(story) for story in stories],
        [(sentence, tinyworld.is_sentence(sentence)) for sentence in sentences],
    )


def _choose_size(dataset: Dataset, deadline: float) -> tuple[Size, float]:
    """The largest model that will see enough tokens before the deadline, and its measured speed in tokens/s."""
    for size in reversed(SIZES):
        speed = _measure(new_model(size.architecture, dataset, seed=0), dataset)
        if speed * (deadline - time.perf_counter()) >= size.tokens:
            break
    return size, speed


def _measure(model: GPT, dataset: Dataset, seconds: float = 1.5) -> float:
    """Training speed in tokens/s: some real steps, after one that compiles."""
    T = model.config.n_positions
    batches = endless_batches(dataset.train, T, BATCH_SIZE, seed=0)
    config = TrainConfig(optimizer="muon", muon_embeddings=True, muon_iterations=MUON_ITERATIONS)
    optimizer = make_optimizer(config, model.config.n_head)
    step = make_train_step(model, optimizer, clip=1.0, batch_size=BATCH_SIZE)
    n, started = -1, 0.0
    while n < 1 or time.perf_counter() - started < seconds:
        x, y = next(batches)
        mx.eval(step(mx.array(x), mx.array(y)), step.state)
        n += 1
        started = started or time.perf_counter()  # from the end of the first step
    return n * BATCH_SIZE * T / (time.perf_counter() - started)


def _settings(size: Size, speed: float, deadline: float, seed: int) -> TrainConfig:
    """What is left of the time, less what the evaluations and the samples at the end will take."""
    T = size.architecture.n_positions
    looks = (N_LOOKS * EVAL_WINDOWS + N_VAL_STORIES) * T  # tokens to look at, forward only
    samples = 2 * N_SAMPLES * T
    seconds = deadline - time.perf_counter() - (looks + samples) / (1.5 * speed) - 8.0  # plot, files, table
    steps = max(1.0, seconds * speed / (BATCH_SIZE * T))
    return TrainConfig(
        minutes=max(seconds, 1.0) / 60,
        batch_size=BATCH_SIZE,
        optimizer="muon",
        muon_embeddings=True,
        muon_iterations=MUON_ITERATIONS,
        learning_rate=6e-3,
        muon_learning_rate=size.muon_learning_rate,
        schedule=size.schedule,
        final_learning_rate=0.02,
        beta2=0.99,
        eval_every=max(1, round(steps / (N_LOOKS + 1))),
        eval_windows=EVAL_WINDOWS,
        seed=seed,
    )


def _write_samples(path: Path, told: Sequence[tuple[str, str]], judgement: Judgement) -> None:
    lines = [f"# The same prompt\n\n{PROMPT}\n"]
    lines += [f"- {when}: {text.strip()}" for when, text in told]
    lines += ["\n# Stories told from nothing, and where they break\n"]
    for story, parse in zip(judgement.stories, judgement.parses, strict=True):
        lines += [f"- {story}", f"  - **{parse.error or 'valid'}**"]
    lines += ["\n# Sentences that tinyworld does not have\n"]
    lines += [f"- {sentence}" for sentence, valid in judgement.sentences if not valid]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(result: Run, dataset: Dataset, judgement: Judgement) -> Table:
    table = Table(title="What it has learned", title_justify="left", min_width=60)
    table.add_column("")
    table.add_column("nats per token", justify="right")
    names = {"ln V": "knows nothing (ln V)", "unigram": "knows how often each token comes (unigram entropy)"}
    names |= {"bigram": "and after which other (bigram entropy)", "best possible": "knows the rules (best possible)"}
    rows = {names[mark]: f"{loss:.3f}" for mark, loss in dataset.baselines.items()}
    best = rows.popitem()
    for name, value in [
        *rows.items(),
        ("this model, on stories it has not seen", f"[bold]{result.val_loss:.3f}[/bold]"),
        best,
    ]:
        table.add_row(name, value)
    table.add_row("above the best possible", f"{result.val_loss - dataset.baselines['best possible']:.3f}")
    table.add_section()
    sampled = f"sampled at temperature {TEMPERATURE:g}"
    table.add_row(f"sentences valid, of {len(judgement.sentences)} {sampled}", str(judgement.valid_sentences))
    table.add_row(f"whole stories valid, of {len(judgement.stories)} {sampled}", str(judgement.valid_stories))
    return table


def _say_next(console: Console, result: Run) -> None:
    folder = result.folder
    console.print(f"model {folder}   plot {result.plot}   samples {folder / 'samples.md'}\n", highlight=False)
    console.print("Next:", highlight=False)
    for command in (
        f'mlx-gpt generate {folder} --prompt "One rainy day, Tom went to the forest."',
        "mlx-gpt train --data shakespeare --out runs/shakespeare",
        "python examples/01_one_head.py",
    ):
        console.print(f"  {command}", style="bold", highlight=False, soft_wrap=True)
