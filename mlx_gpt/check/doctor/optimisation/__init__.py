"""Optimisation: loss, gradient and step."""

from mlx_gpt.check.doctor.optimisation import (  # noqa: F401  (register their checks)
    accumulation,
    gradient,
    learning_rate,
    loss,
    start,
    step,
)
