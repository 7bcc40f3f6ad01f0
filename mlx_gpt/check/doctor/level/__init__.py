"""Level: loss and generated text beside those of n-gram models."""

from mlx_gpt.check.doctor.level import reported, text, training  # noqa: F401  (register their checks)
