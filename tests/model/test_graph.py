"""MLX's graphs of the training step, prefill and decoding: nothing that Metal lacks, and few kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from helpers.as_metal import answer_as_metal, fused_inference

from mlx_gpt.bench.graph import BUFFERS, FIXED_BUFFERS, kernels, launches, missing_on_metal, operations
from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.decoder import place_of
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.history import History
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.cache import KVCache
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

CONFIG = GPTConfig(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.1)
BUDGET = {"prefill": 54, "decode": 41, "adamw": 304, "muon": 399}  # kernels of CONFIG on Metal
PROMPT = [[65] * 20]


@pytest.fixture(autouse=True)
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("metal", "default_device", "device_info", "set_wired_limit"):
        monkeypatch.setattr(mx, name, getattr(mx, name))  # restored afterwards
    answer_as_metal()
    mx.random.seed(0)


@pytest.fixture
def exportable(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX does not export ``mx.checkpoint``, which adds no operation of its own."""
    monkeypatch.setattr(mx, "checkpoint", lambda function: function)


def new_model() -> GPT:
    model = GPT(CONFIG)
    mx.eval(model.parameters())
    return model


def prefill() -> mx.array:
    """Return the logits after a prompt, not computed."""
    model = new_model().eval()
    return model(mx.array(PROMPT), model.make_cache())


def decode(**settings: Any) -> tuple[mx.array, Any]:
    """Return the id after a token and the cache, not computed."""
    run = Generation(new_model(), Tokenizer.bytes(), PROMPT, GenerationSettings(**settings))
    mx.eval(run.read_prompt(), run.decoder.state())
    with fused_inference():
        ids, _ = run._next(History(run.prompts, run.limits), mx.array([66]))
        return ids, run.decoder.state()


def step(optimizer: str) -> tuple[Any, Any]:
    """Return loss, gradient norm and the state after a training step, not computed."""
    training = TrainConfig(optimizer=optimizer, batch_size=2)
    run, state = make_train_step(new_model(), make_optimizer(training, CONFIG.n_head), training)
    mx.eval(mx.random.state)
    ids = mx.zeros((2, 64), mx.int32)
    return run(ids, ids), state


def graphs() -> dict[str, Any]:
    with fused_inference():
        first = prefill()
    return {"prefill": first, "decode": decode(temperature=0), "adamw": step("adamw"), "muon": step("muon")}


def test_the_kernels_are_within_their_budgets() -> None:
    counted = {name: launches(outputs) for name, outputs in graphs().items()}
    mx.random.seed(0)  # the state is of a step that was not computed
    assert {name: (n, BUDGET[name]) for name, n in counted.items() if n > BUDGET[name]} == {}


def test_no_compiled_kernel_has_more_buffers_than_metal_takes() -> None:
    everything = {**graphs(), "sampled": decode(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01)}
    mx.random.seed(0)
    most = max(
        kernel.arrays for outputs in everything.values() for kernel in kernels(outputs) if "Compiled" in kernel.name
    )
    assert most + FIXED_BUFFERS <= BUFFERS


@pytest.mark.usefixtures("exportable")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_has_no_operation_that_metal_lacks(optimizer: str) -> None:
    training = TrainConfig(optimizer=optimizer, batch_size=2)
    run, state = make_train_step(new_model(), make_optimizer(training, CONFIG.n_head), training)
    ids = mx.zeros((2, 64), mx.int32)
    found = operations(lambda x, y: (run(x, y), state), ids, ids)
    mx.random.seed(0)
    assert "Matmul" in {name for name, _ in found}
    assert missing_on_metal(found) == []


@pytest.mark.usefixtures("exportable")
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}])
def test_prefill_and_decoding_have_no_operation_that_metal_lacks(settings: dict[str, Any]) -> None:
    run = Generation(new_model(), Tokenizer.bytes(), PROMPT, GenerationSettings(**settings))
    model, history = run.decoder.model, History(run.prompts, run.limits)
    found = operations(lambda ids: run._choose(model(ids, model.make_cache())[:, -1], history), run.prompts)
    mx.eval(run.read_prompt(), run.decoder.state())
    found += operations(lambda ids: (run._next(history, ids), run.decoder.state()), mx.array([66]))
    assert "Matmul" in {name for name, _ in found}
    assert missing_on_metal(found) == []


def test_what_metal_lacks_is_found() -> None:
    x = mx.ones((2, 2))
    assert missing_on_metal(operations(lambda x: mx.linalg.inv(x, stream=mx.cpu), x)) == ["Inverse"]
    wide = mx.zeros((4,), mx.int64)
    assert missing_on_metal(operations(lambda x: x.at[mx.array([1])].add(mx.array(1)), wide)) == ["Scatter"]


def test_slots_written_on_a_gpu_are_those_written_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = mx.random.normal((2, 2, 3, 1, 4))
    written = []
    for device, shape in ((mx.gpu, (8, 1)), (mx.cpu, (1,))):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        cache = KVCache(n_positions=8)
        cache.keys = cache.values = (mx.ones((2, 3, 8, 4)),)
        cache.offset, cache.place = mx.array(5), place_of(mx.array(5), 1, 8)
        assert cache.place.shape == shape
        cache.extend(k, v)
        written.append(mx.concatenate([*cache.keys, *cache.values]))
    assert mx.array_equal(*written)
