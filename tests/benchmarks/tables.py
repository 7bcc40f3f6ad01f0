"""Write the tables of ``tests/README.md`` from the files of ``mlx-gpt bench --json`` in ``tests/benchmarks/results``.

python tests/benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_gpt.bench.report import tables

RESULTS, README = Path(__file__).parent / "results", Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- from tests/benchmarks/results -->\n", "<!-- end of results -->\n"


def section() -> str:
    """Return the tables of all files, by name."""
    files = sorted(RESULTS.glob("*.json"))
    parts = ["\n".join(tables(json.loads(file.read_text(encoding="utf-8")))) for file in files]
    return "\n" + "\n".join(f"{part.rstrip()}\n" for part in parts) + "\n"


def updated(page: str) -> str:
    """Return the page with the tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + section() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
