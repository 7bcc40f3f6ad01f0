"""A forward pass: contract, state, causality, inputs, cache."""

from mlx_gpt.check.doctor.forward import cache, causality, contract, inputs, state  # noqa: F401  (register their checks)
