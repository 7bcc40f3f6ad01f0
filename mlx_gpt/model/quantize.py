"""Quantization: 32 or 64 neighboring weights share a scale and an offset and take 8 or 4 bits each."""

from __future__ import annotations

import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT

QUANTIZED_BITS = (8, 4)


def quantize(model: GPT, bits: int, group_size: int = 64) -> GPT:
    """Quantize the linear layers and the token embedding of a model, in place, and return the model.

    Leaves out the position embedding. Raises ``UsageError`` if a width is no multiple of ``group_size``.
    """
    check_quantizable(model.config, bits, group_size)
    nn.quantize(model, group_size, bits, class_predicate=quantizable)
    return model


def check_quantizable(config: GPTConfig, bits: int, group_size: int = 64) -> None:
    """Raise ``UsageError`` if ``quantize`` cannot quantize this model."""
    if bits not in QUANTIZED_BITS:
        raise UsageError(f"weights can be quantized to 8 or 4 bits, not {bits}")
    C, inner = config.n_embd, config.inner_dim
    if C % group_size or inner % group_size:
        raise UsageError(
            f"weights are quantized in groups of {group_size}, but this model's widths are {C} and {inner}; "
            f"they must be multiples of it"
        )


def quantizable(path: str, module: nn.Module) -> bool:
    """Return whether ``quantize`` changes the module at this path."""
    return hasattr(module, "to_quantized") and path != "wpe"
