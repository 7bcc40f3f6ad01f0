"""``mlx-gpt prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Prepare:
    """Turn text into token ids on disk, once, to train on them often."""

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE")]
    """files, folders and globs of .txt, .md, .jsonl and .parquet; or shakespeare, tinystories, fineweb-edu"""
    out: Path
    """where the ids go: a new folder, then good for train --data"""
    tokenizer: str = "bpe:1024"
    """gpt2, bytes, or bpe:N: N ids learned from the text"""
    val_fraction: float = 0.1
    """the share of the text to measure by, whole documents where there are enough"""
    seed: int = 0
    """of which documents those are"""

    def __call__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        from mlx_gpt.errors import UsageError
        from mlx_gpt.text.dataset import find_text
        from mlx_gpt.text.prepare import prepare_text

        if not self.sources:
            raise UsageError("expected at least one SOURCE: a file, a folder, a glob, or a named corpus")
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"--val-fraction must be between 0 and 1, not {self.val_fraction:g}")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UsageError(f"--out {self.out} exists already; choose a new folder, or remove it")
        console = Console(stderr=True, highlight=False)
        sources = find_text(self.sources, self.val_fraction, self.seed)
        size = sum(file.stat().st_size for file in sources.files if file.exists())
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("encoding", total=size)
            done = prepare_text(sources, self.tokenizer, self.out, lambda n: bar.update(task, completed=n))
        for part in ("train", "val"):
            counts = done.about[part]
            console.print(f"{part}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
        if sources.replaced:
            console.print(f"{sources.replaced:,} bytes were no UTF-8 and were replaced")
        console.print(f"next: mlx-gpt train --data {self.out} --out runs/mine")
