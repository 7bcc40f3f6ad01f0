"""Level: loss and text on the ladder from chance to the best possible."""

from mlx_gpt.check.doctor.level import reported, text, training  # noqa: F401  (register their checks)
