"""Targets and data."""

from mlx_gpt.check.doctor.data import corpus, targets, texts, tokenizers  # noqa: F401  (register their checks)
