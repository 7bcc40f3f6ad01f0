"""Saving and precision: the logits of the reloaded model, and those of half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_gpt.check.doctor.case import CallFailed, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.inside import has_half, in_float32, module_of
from mlx_gpt.check.doctor.module_arguments import arguments_of
from mlx_gpt.check.doctor.modules import is_module
from mlx_gpt.check.doctor.parameters import current, loaded, require_steady
from mlx_gpt.check.doctor.probes import probe_length

ROUNDING = 1e-4  # of the logits' standard deviation, that another order of float32 operations may change
COMPUTED = 0.05  # of the same, that computing in half precision may change
ROWS = 4  # texts


@dataclass(frozen=True)
class Reloaded:
    """Logits of the model and of the reloaded one for the same ids: (B, T, V) each."""

    forward: Callable[..., Any]
    ids: np.ndarray
    logits: np.ndarray
    again: np.ndarray

    @property
    def difference(self) -> float:
        """Return its root mean square relative to the logits' standard deviation; infinity where not finite."""
        size = float(np.sqrt(np.square(self.again - self.logits).mean())) / float(self.logits.std() or 1)
        return size if np.isfinite(size) else float("inf")


def reloaded(case: Case) -> Reloaded:
    """Call the model and the reloaded one."""
    require_steady(case)
    forward = case.call("reload")
    if is_module(forward):
        forward = arguments_of(forward)[0]["forward"]
    if not callable(forward):
        message = f"reload returned {type(forward).__name__}; expected a forward function"
        raise CallFailed("reload", "wrong-shape", message)
    ids = case.ids(ROWS, probe_length(case))
    return Reloaded(forward, ids, case.logits(ids), case.logits(ids, "reload", forward))


@check("reload-differs", "forward", "reload", explained_by=("state",))
def reload_differs(case: Case) -> Found:
    """The model has different logits after it is saved and loaded again, by more than rounding.

    Measured is the root mean square of the difference over the logits' standard deviation. A fault above 1e-4 (saved
    completely: 0; another order of float32 operations: 1e-6), unless rounded weights explain it: ``precision-loss``.
    """
    other = case.once(reloaded)
    if other.difference <= ROUNDING or case.once(rounded_to) is not None:
        return None
    again = case.logits(other.ids, "reload", other.forward)
    random = not np.allclose(again, other.again, rtol=1e-4, atol=1e-5, equal_nan=True)
    return {
        "measured": other.difference,
        "expected": 0,
        "why": f"the reloaded model's logits differ by {other.difference:.2g} of their standard deviation"
        + (", and from call to call" if random else ""),
        "remedy": "call eval() on the reloaded model"
        if random
        else "save every parameter and load with strict=True; compare names, shapes and orientation of square matrices",
        "evidence": {"random": random},
    }


def rounded_to(case: Case) -> str | None:
    """Return the format whose rounding of the weights explains the reloaded model's difference, None if none does.

    The parameters are rounded and loaded: the change of the logits must have a cosine above 0.2 with the reloaded
    model's, and at least a quarter of its size. Where parameters cannot be loaded, a difference below 2e-2 is taken for
    rounding.
    """
    other = case.once(reloaded)
    if other.difference <= ROUNDING or not np.isfinite(other.difference):
        return None
    if not case.has("parameters", "load_parameters"):
        return "half precision" if other.difference < 2e-2 else None
    difference = (other.again - other.logits).ravel()
    total = float(np.linalg.norm(difference))
    for name, rounded in (("float16", to_float16), ("bfloat16", to_bfloat16)):
        with loaded(case, {key: rounded(array) for key, array in case.once(current).items()}):
            effect = (case.logits(other.ids) - other.logits).ravel()
        size = float(np.linalg.norm(effect))
        if 4 * size > total and float(effect @ difference) > 0.2 * size * total:
            return name
    return None


def to_float16(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(array.dtype) if array.dtype.kind == "f" else array


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to the upper 16 bits of a float32, to the nearest value, ties to even."""
    if array.dtype.kind != "f":
        return array
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(array.dtype)


@check("precision-loss", "forward")
def precision_loss(case: Case) -> Found:
    """Half precision costs accuracy: weights are saved in it, or its logits are far from those of float32.

    Saved weights are measured as in ``reload-differs``. For computation, the parameters are converted to float32: a
    warning if the logits change by more than 0.05 of their standard deviation, root mean square (measured for 2 to 12
    layers and weights of standard deviation 0.02 to 0.3: bfloat16 0.004 to 0.024, float16 below 0.004).
    """
    if case.has("reload") and (name := case.once(rounded_to)):
        size = case.once(reloaded).difference
        return {
            "measured": size,
            "expected": 0,
            "why": f"the reloaded model's logits differ by {size:.2g} of their standard deviation, as after rounding "
            f"weights to {name}",
            "remedy": "save the weights in the precision in which they are trained",
            "evidence": {"format": name, "where": "reload"},
        }
    require_steady(case)
    module = module_of(case)
    if module is None or not has_half(module):
        if case.has("reload"):
            return None
        raise NotApplicable("reload, or a module in half precision")
    ids = case.ids(ROWS, probe_length(case))
    half = case.logits(ids)
    with in_float32(module):
        full = case.logits(ids)
    size = float(np.sqrt(np.square(half - full).mean())) / float(full.std() or 1)
    if size <= COMPUTED:
        return None
    return {
        "measured": size,
        "expected": f"below {COMPUTED}",
        "why": f"in float32 the same weights give logits that differ by {size:.2g} of their standard deviation",
        "remedy": "compute norms, softmax and the residual stream in float32, and keep float32 copies of the weights",
        "evidence": {"where": "computation"},
    }
