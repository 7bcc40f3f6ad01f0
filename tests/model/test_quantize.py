"""Quantized weights: which weights, their size and error, and generation with them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.generation import generate, generate_many
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
SMALL = GPTConfig(vocab_size=257, n_positions=32, n_embd=64, n_layer=2, n_head=2)


def new_model(**changes: object) -> GPT:
    mx.random.seed(0)
    return GPT(replace(SMALL, **changes)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_except_the_position_embedding_is_quantized(tied: bool) -> None:
    model = quantize(new_model(tie_word_embeddings=tied), 4)
    parameters = dict(tree_flatten(model.parameters()))
    matrices = [
        "wte",
        *(f"h.{i}.{m}" for i in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ]
    matrices += [] if tied else ["lm_head"]
    assert {name for name, weight in parameters.items() if weight.dtype == mx.uint32} == {
        f"{m}.weight" for m in matrices
    }
    assert parameters["wpe.weight"].dtype == parameters["ln_f.weight"].dtype == mx.float32


@pytest.mark.parametrize(("bits", "share", "error"), [(8, (8 + 1) / 32, 0.01), (4, (4 + 1) / 32, 0.2)])
def test_weights_take_their_bits_and_logits_stay_near(bits: int, share: float, error: float) -> None:
    plain, small = new_model(), quantize(new_model(), bits)

    def matrices(model: GPT) -> int:
        named = tree_flatten(model.parameters())
        return sum(value.nbytes for name, value in named if value.ndim == 2 and not name.startswith("wpe"))

    assert matrices(small) == share * matrices(plain)  # a scale and an offset of 32 bits for 64 weights
    ids = np.arange(64).reshape(2, 32)
    logits = np.array(plain(ids))
    off = np.abs(np.array(small(ids)) - logits).max() / np.abs(logits).max()
    assert 0 < off < error


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_generates_the_same_text_alone_and_in_a_batch(bits: int) -> None:
    model = quantize(new_model(initializer_range=0.3), bits)
    prompts = ["a", "something longer", ""]
    texts = generate_many(model, TOKENIZER, prompts, temperature=0, cache_bits=8)
    assert texts == ["".join(generate(model, TOKENIZER, p, temperature=0, cache_bits=8)) for p in prompts]


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UsageError, match="to 8 or 4 bits, not 5"):
        quantize(new_model(), 5)
    with pytest.raises(UsageError, match="in groups of 64, but this model's widths are 32 and 128"):
        quantize(new_model(n_embd=32), 8)
    assert quantize(new_model(n_embd=32), 8, group_size=32)
