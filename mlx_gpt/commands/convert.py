"""``mlx-gpt convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mlx_gpt.terminal import make_console


@dataclass(frozen=True)
class Convert:
    """Convert a GPT-2 in any known layout, which is detected, to a model folder, one tensor in memory at a time."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """a folder or hub id; a checkpoint of nanoGPT or a folder with pytorch_model.bin (both with torch installed);
    llm.c's .bin; a GGUF; or the folder of OpenAI's TensorFlow release"""
    dest: Annotated[Positional[Path], arg(metavar="DEST")]
    """the model folder to write; it must be new or empty"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """dtype of the weights; unchanged by default"""
    quantize: Literal[8, 4] | None = None
    """quantize the matrices to so many bits per weight, in groups of 64"""
    revision: str | None = None
    """a branch, tag or commit on the hub"""

    def __call__(self) -> None:
        import mlx.core as mx

        from mlx_gpt.store.folder import check_new, convert
        from mlx_gpt.store.layouts import find_source

        dest = check_new(self.dest)  # before a download
        console = make_console(stderr=True, highlight=False)
        source = find_source(self.source, self.revision)
        with console.status(f"converting from {source.kind}"):
            convert(source, dest, getattr(mx, self.dtype) if self.dtype else None, self.quantize)
        size = sum(file.stat().st_size for file in dest.iterdir())
        console.print(f"{dest}: {size / 1e6:,.1f} MB, from {source.kind}")
        console.print(f"next: mlx-gpt generate {dest}", soft_wrap=True)
