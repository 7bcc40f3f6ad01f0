"""Examine a GPT, of this package or anybody's own: why does it talk gibberish though its loss falls?"""

# Each group registers its checks.
from mlx_gpt.check.doctor import data, forward, level, optimisation, sampling, weights  # noqa: F401
from mlx_gpt.check.doctor.examine import examine
from mlx_gpt.check.doctor.report import Finding, Report

__all__ = ["Finding", "Report", "examine"]
