"""``mlx-gpt export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mlx_gpt.terminal import make_console


@dataclass(frozen=True)
class Export:
    """Export a model to another program: llm.c, nanoGPT (with torch installed), or llama.cpp (GGUF)."""

    model: Annotated[Positional[str], arg(metavar="FOLDER")]
    """a model folder, or any other source that convert takes"""
    dest: Annotated[Positional[Path], arg(metavar="DEST")]
    """the file to write; it must be new"""
    to: Literal["llm.c", "nanogpt", "gguf"]
    """the file's format"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """dtype of the weights: float32 by default, or bfloat16 (llm.c), or float16 (gguf)"""

    def __call__(self) -> None:
        import mlx.core as mx

        from mlx_gpt.files import expand_user
        from mlx_gpt.store.export import export
        from mlx_gpt.store.layouts import find_source

        console = make_console(stderr=True, highlight=False)
        source = find_source(self.model)
        with console.status(f"writing for {self.to}"):
            remark = export(source, self.dest, self.to, getattr(mx, self.dtype) if self.dtype else None)
        if remark:
            console.print(remark, soft_wrap=True)
        dest = expand_user(self.dest)
        console.print(f"{dest}: {dest.stat().st_size / 1e6:,.1f} MB, for {self.to}", soft_wrap=True)
