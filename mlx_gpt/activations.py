"""The activation functions that transformers knows by name, apart from GPT-2's own, which is in ``model/ops.py``.

Names and formulas are those of ``transformers/activations.py``, ``ACT2FN``. Two of its entries are not here, as they
have weights: ``prelu`` and ``xielu``. All are elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import mlx.core as mx

GELU_NEW = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")  # one formula


def gelu(x: mx.array) -> mx.array:
    """Return the exact GELU, x Phi(x), with Phi the normal distribution function, as in Cerebras-GPT."""
    return x * (0.5 + 0.5 * mx.erf(x * sqrt(0.5)))


def relu(x: mx.array) -> mx.array:
    """Return max(x, 0)."""
    return mx.maximum(x, 0)


def silu(x: mx.array) -> mx.array:
    """Return x sigmoid(x) (Elfwing et al. 2017)."""
    return x * mx.sigmoid(x)


def softplus(x: mx.array) -> mx.array:
    """Return log(1 + e^x)."""
    return mx.logaddexp(x, 0)


def laplace(x: mx.array) -> mx.array:
    """Return the normal distribution function with a mean and deviation that approximate relu2 (Ma et al. 2022)."""
    return 0.5 + 0.5 * mx.erf((x - 0.707107) / (0.282095 * sqrt(2)))


OTHERS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_10": lambda x: mx.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": relu,
    "relu2": lambda x: mx.square(relu(x)),
    "relu6": lambda x: mx.minimum(relu(x), 6),
    "leaky_relu": lambda x: mx.maximum(x, 0.01 * x),
    "silu": silu,
    "swish": silu,
    "hardswish": lambda x: x * mx.minimum(relu(x + 3), 6) / 6,
    "mish": lambda x: x * mx.tanh(softplus(x)),
    "sqrtsoftplus": lambda x: mx.sqrt(softplus(x)),
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "laplace": laplace,
    "linear": lambda x: x,
}
