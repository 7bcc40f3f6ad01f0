"""The doctor's page: its table is that of the checks, and its two files are examined without a fault."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from mlx_gpt.check.doctor import examine
from mlx_gpt.check.doctor.build import built_arguments
from mlx_gpt.check.doctor.codes import ORDER
from mlx_gpt.check.doctor.table import PAGE, with_table


def test_the_table_is_made_from_the_docstrings_of_the_checks() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "python -m mlx_gpt.check.doctor.table makes it again"
    for code in ORDER:
        assert f"| `{code}`" in page


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mlx", "torch"])
def test_the_file_on_the_page_is_examined_without_a_fault(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    first, second = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if library == "torch":
        start, end = first.index("class GPT"), first.index("def batches")
        first = first[:start] + second + "\n\n" + first[end:]
    words = ["the cat", "a dog", "sees", "likes", "one bird", "and", "two fish", "."]
    rng = random.Random(0)
    (tmp_path / "my.txt").write_text(" ".join(rng.choice(words) for _ in range(5000)))
    (tmp_path / f"{library}_gpt.py").write_text(first)
    monkeypatch.chdir(tmp_path)
    report = examine(**built_arguments(f"{library}_gpt.py:build"), minutes=0.1)
    assert report.ok, str(report)
    assert report.skipped.get("targets-not-shifted", "minutes") == "minutes"  # not for lack of an argument
