"""``mlx-gpt verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from mlx_gpt.terminal import make_console

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_gpt.check.result import Check


@dataclass(frozen=True)
class Verify:
    """Check that a model computes what its files specify, against a float64 reference.

    Prints every check with its measured value and tolerance. The exit code is 0 only if no check fails.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    revision: str | None = None
    """a branch, tag or commit on the hub"""
    known_as: str | None = None
    """for a folder: the known model it should be, such as gpt2; by default identified by checksum"""
    tokens: int | None = None
    """length of the longest prompt; default the full context"""
    json: bool = False
    """print the report as JSON"""

    def __call__(self) -> None:
        import sys

        from mlx_gpt.check.published import check_name, known_models
        from mlx_gpt.check.verify import as_json, loaded, verify
        from mlx_gpt.errors import UsageError, VerificationError
        from mlx_gpt.files import expand_user

        progress = make_console(stderr=True).status
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--tokens must be at least 1, not {self.tokens}")
        models = known_models()
        name = check_name(self.known_as, models) or (None if expand_user(self.model).exists() else self.model)
        checks = []
        with loaded(self.model, self.revision) as (model, tokenizer, folder), progress("verifying") as status:
            for check in verify(model, tokenizer, folder, name, self.tokens, models):
                checks.append(check)
                status.update(f"verifying; done: {check.what}")
        if self.json:
            print(as_json(checks))
        else:
            width = None if sys.stdout.isatty() else 150  # keep lines whole in a file
            make_console(highlight=False, width=width).print(as_table(self.model, checks))
        if wrong := [check for check in checks if check.holds is False]:
            raise VerificationError(f"{self.model}: {len(wrong)} of {len(checks)} checks fail, first: {wrong[0]}")


def as_table(name: str, checks: list[Check]) -> Table:
    from rich.markup import escape
    from rich.table import Column, Table

    marks = {True: "[green]holds[/]", False: "[bold red]WRONG[/]", None: "[dim]skipped[/]"}
    figure, tolerance = (Column(name, justify="right") for name in ("measured", "tolerance"))
    table = Table("", "check", figure, tolerance, "", title=f"verify {name}", title_justify="left")
    for check in checks:
        numbers = ("" if x is None else f"{x:.2g}" for x in (check.figure, check.tolerance))
        table.add_row(marks[check.holds], check.what, *numbers, escape(check.remark))
    return table
