"""Optimisation: loss, gradient and step."""

from mlx_gpt.check.doctor.optimisation import gradient, learning_rate, loss, start, step  # noqa: F401  (register their checks)
