"""Weights: layers, heads, units, and what saving keeps."""

from mlx_gpt.check.doctor.weights import effect, heads, identical, residual, saved, tying, units  # noqa: F401  (register checks)
