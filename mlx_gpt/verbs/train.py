"""``mlx-gpt train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Suppress, arg

from mlx_gpt.config import PRESETS, GPTConfig
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


def defaults(argv: Sequence[str]) -> Train:
    """What the flags default to: the preset is read first, since it decides the others."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument("--preset", nargs="?")
    preset = scout.parse_known_args(argv)[0].preset or PRESET
    return Train(data=tyro.MISSING, out=tyro.MISSING, preset=preset, model=Architecture.like(preset))
