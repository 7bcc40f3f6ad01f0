"""Sampling: the drawn tokens, settings, prompts, batches of prompts, and texts longer than the context."""

from mlx_gpt.check.doctor.sampling import beyond, checks, padding  # noqa: F401  (register their checks)
