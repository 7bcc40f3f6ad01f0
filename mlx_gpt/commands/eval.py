"""``mlx-gpt eval``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Eval:
    """Measure a model: the perplexity of a text, LAMBADA (the last word), or HellaSwag (which of four endings).

    The figures go to stdout, with their standard errors, and those that others published of the same model.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, or a hub id such as openai-community/gpt2"""
    task: str
    """perplexity, lambada or hellaswag"""
    revision: str | None = None
    """a branch, tag or commit of the hub's"""
    data: str | None = None
    """a text file, or for the others a .jsonl with the fields of the public set; the public set if not given"""
    stride: int | None = None
    """perplexity: by how many tokens the window slides; half the model's context if not given"""
    json: bool = False
    """the figures and every setting as JSON"""

    def __call__(self) -> None:
        import os

        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at the first product: float32 in full on M5 and CUDA too

        import json
        from pathlib import Path

        from rich.console import Console
        from rich.progress import Progress

        from mlx_gpt.check.datasets import PUBLIC, fetch
        from mlx_gpt.check.evaluate import TASKS, evaluate, published
        from mlx_gpt.errors import DataError, UsageError
        from mlx_gpt.store.folder import load
        from mlx_gpt.store.locate import find_folder

        if self.task not in TASKS:
            raise UsageError(f"--task must be one of {', '.join(TASKS)}, not {self.task!r}")
        if self.data is not None and not Path(self.data).expanduser().is_file():
            raise DataError(f"{self.data}: expected a file for --data, found none")
        folder = find_folder(self.model, self.revision)
        model, tokenizer = load(folder)
        data = fetch(self.task) if self.data is None else Path(self.data).expanduser()
        with Progress(console=Console(stderr=True), transient=True) as bar:
            row = bar.add_task(self.task, total=None)
            result = evaluate(
                model,
                tokenizer,
                self.task,
                data,
                self.stride,
                lambda done, total: bar.update(row, completed=done, total=total),
            )
        result |= {
            "model": self.model,
            "revision": self.revision,
            "data": self.data or "/".join(PUBLIC[self.task]),
            "published": published(self.task, self.model, folder, model.n_parameters),
        }
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            Console(highlight=False).print(as_table(result))


def as_table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{result['task']} of {result['model']}, n = {result['n']}", title_justify="left")
    for column, justify in (("", "left"), ("figure", "right"), ("standard error", "right"), ("source", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, figure in result["figures"].items():
        error = "" if figure["stderr"] is None else f"{figure['stderr']:.2g}"
        table.add_row(name, f"{figure['value']:.6g}", error, "measured here")
    for figure in result["published"]:
        table.add_row(f"[dim]{figure['what']}[/]", f"{figure['value']:g}", "", figure["source"])
    return table
