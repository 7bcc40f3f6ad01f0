"""Optimisation: loss, gradient and step."""

from mlx_gpt.check.doctor.optimisation import loss, step  # noqa: F401  (register their checks)
