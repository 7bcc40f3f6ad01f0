"""The split of text into training and validation.

Text files are split by bytes, whole files if possible; records (lines of .jsonl, rows of .parquet) one by one. A
generated corpus has validation documents of its own (``corpora.tinyworld``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping

VAL_FRACTION = 0.1  # the default


def split_files(sizes: Mapping[int, int], val_fraction: float, seed: int) -> dict[int, int]:
    """Return the byte offset at which validation begins, for each text file that has validation text.

    ``sizes`` maps a file's number to its bytes. Random whole files (offset 0) are for validation if they make up at
    least half of ``val_fraction``; otherwise the end of every file is.
    """
    budget = unused = val_fraction * sum(sizes.values())
    whole: dict[int, int] = {}
    for i in random.Random(seed).sample(sorted(sizes), len(sizes)):
        if 0 < sizes[i] <= unused:
            whole[i] = 0
            unused -= sizes[i]
    if whole and unused <= budget / 2:
        return whole
    return {i: round(size * (1 - val_fraction)) for i, size in sizes.items()}


def is_val_record(file: int, record: int, val_fraction: float, seed: int) -> bool:
    """Return True if a record is for validation: at random for each one, so that they need not be counted first."""
    return random.Random(f"{seed} {file} {record}").random() < val_fraction
