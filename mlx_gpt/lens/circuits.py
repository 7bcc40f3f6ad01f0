"""The QK and OV circuits of a head as products of two thin matrices, never multiplied out over the vocabulary.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Vectors are multiplied from the left, as in
TransformerLens. Biases and, unless folded, the norms are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.weights import check_head, embedding_matrix, head_matrix, input_matrices, output_matrices
from mlx_gpt.model.gpt import GPT

ROWS = 256  # rows of a product over the vocabulary that are in memory at once


@dataclass(frozen=True)
class FactoredMatrix:
    """The product of ``left`` (m, D) and ``right`` (D, n), with D small, as TransformerLens's class of this name."""

    left: mx.array
    right: mx.array

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.right.T, self.left.T)

    @property
    def product(self) -> mx.array:
        """The matrix itself, (m, n); only for small ones."""
        return self.left @ self.right

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(np.sqrt(np.sum(self._svd()[1] ** 2)))

    def svd(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return U (m, D), S (D,) and Vh (D, n), with ``product == U * S @ Vh``, by decreasing S.

        Computed in float64 by NumPy from the QR factors of both sides.
        """
        U, S, Vh = (mx.array(array.astype(np.float32)) for array in self._svd())
        return U, S, Vh

    def top_pairs(self, k: int = 10) -> tuple[mx.array, mx.array, mx.array]:
        """Return rows, columns and values of the k largest entries, (k,) each, by decreasing value.

        They are in the k rows with the highest maxima, which are found with ``ROWS`` rows of the product at a time.
        """
        left, right = self.left.astype(mx.float32), self.right.astype(mx.float32)
        highest = []
        for start in range(0, left.shape[0], ROWS):
            highest.append((left[start : start + ROWS] @ right).max(axis=1))
            mx.eval(highest[-1])
        rows = mx.argsort(-mx.concatenate(highest))[:k]
        values = (left[rows] @ right).flatten()
        top = mx.argsort(-values)[:k]
        return rows[top // right.shape[1]], top % right.shape[1], values[top]

    def _svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        left, right = (np.array(side.astype(mx.float32), np.float64) for side in (self.left, self.right))
        Q_left, R_left = np.linalg.qr(left)
        Q_right, R_right = np.linalg.qr(right.T)
        U, S, Vh = np.linalg.svd(R_left @ R_right.T)
        return Q_left @ U, S, Vh @ Q_right.T


def qk_circuit(model: GPT, layer: int, head: int, *, tokens: bool = False, fold_norm: bool = False) -> FactoredMatrix:
    """Return W_Q @ W_K.T: (C, C), how well a key of one direction answers a query of another, before the scale.

    With ``tokens`` W_E stands on both sides: (V, V), which token attends to which. ``fold_norm`` multiplies by the
    weight of the norm before, as it is when the circuit reads the residual stream.
    """
    check_head(model, layer, head)
    W_Q, W_K, _ = (matrices[head] for matrices in input_matrices(model.h[layer].attn))
    if fold_norm:
        W_Q, W_K = (centered(model.h[layer].ln_1.weight[:, None] * W) for W in (W_Q, W_K))
    if tokens:
        W_E = embedding_matrix(model)
        W_Q, W_K = W_E @ W_Q, W_E @ W_K
    return FactoredMatrix(W_Q, W_K.T)


def ov_circuit(model: GPT, layer: int, head: int, *, tokens: bool = False, fold_norm: bool = False) -> FactoredMatrix:
    """Return W_V @ W_O: (C, C), what a head adds to the stream of a query for what it finds at a key.

    With ``tokens`` between W_E and W_U: (V, V), which logits a token raises where it is attended to. ``fold_norm``
    multiplies by the weight of the norm before the layer, and with ``tokens`` of the final one.
    """
    check_head(model, layer, head)
    block = model.h[layer]
    W_V, W_O = input_matrices(block.attn)[2][head], output_matrices(block.attn)[head]
    if fold_norm:
        W_V = centered(block.ln_1.weight[:, None] * W_V)
    if tokens:
        W_U = head_matrix(model).T  # (C, V)
        W_V, W_O = (
            embedding_matrix(model) @ W_V,
            W_O @ (centered(model.ln_f.weight[:, None] * W_U) if fold_norm else W_U),
        )
    return FactoredMatrix(W_V, W_O)


def centered(W: mx.array) -> mx.array:
    """Return W without the mean over its inputs, (C, n) -> (C, n), since a norm removes that of the vector it reads."""
    return W - W.mean(axis=0, keepdims=True)


def singular_tokens(
    model: GPT, circuit: FactoredMatrix, n: int = 3, k: int = 10
) -> tuple[mx.array, mx.array, mx.array]:
    """Return for the first n singular directions of a (C, C) circuit the tokens that they mean, and the values S (n,).

    Ids (n, k) of the embeddings most along the direction read, and ids (n, k) of the tokens whose logits the direction
    written raises most (for a QK circuit: of the tokens that are found). The sign of a direction is arbitrary.
    Millidge & Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable".
    """
    U, S, Vh = circuit.svd()
    read = U[:, :n].T @ embedding_matrix(model).T  # (n, V)
    written = Vh[:n] @ head_matrix(model).T  # (n, V)
    return mx.argsort(-read, axis=-1)[:, :k], mx.argsort(-written, axis=-1)[:, :k], S[:n]


def composition_scores(model: GPT, kind: str) -> mx.array:
    """Return how much each head reads what an earlier one writes, by its queries, keys or values: (L, H, L, H).

    ``kind`` is "Q", "K" or "V"; entry [l1, h1, l2, h2] is the norm of the product of the first head's OV circuit and
    the second's QK or OV circuit, divided by both norms (Elhage et al. 2021); 0 unless l1 < l2.
    """
    if kind not in ("Q", "K", "V"):
        raise UsageError(f"heads compose by Q, K or V, not {kind!r}")
    L, H = model.config.n_layer, model.config.n_head
    inputs = [input_matrices(block.attn) for block in model.h]  # W_Q, W_K, W_V: (H, C, D)
    W_Q, W_K, W_V = (mx.stack([of_layer[i] for of_layer in inputs]).astype(mx.float32) for i in range(3))
    W_O = mx.stack([output_matrices(block.attn) for block in model.h]).astype(mx.float32)  # (L, H, D, C)
    reads, rest = {"Q": (W_Q, W_K.swapaxes(2, 3)), "K": (W_K, W_Q.swapaxes(2, 3)), "V": (W_V, W_O)}[kind]
    # Of a product A B, |A B|^2 = sum(A^T A * B B^T): all norms are those of D x D matrices.
    write_gram = W_V.swapaxes(2, 3) @ W_V  # (L, H, D, D)
    read_gram = rest @ rest.swapaxes(2, 3)
    writer_norm = mx.sqrt((write_gram * (W_O @ W_O.swapaxes(2, 3))).sum(axis=(2, 3)))  # (L, H)
    reader_norm = mx.sqrt(((reads.swapaxes(2, 3) @ reads) * read_gram).sum(axis=(2, 3)))
    scores = mx.zeros((L, H, L, H))
    for first in range(L - 1):
        for second in range(first + 1, L):
            middle = W_O[first][:, None] @ reads[second][None]  # (H, H, D, D)
            product = (write_gram[first][:, None] @ middle) @ read_gram[second][None]
            norm = mx.sqrt(mx.maximum((product * middle).sum(axis=(2, 3)), 0))
            scores[first, :, second] = norm / writer_norm[first][:, None] / reader_norm[second][None]
    return scores
