"""``mlx-gpt prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mlx_gpt.commands.generation_flags import note
from mlx_gpt.terminal import make_console
from mlx_gpt.text.corpora import CORPORA, FileCorpus
from mlx_gpt.text.records import SUFFIXES, TEXT

NAMES = ", ".join(name for name, corpus in CORPORA.items() if isinstance(corpus, FileCorpus))


@dataclass(frozen=True)
class Prepare:
    """Encode text to token ids on disk, once, for many trainings."""

    sources: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="SOURCE",
            help=f"files, folders and globs of {', '.join(SUFFIXES)}, compressed or not; - for stdin; or {NAMES}",
        ),
    ]
    out: Path
    """the new folder of ids, for train --data"""
    tokenizer: str = "bpe:1024"
    """gpt2, bytes, or bpe:N: N ids learned from the text; or a model that generate opens, or a tokenizer.json"""
    val_fraction: float = 0.1
    """the share of the text for validation, in whole documents if possible"""
    seed: int = 0
    """seed of the random choice of these documents"""
    val_data: str | None = None
    """a file, folder or glob of text for validation, instead of a share"""
    text_field: Annotated[str, arg(name="field")] = TEXT
    """the field of a JSON record, or the column of a table, that has the text"""

    def __call__(self) -> None:
        from rich.progress import Progress

        from mlx_gpt.errors import UsageError
        from mlx_gpt.files import is_vacant
        from mlx_gpt.store.find_tokenizer import find_tokenizer
        from mlx_gpt.text.prepare import prepare_text
        from mlx_gpt.text.sources import find_sources

        if not self.sources:
            raise UsageError("expected at least one SOURCE: a file, a folder, a glob, or a named corpus")
        if not is_vacant(self.out):
            raise UsageError(f"--out {self.out} exists already; choose a new folder, or remove it")
        console = make_console(stderr=True, highlight=False)
        tokenizer = find_tokenizer(self.tokenizer)
        sources = find_sources(self.sources, self.val_fraction, self.seed, self.val_data, self.text_field)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("encoding", total=sources.n_bytes)
            prepared = prepare_text(sources, tokenizer, self.out, lambda n: bar.update(task, completed=n))
        for part in ("train", "val"):
            counts = prepared.metadata[part]
            console.print(f"{part}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
        if sources.changes:
            note(sources.changes)
        console.print(f"next: mlx-gpt train --data {self.out} --out runs/mine")
