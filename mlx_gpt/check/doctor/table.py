"""The table of symptoms and codes in ``README.md``; ``python -m mlx_gpt.check.doctor.table`` writes it."""

from __future__ import annotations

from pathlib import Path

from mlx_gpt.check.doctor.checks import symptom_of
from mlx_gpt.check.doctor.codes import GROUPS, severity_of

PAGE = Path(__file__).parent / "README.md"
START = "<!-- from the docstrings of the checks, by python -m mlx_gpt.check.doctor.table -->\n"
END = "<!-- end -->\n"


def table() -> str:
    """Return the table in Markdown, by group, in the order of repair."""
    parts = []
    for group, codes in GROUPS.items():
        rows = [f"| `{code}`{mark(code)} | {symptom_of(code).replace('|', chr(92) + '|')} |" for code in codes]
        parts.append("\n".join([f"### {group.capitalize()}\n", "| code | symptom |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def mark(code: str) -> str:
    severity = severity_of(code)
    return "" if severity == "fault" else f" ({severity})"


def with_table(page: str) -> str:
    """Return a page with its table replaced by the current one."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    import mlx_gpt.check.doctor  # noqa: F401  # registers the checks

    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
