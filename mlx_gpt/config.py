"""The architecture of a GPT-2 as a frozen, validated dataclass, and presets of common sizes.

Field names and defaults are those of Hugging Face's ``GPT2Config`` (``transformers``,
``models/gpt2/configuration_gpt2.py``), so that a hub ``config.json`` maps directly onto it. One default differs:
dropout is 0 here (0.1 there), because a model that sees each token once or twice does not need it, and attention
dropout rules out the fused attention kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_gpt.activations import GELU_NEW, OTHERS
from mlx_gpt.errors import UsageError

ACTIVATIONS = (*GELU_NEW, *OTHERS)
FLOAT32_MAX = 3.4e38
INT32_MAX = 2**31 - 1  # MLX's dimensions have 32 bits


@dataclass(frozen=True)
class GPTConfig:
    """The settings that determine what a GPT-2 computes. Raises ``UsageError`` (a ``ValueError``) if invalid."""

    vocab_size: int = 50257  # V, number of token ids
    n_positions: int = 1024  # maximum sequence length, in tokens
    n_embd: int = 768  # C, width of the residual stream
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # H, attention heads per block
    n_inner: int | None = None  # width inside the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"  # GPT-2's own, or another of ACTIVATIONS
    embd_pdrop: float = 0.0  # dropout on the embeddings
    attn_pdrop: float = 0.0  # dropout on the attention weights
    resid_pdrop: float = 0.0  # dropout on the outputs of attention and MLP
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of the initial weights
    scale_attn_weights: bool = True  # divide the scores by sqrt(head width)
    scale_attn_by_inverse_layer_idx: bool = False  # divide the scores also by the layer's number, from 1
    tie_word_embeddings: bool = True  # the head is the token embedding, transposed

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= INT32_MAX:
                raise UsageError(f"{name} must be an integer of at least 1 and below 2^31, not {value!r}")
        if self.n_embd % self.n_head:
            raise UsageError(
                f"n_embd must be a multiple of n_head (each head gets an equal share of the width): "
                f"got n_embd={self.n_embd}, n_head={self.n_head}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise UsageError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, not {self.activation_function!r}"
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise UsageError(f"{name} must be a probability in [0, 1), not {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value <= FLOAT32_MAX):
                raise UsageError(f"{name} must be a number above 0, not {value!r}")
            object.__setattr__(self, name, float(value))  # MLX refuses a long integer
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):  # the string "false" would count as true
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def head_dim(self) -> int:
        """Return D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Return the width inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """Return a preset with some fields overridden: ``GPTConfig.preset("tiny", vocab_size=512)``."""
        if name not in PRESETS:
            raise UsageError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise UsageError(f"GPTConfig has no field {', '.join(unknown)}; its fields are: {', '.join(sorted(known))}")
        return replace(PRESETS[name], **overrides)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PRESETS: dict[str, GPTConfig] = {
    # OpenAI's releases (Radford et al. 2019, table 2; head counts from the released hparams), and DistilGPT2.
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPTConfig(n_layer=6),
    # Sizes to train from scratch on a laptop.
    "tiny": GPTConfig(n_positions=256, n_embd=128, n_layer=4, n_head=4),
    "small": GPTConfig(n_positions=256, n_embd=256, n_layer=6, n_head=4),
    "baby": GPTConfig(n_positions=256, n_embd=384, n_layer=6, n_head=6),  # nanoGPT's shakespeare_char
}
