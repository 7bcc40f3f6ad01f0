"""Two documents, and what a text's sources read of a file."""

from __future__ import annotations

from pathlib import Path

from mlx_gpt.text.find import TRAIN, TextFile
from mlx_gpt.text.sources import Sources

ONE, TWO = "one naïve line\nand another", "two 漢字"
ROWS = [{"id": 1, "text": ONE}, {"id": 2, "text": TWO}]


def documents(sources: Sources) -> list[str]:
    """The documents of all files, without a split."""
    sources.files = [TextFile(file.path, TRAIN) for file in sources.files]
    found: list[str] = []
    for piece in sources.pieces():
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    return found


def parts(sources: Sources) -> tuple[str, str]:
    """The text for training, and that for validation."""
    pieces = list(sources.pieces())
    train, val = ("|".join(piece.text for piece in pieces if piece.val is val) for val in (False, True))
    return train, val


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
