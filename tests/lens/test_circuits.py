"""Circuits of heads: factored matrices equal the products, and the products equal what heads compute."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import C, D, H, L, V, largest_difference, random_ids, random_model

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import FactoredMatrix, composition_scores, ov_circuit, qk_circuit, singular_tokens, trace
from mlx_gpt.lens import circuits as module
from mlx_gpt.lens.weights import embedding_matrix, head_matrix, input_matrices, output_matrices
from mlx_gpt.model.quantize import quantize

MODEL, TOKENS = random_model(), random_ids()


def random_factored(m: int = 20, n: int = 30, rank: int = 4) -> FactoredMatrix:
    return FactoredMatrix(mx.random.normal((m, rank)), mx.random.normal((rank, n)))


# Factored matrices


def test_the_svd_is_that_of_the_product() -> None:
    matrix = random_factored()
    U, S, Vh = matrix.svd()
    assert (U.shape, S.shape, Vh.shape) == ((20, 4), (4,), (4, 30))
    np.testing.assert_allclose(np.array(S), np.linalg.svd(np.array(matrix.product))[1][:4], rtol=1e-5)
    assert largest_difference((U * S) @ Vh, matrix.product) < 1e-5
    assert largest_difference(U.T @ U, mx.eye(4)) < 1e-5
    assert largest_difference(Vh @ Vh.T, mx.eye(4)) < 1e-5
    assert matrix.norm() == pytest.approx(np.linalg.norm(np.array(matrix.product)), rel=1e-5)
    assert largest_difference(matrix.T.product, matrix.product.T) < 1e-6


@pytest.mark.parametrize("rows", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 10, 10_000])
def test_the_top_pairs_are_the_largest_entries(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    matrix = random_factored()
    row, column, value = matrix.top_pairs(k)
    dense = np.array(matrix.product)
    np.testing.assert_allclose(np.array(value), -np.sort(-dense.flatten())[:k], atol=1e-5)
    np.testing.assert_allclose(dense[np.array(row), np.array(column)], np.array(value), atol=1e-5)


@pytest.mark.freed_at_once
def test_top_pairs_never_hold_a_matrix_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 64)
    matrix = random_factored(4000, 4000, rank=2)
    mx.eval(matrix.left, matrix.right)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    matrix.top_pairs(5)
    assert mx.get_peak_memory() - before < 4000 * 4000 * 4 / 10


# Circuits


def test_the_scores_are_those_of_the_qk_circuit() -> None:
    model = random_model()
    for block in model.h:
        block.attn.c_attn.bias = mx.zeros_like(block.attn.c_attn.bias)
    _, a = trace(model, TOKENS, names=["*", "*ln1.hook_out"])
    x = a["blocks.1.ln1.hook_out"][0]
    scores = (x @ qk_circuit(model, 1, 2).product @ x.T) * model.h[1].attn.scale
    found = a["blocks.1.attn.hook_attn_scores"][0, 2]
    assert largest_difference(mx.where(mx.isinf(found), 0, scores), mx.where(mx.isinf(found), 0, found)) < 1e-4


@pytest.mark.parametrize("bits", [None, 8])
def test_what_a_head_adds_is_its_pattern_times_its_ov_circuit(bits: int | None) -> None:
    model = random_model(n_embd=64)
    model = quantize(model, bits) if bits else model
    for block in model.h:
        block.attn.c_attn.bias = mx.zeros_like(block.attn.c_attn.bias)
    _, a = trace(model, TOKENS, names=["*", "*ln1.hook_out", "*hook_result"])
    pattern, x = a["blocks.1.attn.hook_pattern"][0, 2], a["blocks.1.ln1.hook_out"][0]
    added = pattern @ (x @ ov_circuit(model, 1, 2).product)
    assert largest_difference(added, a["blocks.1.attn.hook_result"][0, :, 2]) < 1e-4


def test_folding_the_norm_makes_a_circuit_read_the_normalized_stream() -> None:
    _, a = trace(MODEL, TOKENS)
    normalized, ln_1 = a["blocks.1.ln1.hook_normalized"][0], MODEL.h[1].ln_1
    folded, plain = ov_circuit(MODEL, 1, 2, fold_norm=True), ov_circuit(MODEL, 1, 2)
    assert largest_difference(normalized @ folded.product, (normalized * ln_1.weight) @ plain.product) < 1e-4
    q, k = (normalized * ln_1.weight, normalized * ln_1.weight)
    scores = normalized @ qk_circuit(MODEL, 1, 2, fold_norm=True).product @ normalized.T
    assert largest_difference(scores, q @ qk_circuit(MODEL, 1, 2).product @ k.T) < 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_circuits_over_tokens_stand_between_embedding_and_head(tied: bool) -> None:
    model = random_model(tie_word_embeddings=tied)
    W_E, W_U = embedding_matrix(model), head_matrix(model).T
    assert (W_E.shape, W_U.shape) == ((V, C), (C, V))
    expected = W_E @ ov_circuit(model, 0, 1).product @ W_U
    assert largest_difference(ov_circuit(model, 0, 1, tokens=True).product, expected) < 1e-4
    expected = W_E @ qk_circuit(model, 0, 1).product @ W_E.T
    assert largest_difference(qk_circuit(model, 0, 1, tokens=True).product, expected) < 1e-4
    assert mx.array_equal(W_E, W_U.T) == tied


def test_the_matrices_of_a_head_are_the_models() -> None:
    head = MODEL.h[2].attn.head(1)
    W_Q, W_K, W_V = (W[1] for W in input_matrices(MODEL.h[2].attn))
    assert W_Q.shape == (C, D)
    for W, linear in zip((W_Q, W_K, W_V), (head.query, head.key, head.value), strict=True):
        assert mx.array_equal(W, linear.weight.T)
    assert mx.array_equal(output_matrices(MODEL.h[2].attn)[1], head.output.weight.T)


def test_singular_directions_name_the_tokens_they_read_and_write() -> None:
    circuit = ov_circuit(MODEL, 1, 2)
    read, written, S = singular_tokens(MODEL, circuit, n=2, k=5)
    assert (read.shape, written.shape, S.shape) == ((2, 5), (2, 5), (2,))
    U, _, Vh = (np.array(part) for part in circuit.svd())
    W_E, W_U = np.array(embedding_matrix(MODEL)), np.array(head_matrix(MODEL)).T
    assert np.array(read)[1].tolist() == np.argsort(-(W_E @ U[:, 1]))[:5].tolist()
    assert np.array(written)[0].tolist() == np.argsort(-(Vh[0] @ W_U))[:5].tolist()


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_scores_are_the_norms_of_the_products(kind: str) -> None:
    found = np.array(composition_scores(MODEL, kind))
    assert found.shape == (L, H, L, H)
    for l1, h1, l2, h2 in np.ndindex(L, H, L, H):
        write, read = ov_circuit(MODEL, l1, h1).product, qk_circuit(MODEL, l2, h2).product
        read = {"Q": read, "K": read.T, "V": ov_circuit(MODEL, l2, h2).product}[kind]
        a, b = np.array(write), np.array(read)
        expected = np.linalg.norm(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) if l1 < l2 else 0
        assert found[l1, h1, l2, h2] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "head", "message"),
    [
        (L, 0, f"layer must be between 0 and {L - 1}, not {L}"),
        (0, H, f"head must be between 0 and {H - 1}, not {H}"),
        (-1, 0, "layer must be"),
        (0, -1, "head must be"),
    ],
)
def test_a_head_that_is_not_there_is_refused(layer: int, head: int, message: str) -> None:
    circuits: list[Any] = [qk_circuit, ov_circuit]
    for circuit in circuits:
        with pytest.raises(UsageError, match=message):
            circuit(MODEL, layer, head)
    with pytest.raises(UsageError, match="by Q, K or V, not 'O'"):
        composition_scores(MODEL, "O")
