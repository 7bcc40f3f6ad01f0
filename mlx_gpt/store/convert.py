"""Convert between the hub's GPT-2 weights and ours: the same names, four kinds of matrix transposed. No file access.

The hub has OpenAI's layout (``transformers``, ``pytorch_utils.py``, ``Conv1D``): a matrix is (in, out) and computes
``x @ W``. ``nn.Linear`` has (out, in) and computes ``x @ W.T``. One of the four, ``attn.c_proj``, is square, so its
shape cannot reveal a missing transpose; ``tests/check/test_parity.py`` compares logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from typing import NamedTuple

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError

Weights = dict[str, mx.array]

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HUB = "transformer."  # the prefix of most of the hub's names
MLX_LM = "model."  # the prefix of mlx-lm's names, whose matrices are (out, in)
QUANTIZED = ("weight", "scales", "biases")  # the parts of a quantized matrix
BUFFER = re.compile(r"(^|.*\.)h\.\d+\.attn\.(bias|masked_bias)|n_averaged")  # the causal mask, in older files
# Prefixes, anywhere in a name, of torch.compile, FSDP, activation checkpoints, Lightning's strategies and DDP.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
ANCHOR = "wpe.weight"  # a tensor that every GPT-2 has once

Shapes = dict[str, tuple[int, ...]]


class Quantization(NamedTuple):
    """Affine quantization of the matrices: ``group_size`` weights of ``bits`` each share a scale and an offset."""

    group_size: int
    bits: int


def from_hub(weights: Weights, config: GPTConfig, dtype: mx.Dtype | None = mx.float32) -> Weights:
    """Return the parameters of ``GPT(config)`` as ``dtype`` from the hub's tensors; see ``checked``."""
    return to_hub(checked(weights, config, dtype))


def checked(weights: Weights, config: GPTConfig, dtype: mx.Dtype | None = None) -> Weights:
    """Return the hub's tensors, checked and under their bare names.

    Drops the mask buffers, and an ``lm_head.weight`` that repeats a tied ``wte.weight``. Casts to ``dtype``; None
    leaves each tensor as it is. Raises ``ModelFolderError`` for a tensor that is missing, unexpected, not of floats, or
    of another shape.
    """
    weights = parameters_of(weights, config)
    check_weights(weights, hub_shapes(config))
    return {name: _cast(weight, dtype) for name, weight in weights.items()}


def from_linear(
    weights: Weights, config: GPTConfig, dtype: mx.Dtype | None = mx.float32, quantization: Quantization | None = None
) -> Weights:
    """Return the same from matrices (out, in), as in nanoGPT, llm.c and mlx-lm, perhaps quantized."""
    weights = parameters_of(weights, config)
    shapes, quantized = linear_shapes(config), set()
    if quantization:
        quantized = {name for name in weights if f"{name.removesuffix('.weight')}.scales" in weights}
        shapes = quantized_shapes(shapes, quantized, quantization)
    check_weights(weights, shapes, quantized)
    return {name: weight if name in quantized else _cast(weight, dtype) for name, weight in weights.items()}


def quantize_weights(weights: Weights, quantization: Quantization) -> Weights:
    """Return our parameters quantized as by ``model.quantize``, under mlx-lm's names."""
    quantized: Weights = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if weight.ndim == 2 and stem != "wpe":
            parts = dict(zip(QUANTIZED, mx.quantize(weight, *quantization), strict=True))
        else:
            parts = {kind: weight}
        quantized |= {f"{'' if stem == 'lm_head' else MLX_LM}{stem}.{part}": value for part, value in parts.items()}
    return quantized


def to_hub(weights: Weights) -> Weights:
    """Return our parameters as the hub's tensors, without prefix; transposing is its own inverse."""
    # A copy, not a view, so that its memory layout and rounding are those of a model that was never saved.
    return {name: mx.contiguous(x.T) if name.endswith(CONV1D) else x for name, x in weights.items()}


def hub_shapes(config: GPTConfig) -> Shapes:
    """Return the shape of every tensor of a GPT-2 on the hub; matrices are (in, out)."""
    V, P, C, inner = config.vocab_size, config.n_positions, config.n_embd, config.inner_dim
    shapes: Shapes = {"wte.weight": (V, C), "wpe.weight": (P, C)}
    for i in range(config.n_layer):
        block: Shapes = {
            "ln_1.weight": (C,),
            "ln_1.bias": (C,),
            "attn.c_attn.weight": (C, 3 * C),  # q, k and v side by side
            "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C),
            "attn.c_proj.bias": (C,),
            "ln_2.weight": (C,),
            "ln_2.bias": (C,),
            "mlp.c_fc.weight": (C, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, C),
            "mlp.c_proj.bias": (C,),
        }
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, C)
    return shapes


def linear_shapes(config: GPTConfig) -> Shapes:
    """Return the shape of every parameter of a GPT-2; matrices are (out, in)."""
    return {name: shape[::-1] if name.endswith(CONV1D) else shape for name, shape in hub_shapes(config).items()}


