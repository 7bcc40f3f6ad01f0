"""The hub's GPT-2 weights and ours: the same names, four kinds of matrix transposed. Dicts in, dicts out, no files.

The hub keeps OpenAI's layout (``transformers``, ``pytorch_utils.py``, ``Conv1D``): a matrix is (in, out) and is
used as ``x @ W``. ``nn.Linear`` keeps (out, in) and uses ``x @ W.T``. One of the four, ``attn.c_proj``, is square:
no shape tells whether it has been transposed, so ``tests/test_parity.py`` looks at the logits.
"""

from __future__ import annotations

import re

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError

Weights = dict[str, mx.array]

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which older files carry along


def from_hub(weights: Weights, config: GPTConfig, dtype: mx.Dtype = mx.float32) -> Weights:
    """The parameters of ``GPT(config)`` from a hub GPT-2's tensors, with or without the prefix ``transformer.``

    Drops what is no parameter: the mask buffers, and an ``lm_head.weight`` that repeats a tied ``wte.weight``. Every
    tensor becomes ``dtype``: half-precision files are for storing, float32 is for computing. Raises
    ``ModelFolderError`` for a tensor that is missing, unexpected, not of floats, or of another shape.
    """
    weights = parameters_of(weights, config)
    check_weights(weights, config)
    return {name: _transposed(name, weight).astype(dtype) for name, weight in weights.items()}


def to_hub(weights: Weights) -> Weights:
    """The way back: our parameters as the hub's tensors, without prefix."""
    return {name: _transposed(name, weight) for name, weight in weights.items()}


def hub_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT-2 on the hub and its shape; matrices are (in, out)."""
    V, P, C, inner = config.vocab_size, config.n_positions, config.n_embd, config.inner_dim
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (P, C)}
    for i in range(config.n_layer):
        block: dict[str, tuple[int, ...]] = {
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


def parameters_of(weights: Weights, config: GPTConfig) -> Weights:
    """The tensors under their unprefixed names, without mask buffers and without the copy of a tied head."""
    bare: Weights = {}
    for name, weight in weights.items():
        short = name.removeprefix("transformer.")
        if short in bare:
            raise ModelFolderError(
                f"{short}: expected once, found with and without the prefix 'transformer.'; "
                f"this file mixes two models, fetch it again"
            )
        if not MASK_BUFFER.fullmatch(short):
            bare[short] = weight
    if config.tie_word_embeddings and "lm_head.weight" in bare:
        head = bare.pop("lm_head.weight")
        wte = bare.get("wte.weight", head)  # a missing wte is told by check_weights
        if not mx.array_equal(head, wte):
            raise ModelFolderError(
                "lm_head.weight: expected a copy of wte.weight, as config.json says the head is tied, found other "
                'values; if this model has a head of its own, write "tie_word_embeddings": false into config.json'
            )
    return bare


def check_weights(weights: Weights, config: GPTConfig) -> None:
    """Raise ``ModelFolderError`` unless these are the hub tensors that ``config`` promises, each in its shape."""
    shapes = hub_shapes(config)
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
                f"{name}: expected shape {shape}, found {found.shape}; {_remedy(name, shape, found)}"
            )
        if not mx.issubdtype(found.dtype, mx.floating):
            raise ModelFolderError(
                f"{name}: expected floats of shape {shape}, found {found.dtype}; "
                f"if the model is quantized, take its original in float32, float16 or bfloat16"
            )


def _transposed(name: str, weight: mx.array) -> mx.array:
    # A copy, not a view: the same memory layout, and so the same rounding, as in a model that was never on disk.
    return mx.contiguous(weight.T) if name.endswith(CONV1D) else weight


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _remedy(name: str, shape: tuple[int, ...], found: mx.array) -> str:
    setting = {"wte.weight": "vocab_size", "lm_head.weight": "vocab_size", "wpe.weight": "n_positions"}.get(name)
    if setting and found.shape[1:] == shape[1:]:
        return f'if the weights are right, write "{setting}": {found.shape[0]} into config.json'
    if found.shape == shape[::-1]:
        return "the matrices lie the wrong way round, as nanoGPT and llm.c keep them: transpose them to (in, out)"
    return "the weights and config.json do not belong together: fetch both from the same place"
