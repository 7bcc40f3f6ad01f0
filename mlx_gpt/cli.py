"""One command, ``mlx-gpt``, a verb for each job. Each verb is a dataclass: its fields are the flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg, subcommand

from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.train.loop import TrainConfig

PRESET = "tiny"


@dataclass(frozen=True)
class Architecture(GPTConfig):
    """The flags of an architecture: ``GPTConfig``, but how many ids there are is the tokenizer's to say."""

    vocab_size: Suppress[int] = GPTConfig.vocab_size

    @classmethod
    def like(cls, preset: str) -> Architecture:
        """The flags with a preset's values for defaults."""
        return cls(**asdict(GPTConfig.preset(preset)))

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**asdict(self))


@dataclass(frozen=True)
class Train:
    """Train a GPT on a text of yours."""

    data: str
    """tinyworld, shakespeare, a text file, or a folder of .txt and .md files"""
    out: Path
    """where the model folder, metrics.jsonl and loss.png go: a new folder"""
    tokenizer: str = "bpe:1024"
    """gpt2, bytes, or bpe:N: N ids learned from the text"""
    preset: Annotated[str, arg(help=f"the size that the flags below change: {', '.join(PRESETS)}")] = PRESET
    prompt: str = ""
    """what the samples during training continue"""
    model: Annotated[Architecture, arg(name="")] = field(default_factory=lambda: Architecture.like(PRESET))
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def __call__(self) -> None:
        from rich.console import Console

        from mlx_gpt.generate.decode import generate
        from mlx_gpt.text.corpus import load_corpus
        from mlx_gpt.train.run import check_new, new_model, prepare, run

        console = Console()
        check_new(self.out)
        material = prepare(load_corpus(self.data), self.tokenizer)
        model = new_model(self.model.config, material, self.config.seed)
        console.print(
            f"{model.n_parameters:,} parameters, {material.train.n_tokens:,} tokens to train on, "
            f"{material.val.n_tokens:,} to measure by, vocabulary {material.tokenizer.vocab_size}",
            highlight=False,
        )

        generate(model, material.tokenizer, self.prompt)  # too long a prompt is told now, not halfway through

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

    model: Annotated[Positional[str], arg(metavar="MODEL")]
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


def parse(argv: Sequence[str]) -> Train | Generate | Quickstart:
    """The verb that a command line asks for, with all its settings. ``SystemExit`` after --help and for wrong flags."""
    default: Any = tyro.MISSING
    if argv[:1] == ["train"]:  # the preset first: it decides what the other flags default to
        scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        scout.add_argument("--preset", nargs="?")
        preset = scout.parse_known_args(argv)[0].preset or PRESET
        default = Train(data=tyro.MISSING, out=tyro.MISSING, preset=preset, model=Architecture.like(preset))
    description = "GPT-2 in MLX: train it, load it, let it talk."
    return tyro.cli(Verb, prog="mlx-gpt", args=argv, default=default, description=description)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for what went wrong outside, 2 for wrong usage."""
    try:
        parse(list(sys.argv[1:] if argv is None else argv))()
        sys.stdout.flush()
    except UsageError as error:
        return _say(error, 2)
    except MLXGPTError as error:
        return _say(error, 1)
    except BrokenPipeError:  # nobody reads any more, as after `| head -1`; nor shall Python try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell says it: ended by SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written to
        return _say(f"{error.filename or 'the disk'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the ^C
        return _say("stopped", 128 + 2)
    return 0


def _say(trouble: object, code: int) -> int:
    print(f"mlx-gpt: {trouble}", file=sys.stderr)
    return code
