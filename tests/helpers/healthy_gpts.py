"""Healthy models of many makes, as arguments of ``examine``: none has a fault."""

from __future__ import annotations

from collections.abc import Callable

from .healthy_functions import FUNCTIONS
from .healthy_modules import MODULES
from .healthy_samplers import SAMPLERS
from .healthy_transformers import TRANSFORMERS
from .planted import Given

HEALTHY: dict[str, Callable[[], Given]] = {**MODULES, **TRANSFORMERS, **FUNCTIONS, **SAMPLERS}