def quantized_shapes(shapes: Shapes, quantized: Set[str], quantization: Quantization) -> Shapes:
    """Return ``shapes`` with the ``quantized`` matrices packed into uint32, next to their scales and offsets."""
    group_size, bits = quantization
    found: Shapes = {}
    for name, shape in shapes.items():
        if name in quantized and len(shape) == 2:
            *rows, width = shape
            widths = (width * bits // 32, width // group_size, width // group_size)
            stem = name.removesuffix(".weight")
            found |= {f"{stem}.{part}": (*rows, n) for part, n in zip(QUANTIZED, widths, strict=True)}
        else:
            found[name] = shape
    return found


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name that of GPT-2's parameter: without what ``WRAPPERS`` add, nor the prefix all have in common.

    ``_orig_mod.model.transformer.h.0._fsdp_wrapped_module.ln_1.weight`` -> ``h.0.ln_1.weight``; the head,
    ``model.lm_head.weight``, has a part of that prefix. Raises ``ModelFolderError`` for two models in one dict.
    """
    short = {name: WRAPPERS.sub("", name) for name in names}
    prefixes = sorted({name.removesuffix(ANCHOR) for name in short.values() if re.fullmatch(rf"(.*\.)?{ANCHOR}", name)})
    if len(prefixes) > 1:
        raise ModelFolderError(
            f"{ANCHOR}: expected once, found with the prefixes {', '.join(map(repr, prefixes))}; this file mixes two "
            f"models: save the one you want alone"
        )
    prefix = prefixes[0] if prefixes else ""
    bare = {}
    for name, rest in short.items():
        head = re.fullmatch(r"((?:.*\.)?)(lm_head\.\w+)", rest)
        bare[name] = head[2] if head and prefix.startswith(head[1]) else rest.removeprefix(prefix).removeprefix(HUB)
    return bare


def is_buffer(name: str) -> bool:
    """Return True for the name of what is no parameter: a causal mask, or a counter of averaged models."""
    return bool(BUFFER.fullmatch(WRAPPERS.sub("", name)))


def is_linear(weights: Weights) -> bool:
    """Return True if the matrices are (out, in): ``c_attn``, from C to 3C, is square in no GPT-2."""
    shape = next((w.shape for name, w in weights.items() if name.endswith("h.0.attn.c_attn.weight")), ())
    return len(shape) == 2 and shape[0] == 3 * shape[1]


def parameters_of(weights: Weights, config: GPTConfig) -> Weights:
    """Return the tensors under their bare names, without buffers and without the copy of a tied head.

    Where only the head of a tied pair was kept, as ``safetensors.torch.save_model`` does, it is the embedding.
    """
    bare: Weights = {}
    for name, short in bare_names(weights).items():
        if short in bare:
            raise ModelFolderError(
                f"{short}: expected once, found with and without a prefix, as {name}; "
                f"this file mixes two models, fetch it again"
            )
        if not is_buffer(short):
            bare[short] = weights[name]
    if config.n_layer > max(len(bare), 1000):  # before the names of a billion layers are listed
        raise ModelFolderError(
            f"config.json: n_layer is {config.n_layer}, but there are {len(bare)} tensors in all; the weights and "
            f"config.json do not belong together: fetch both from the same place"
        )
    if config.tie_word_embeddings and "lm_head.weight" in bare:
        head = bare.pop("lm_head.weight")
        wte = bare.setdefault("wte.weight", head)
        if not mx.array_equal(head, wte):
            raise ModelFolderError(
                "lm_head.weight: expected a copy of wte.weight, as config.json says the head is tied, found other "
                'values; if this model has its own head, write "tie_word_embeddings": false into config.json'
            )
    return bare


def check_weights(weights: Weights, shapes: Shapes, quantized: Set[str] = frozenset()) -> None:
    """Raise ``ModelFolderError`` unless these are exactly the tensors of ``shapes``, of floats or ``quantized``."""
    if missing := [name for name in shapes if name not in weights]:
        raise ModelFolderError(
            f"{missing[0]}: expected shape {shapes[missing[0]]}, found no such tensor{_and_more(missing)}; "
            f"the weights and config.json do not belong together, or this is no GPT-2 language model"
        )
    if unexpected := [name for name in weights if name not in shapes]:
        raise ModelFolderError(
            f"{unexpected[0]}: expected no such tensor, found shape {weights[unexpected[0]].shape}"
            f"{_and_more(unexpected)}; compare n_layer and architectures in config.json with the weights"
        )
    for name, shape in shapes.items():
        found = weights[name]
        if found.shape != shape:
            raise ModelFolderError(
                f"{name}: expected shape {shape}, found {found.shape}; {_remedy(name, shape, found.shape)}"
            )
        if not mx.issubdtype(found.dtype, mx.floating) and not (name in quantized and found.dtype == mx.uint32):
            raise ModelFolderError(
                f"{name}: expected floats of shape {shape}, found {found.dtype}; "
                f"if the model is quantized, take its original in float32, float16 or bfloat16"
            )


def _cast(weight: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Return a tensor as ``dtype``, or unchanged if None."""
    return weight if dtype is None else weight.astype(dtype)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _remedy(name: str, shape: tuple[int, ...], found: tuple[int, ...]) -> str:
    setting = {"wte.weight": "vocab_size", "lm_head.weight": "vocab_size", "wpe.weight": "n_positions"}.get(name)
    if setting and found[1:] == shape[1:]:
        return f'if the weights are right, write "{setting}": {found[0]} into config.json'
    if found == shape[::-1]:
        return "the matrices are (out, in), as in nanoGPT and llm.c: transpose them to (in, out)"
    return "the weights and config.json do not belong together: fetch both from the same place"
