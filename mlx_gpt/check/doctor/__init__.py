"""Examine a GPT, of this package or anybody's own: why does it talk gibberish though its loss falls?"""

from mlx_gpt.check.doctor.examine import examine
from mlx_gpt.check.doctor.report import Finding, Report

__all__ = ["Finding", "Report", "examine"]
