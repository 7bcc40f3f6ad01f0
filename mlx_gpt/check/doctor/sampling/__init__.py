"""Sampling: draws against the model, settings, prompts and a full context."""

from mlx_gpt.check.doctor.sampling import settings, verdict  # noqa: F401  (register their checks)
