"""Variants of the step that move the weights alike: chunks, recomputation, accumulation, half precision, processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.command_line import ROOT, environment
from helpers.small_training import distance, peak
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train import loss as loss_module
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loss import chunked_mean_loss, mean_loss
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.recompute import hidden_recomputed
from mlx_gpt.train.step import make_train_step

SMALL = GPTConfig(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)


def new_model(config: GPTConfig = SMALL) -> GPT:
    mx.random.seed(0)
    return GPT(config)


def batches(n: int, config: GPTConfig = SMALL, B: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return n batches: x, y (n, B, T)."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (n, B, config.n_positions + 1), np.int32)
    return ids[..., :-1], ids[..., 1:]


def after(config: GPTConfig, x: np.ndarray, y: np.ndarray, **how: Any) -> tuple[float, float, dict[str, np.ndarray]]:
    """Return loss, gradient norm and change of the weights of one step of SGD with a learning rate of 1."""
    model = new_model(config)
    before = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    config = TrainConfig(grad_clip=1e9, batch_size=len(x) // how.get("accumulate", 1), **how)
    step, state = make_train_step(model, optim.SGD(1.0), config)
    loss, norm = step(mx.array(x), mx.array(y))
    mx.eval(loss, norm, state)
    change = {name: np.array(weight) - before[name] for name, weight in tree_flatten(model.parameters())}
    return loss.item(), norm.item(), change


# The loss in chunks


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_with_the_loss_in_chunks_moves_the_weights_alike(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, tie_word_embeddings=tied)
    (x,), (y,) = batches(1)
    monkeypatch.setattr(loss_module, "in_chunks", lambda logits, x: False)
    loss, norm, change = after(config, x, y)
    called = []
    monkeypatch.setattr(loss_module, "in_chunks", lambda logits, x: True)
    monkeypatch.setattr(loss_module, "chunked_mean_loss", lambda *a: called.append(a) or chunked_mean_loss(*a))
    chunked_loss, chunked_norm, chunked_change = after(config, x, y)
    assert called
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    assert chunked_norm == pytest.approx(norm, rel=1e-5)
    assert all(distance(chunked_change[name], change[name]) < 1e-5 for name in change)


# Recomputation


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputation_gives_the_same_gradient_also_with_dropout(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    (x,), (y,) = map(mx.array, batches(1))

    def gradient() -> dict[str, mx.array]:
        model = new_model(config)
        model.train()
        loss = nn.value_and_grad(model, lambda: mean_loss(model.logits(hidden_recomputed(model, x[0])), y[0]))
        return dict(tree_flatten(loss()[1]))

    x, y = x[None], y[None]
    again = gradient()
    monkeypatch.setattr(nn.utils, "checkpoint", lambda block, compute: compute)  # kept, with the same masks
    kept = gradient()
    assert all(distance(again[name], kept[name]) < 1e-6 for name in kept)


def test_with_recomputation_dropout_masks_differ_between_steps() -> None:
    model = new_model(replace(SMALL, resid_pdrop=0.5))
    step, state = make_train_step(model, optim.SGD(0.0), TrainConfig(batch_size=4, recompute=True))
    (x,), (y,) = map(mx.array, batches(1))
    losses = set()
    for _ in range(3):
        loss, _ = step(x, y)
        mx.eval(loss, state)
        losses.add(loss.item())
    assert len(losses) == 3


def memory_of_a_step(recompute: bool) -> int:
    config = GPTConfig(vocab_size=16, n_positions=128, n_embd=32, n_layer=8, n_head=2)
    (x,), (y,) = map(mx.array, batches(1, config))
    training = TrainConfig(batch_size=4, recompute=recompute)
    step, state = make_train_step(new_model(config), optim.SGD(1.0), training)
    return peak(lambda: [step(x, y), state])


@pytest.mark.freed_at_once
def test_recomputation_takes_less_memory() -> None:
    """In a process with the narrow graph of ``mlx-gpt train --recompute``: see ``lanes.set_graph_width``."""
    code = "from test_step import memory_of_a_step; print(memory_of_a_step(True), memory_of_a_step(False))"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/train"))
    env = environment(PYTHONPATH=path, MLX_BFS_MAX_WIDTH="20")
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    recomputed, kept = map(int, run.stdout.split())
    assert recomputed < 0.6 * kept


def test_recomputation_moves_the_weights_alike() -> None:
    loss, _, change = after(SMALL, *(part[0] for part in batches(1)))
    loss_again, _, change_again = after(SMALL, *(part[0] for part in batches(1)), recompute=True)
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert all(distance(change_again[name], change[name]) < 1e-5 for name in change)


# Accumulation


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_accumulated_batches_are_one_large_batch(dropout: float) -> None:
    x, y = batches(3)
    loss, norm, change = after(SMALL, x.reshape(12, -1), y.reshape(12, -1))
    accumulated = after(SMALL, x.reshape(12, -1), y.reshape(12, -1), accumulate=3)
    assert accumulated[0] == pytest.approx(loss, rel=1e-6)
    assert accumulated[1] == pytest.approx(norm, rel=1e-5)
    assert all(distance(accumulated[2][name], change[name]) < 1e-5 for name in change)


# Half precision


@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 0.1), ("float16", 0.02)])
@pytest.mark.parametrize("recompute", [False, True])
def test_in_half_precision_the_weights_stay_float32_and_move_nearly_alike(
    dtype: str, far: float, recompute: bool
) -> None:
    (x,), (y,) = batches(1)
    loss, norm, change = after(SMALL, x, y)
    half_loss, half_norm, half_change = after(SMALL, x, y, dtype=dtype, recompute=recompute)
    assert half_loss == pytest.approx(loss, rel=1e-2)
    assert half_norm == pytest.approx(norm, rel=far)
    assert all(part.dtype == np.float32 for part in half_change.values())
    whole = np.concatenate([part.ravel() for part in change.values()])
    assert distance(np.concatenate([half_change[name].ravel() for name in change]), whole) < far
    assert half_loss != loss  # it was not computed in float32 after all


def test_half_precision_keeps_updates_below_its_resolution() -> None:
    model = new_model()
    step, state = make_train_step(model, optim.SGD(1e-5), TrainConfig(batch_size=4, dtype="bfloat16"))
    before = np.array(model.ln_f.weight)  # ones: the next larger bfloat16 is 1.0078
    (x,), (y,) = batches(1)
    mx.eval(step(mx.array(x), mx.array(y)), state)
    moved = np.abs(np.array(model.ln_f.weight) - before)
    assert 0 < moved.max() < 1e-4


# Several processes

RANK = """
import json, sys
import mlx.core as mx, numpy as np
from mlx.utils import tree_flatten
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.train.distributed import join, rank, size
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

