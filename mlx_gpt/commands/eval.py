"""``mlx-gpt eval``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from mlx_gpt.commands.generation_flags import note
from mlx_gpt.terminal import make_console

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Eval:
    """Evaluate a model: perplexity of a text, LAMBADA (predict the last word) or HellaSwag (choose an ending).

    Prints the metrics with their standard errors, and published ones of the same model.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    task: str
    """perplexity, lambada or hellaswag"""
    revision: str | None = None
    """a branch, tag or commit on the hub"""
    data: str | None = None
    """a file of text for perplexity (- for stdin), else records with the fields of the public data set, the default"""
    text_field: Annotated[str | None, arg(name="field")] = None
    """perplexity: the field of a JSON record, or the column of a table, that has the text; default text"""
    stride: int | None = None
    """perplexity: tokens by which the window moves; default half the model's context"""
    json: bool = False
    """print the metrics and every setting as JSON"""

    def __call__(self) -> None:
        import json

        from rich.progress import Progress

        from mlx_gpt.check.evaluate import evaluate, find_task, published
        from mlx_gpt.store.folder import load_source
        from mlx_gpt.store.layouts import find_source
        from mlx_gpt.text.find import one_file

        task = find_task(self.task)
        given = None if self.data is None else one_file(self.data)
        source = find_source(self.model, self.revision)
        model, tokenizer = load_source(source)
        data = given or task.fetch()
        console = make_console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            row = bar.add_task(self.task, total=None)

            def on_scored(done: int, total: int) -> None:
                bar.update(row, completed=done, total=total)

            result = evaluate(model, tokenizer, self.task, data, on_scored, stride=self.stride, field=self.text_field)
        result |= {
            "model": self.model,
            "revision": self.revision,
            "data": self.data or f"{task.repository}/{task.file}",
            "published": published(self.task, self.model, source.folder, model.n_parameters),
        }
        if result["changes"]:
            note(result["changes"])
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            make_console(highlight=False).print(as_table(result))


def as_table(result: dict[str, Any]) -> Table:
    from rich.table import Column, Table

    value, error = (Column(name, justify="right") for name in ("value", "standard error"))
    title = f"{result['task']} of {result['model']}, n = {result['n']}"
    table = Table("", value, error, "source", title=title, title_justify="left")
    for name, figure in result["figures"].items():
        stderr = "" if figure["stderr"] is None else f"{figure['stderr']:.2g}"
        table.add_row(name, f"{figure['value']:.6g}", stderr, "measured here")
    for figure in result["published"]:
        table.add_row(f"[dim]{figure['what']}[/]", f"{figure['value']:g}", "", figure["source"])
    return table
