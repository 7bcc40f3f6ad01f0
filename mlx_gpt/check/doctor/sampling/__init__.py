"""Sampling: draws against the model, settings, prompts and a full context."""

from mlx_gpt.check.doctor.sampling import beyond, checks, padding  # noqa: F401  (register their checks)