group = join()
mx.random.seed(0)
model = GPT(GPTConfig(**json.loads(sys.argv[1])))
optimizer = make_optimizer(TrainConfig(learning_rate=1e-2), 2)
step, state = make_train_step(model, optimizer, TrainConfig(batch_size=4 // size(group)), group)
losses = []
for rows in np.load(sys.argv[2]):
    mine = rows[rank(group) :: size(group)]
    loss, norm = step(mx.array(mine[:, :-1]), mx.array(mine[:, 1:]))
    mx.eval(loss, state)
    losses.append(loss.item())
total = sum(float(np.abs(np.array(weight)).sum()) for _, weight in tree_flatten(model.parameters()))
print(json.dumps([losses, total]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_train_like_one_with_the_whole_batch(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (6, 4, SMALL.n_positions + 1), np.int32)
    np.save(tmp_path / "ids.npy", ids)
    hosts = [[f"127.0.0.1:{free_port()}"] for _ in range(2)]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    settings = json.dumps({name: getattr(SMALL, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer")})
    command = [sys.executable, "-c", RANK, settings[:-1] + ', "n_head": 2}', str(tmp_path / "ids.npy")]

    def started(**environment: str) -> subprocess.Popen:
        root = Path(__file__).parents[2]
        here = {"PATH": "", "PYTHONPATH": str(root), **environment}
        return subprocess.Popen(command, env=here, stdout=subprocess.PIPE, text=True)

    def result(process: subprocess.Popen) -> tuple[list[float], float]:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        losses, total = json.loads(out.splitlines()[-1])
        return losses, total

    pair = [started(MLX_RANK=str(rank), MLX_HOSTFILE=str(tmp_path / "hosts.json")) for rank in range(2)]
    (losses, total), (losses_there, total_there) = [result(process) for process in pair]
    losses_alone, _ = result(started())
    assert losses == losses_there
    assert total == total_there
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-5)
    assert losses[-1] != losses[0]


# PyTorch's losses


@pytest.mark.parity
def test_twenty_steps_have_the_losses_of_torch() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from mlx_gpt.store.convert import to_hub

    config = GPTConfig(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    model = new_model(config)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=211,
            n_positions=32,
            n_embd=32,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    hub = {f"transformer.{name}": torch.tensor(np.array(w)) for name, w in to_hub(flat(model)).items()}
    missing, unexpected = theirs.load_state_dict(hub, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    decayed = [w for w in theirs.parameters() if w.ndim >= 2]
    rest = [w for w in theirs.parameters() if w.ndim < 2]
    their_optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    ours, reference = [], []
    training = TrainConfig(learning_rate=3e-3, batch_size=4)
    step, state = make_train_step(model, make_optimizer(training, 2), training)
    for x, y in zip(*batches(20, config), strict=True):
        loss, _ = step(mx.array(x), mx.array(y))
        mx.eval(loss, state)
        ours.append(loss.item())
        logits = theirs(torch.tensor(x).long()).logits
        their_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 211), torch.tensor(y).long().reshape(-1))
        their_optimizer.zero_grad()
        their_loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        reference.append(their_loss.item())
    np.testing.assert_allclose(ours, reference, atol=1e-4)
    assert abs(reference[-1] - reference[0]) > 1e-2


def flat(model: GPT) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))
