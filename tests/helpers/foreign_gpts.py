"""GPTs as different people write them, in MLX and NumPy, each healthy or with a mistake that people ask about.

Each function returns the arguments of ``examine``; ``mistake`` is "" or one of the names in ``MISTAKES``, which gives
the codes that name it. They share no code but the text and the optimizer's step, and use nothing of the package's.
"""

from __future__ import annotations

from collections.abc import Callable

from . import foreign_einsum, foreign_lecture, foreign_library, foreign_pico
from .foreign_training import Given

AUTHORS = {"lecture": foreign_lecture, "einsum": foreign_einsum, "pico": foreign_pico, "library": foreign_library}
PEOPLE: dict[str, Callable[[str], Given]] = {name: getattr(file, name) for name, file in AUTHORS.items()}
MISTAKES: dict[tuple[str, str], str] = {
    (name, mistake): codes for name, file in AUTHORS.items() for mistake, codes in file.MISTAKES.items()
}
