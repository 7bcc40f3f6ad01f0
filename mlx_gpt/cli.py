"""One command, ``mlx-gpt``, a verb for each job. Each verb is a dataclass: its fields are the flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.train.loop import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a GPT on a text of yours."""

    data: str
    """tinyworld, shakespeare, a text file, or a folder of .txt and .md files"""
    out: Path
    """where the model folder, metrics.jsonl and loss.png go: a new folder"""
    tokenizer: str = "bpe:1024"
    """gpt2, bytes, or bpe:N: N ids learned from the text"""
    preset: str = "tiny"
    """the architecture to start from; the flags below override its fields"""
    prompt: str = ""
    """what the samples during training continue"""
    model: Annotated[GPTConfig, arg(name="")] = field(default_factory=lambda: PRESETS["tiny"])
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def __call__(self) -> None:
        from rich.console import Console

        from mlx_gpt.generate.decode import generate
        from mlx_gpt.text.corpus import load_corpus
        from mlx_gpt.train.run import check_new, new_model, prepare, run

        console = Console()
        check_new(self.out)
        material = prepare(load_corpus(self.data), self.tokenizer)
        model = new_model(self.model, material, self.config.seed)
        console.print(
            f"{model.n_parameters:,} parameters, {material.train.n_tokens:,} tokens to train on, "
            f"{material.val.n_tokens:,} to measure by, vocabulary {material.tokenizer.vocab_size}",
            highlight=False,
        )

        def sample(step: int, done: float) -> None:
            text = "".join(generate(model, material.tokenizer, self.prompt, max_tokens=60))
            console.print(
                "    " + (self.prompt + text).replace("\n", "\n    "), style="cyan", markup=False, highlight=False
            )

        result = run(model, material, self.config, self.out, console, sample)
        marks = ", ".join(f"{name} {loss:.3f}" for name, loss in material.marks.items())
        console.print(f"validation loss {result.val_loss:.4f} nats per token ({marks})", highlight=False)
        console.print(f"model and metrics: {result.folder}   plot: {result.plot}", highlight=False)
        console.print(f'next: mlx-gpt generate {result.folder} --prompt "..."', highlight=False)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a model folder or a GPT-2 from the Hugging Face hub.

    The continuation goes to stdout, everything else to stderr.
    """

    model: Positional[str]
    """a folder, or a hub id such as openai-community/gpt2"""
    prompt: str = ""
    """the text to continue; nothing starts a new one"""
    max_tokens: int = 200
    """how long the continuation may be"""
    temperature: float = 0.8
    """0 takes the most probable token, 1 draws from the model's own distribution"""
    top_k: int = 0
    """draw only from the K most probable tokens; 0 is off"""
    top_p: float = 1.0
    """draw only from the most probable tokens that together have this probability; 1 is off"""
    seed: int | None = None
    """the same seed gives the same text"""

    def __call__(self) -> None:
        from mlx_gpt.generate.decode import generate
        from mlx_gpt.generate.sampling import make_sampler
        from mlx_gpt.store.folder import load

        make_sampler(self.temperature, self.top_k, self.top_p)  # complain before the weights are read
        model, tokenizer = load(self.model)
        for piece in generate(
            model,
            tokenizer,
            self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        ):
            print(piece, end="", flush=True)
        print(flush=True)


@dataclass(frozen=True)
class Quickstart:
    """Watch a small GPT go from gibberish to readable stories."""

    minutes: float = 3.0
    """how long it may take, everything included"""
    out: Path = Path("runs/quickstart")
    """where the model, the plot and the samples go; a number is appended if it exists"""
    seed: int = 0
    """of the weights, the stories and the samples"""

    def __call__(self) -> None:
        from mlx_gpt.quickstart import quickstart

        quickstart(self.minutes, self.out, self.seed)


Verb = OmitArgPrefixes[
    Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Generate, subcommand("generate", prefix_name=False)]
    | Annotated[Quickstart, subcommand("quickstart", prefix_name=False)]
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for what went wrong outside, 2 for wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        tyro.cli(Verb, prog="mlx-gpt", args=argv, description="GPT-2 in MLX: train it, load it, let it talk.")()
    except (UsageError, ValueError) as error:
        print(f"mlx-gpt: {error}", file=sys.stderr)
        return 2
    except MLXGPTError as error:
        print(f"mlx-gpt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmlx-gpt: stopped", file=sys.stderr)
        return 130
    return 0
