"""Weights to start from that are no noise."""

from math import log

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.head_start import head_start
from mlx_gpt.train.loss import mean_loss


@pytest.fixture
def model() -> GPT:
    mx.random.seed(0)
    model = GPT(GPTConfig(vocab_size=200, n_positions=48, n_embd=32, n_layer=4, n_head=2))
    head_start(model, seed=0)
    return model


def test_a_head_asks_for_what_it_answers_to_or_for_what_it_does_not(model):
    for layer, block in enumerate(model.h):
        same, other = (block.attn.head(i) for i in range(2))
        assert mx.array_equal(same.query.weight, same.key.weight)
        assert mx.array_equal(other.query.weight, (-1 if layer == 2 else 1) * other.key.weight)


@pytest.mark.parametrize(("n_head", "turned"), [(1, []), (2, [1]), (3, [2]), (4, [2, 3])])
def test_a_head_is_turned_round_as_a_whole(n_head, turned):
    model = GPT(GPTConfig(vocab_size=20, n_positions=8, n_embd=24, n_layer=4, n_head=n_head))
    head_start(model, seed=0)
    heads = [model.h[2].attn.head(i) for i in range(n_head)]
    signs = [1 if mx.array_equal(head.query.weight, head.key.weight) else -1 for head in heads]
    assert signs == [-1 if i in turned else 1 for i in range(n_head)]
    assert all(mx.array_equal(head.query.weight, s * head.key.weight) for s, head in zip(signs, heads, strict=True))


def test_what_a_layer_moves_it_moves_whole(model):
    for block in model.h:
        value = np.array(mx.split(block.attn.c_attn.weight, 3)[2])
        through = np.array(block.attn.c_proj.weight) @ value
        lengths = np.linalg.svd(through, compute_uv=False)
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)  # no direction is lost


def test_the_last_block_takes_away_what_it_finds(model):
    attention = model.h[-1].attn
    through = np.array(attention.c_proj.weight) @ np.array(mx.split(attention.c_attn.weight, 3)[2])
    np.testing.assert_allclose(through, through[0, 0] * np.eye(32), atol=1e-6)
    assert through[0, 0] < 0


def test_neighbouring_positions_look_alike(model):
    row = np.array(model.wpe.weight)
    alike = row[20] @ row.T
    for near, far in ((1, 2), (2, 4), (4, 16)):
        assert min(alike[20 - near], alike[20 + near]) > max(alike[20 - far], alike[20 + far])


def test_it_knows_no_token_from_another_yet(model):
    ids = mx.random.randint(0, 200, (8, 48), key=mx.random.key(1))
    assert float(mean_loss(model(ids), mx.roll(ids, -1, axis=1))) == pytest.approx(log(200), rel=0.02)


def test_another_seed_is_another_start(model):
    other = GPT(model.config)
    head_start(other, seed=1)
    assert not mx.array_equal(other.h[0].attn.c_attn.weight, model.h[0].attn.c_attn.weight)
