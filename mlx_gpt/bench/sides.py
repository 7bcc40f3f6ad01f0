"""The implementations that are compared, each from the same model folder: ours, mlx-lm's, PyTorch's, transformers'.

``torch`` trains transformers' GPT-2 in PyTorch, ``transformers`` generates with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.store.folder import load
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

Train = Callable[[int], None]  # trains so many steps and waits for them
Speak = Callable[[int], tuple[float, float]]  # seconds until the first of n tokens, and from it to the last
Array = Any  # of NumPy: ids (B, T + 1)
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0


class Side(NamedTuple):
    """An implementation: how it trains on ids, how it continues a prompt, and the packages it needs."""

    train: Callable[[Path, Array], Train] | None
    speak: Callable[[Path, list[int]], Speak] | None
    needs: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        return all(find_spec(name) for name in self.needs)


def our_training(folder: Path, ids: Array) -> Train:
    model, _ = load(folder)
    config = TrainConfig(learning_rate=RATE, batch_size=len(ids), grad_clip=CLIP)
    step, state = make_train_step(model, make_optimizer(config, model.config.n_head), config)
    return in_a_loop(step, state, ids)


def mlx_lm_training(folder: Path, ids: Array) -> Train:
    step, state = mlx_lm_step(mlx_lm_model(folder))
    return in_a_loop(step, state, ids)


def mlx_lm_step(model: nn.Module) -> tuple[Callable[[mx.array, mx.array], Any], Any]:
    """Return a step as in MLX's documentation, and its state."""
    optimizer = optim.AdamW(RATE, betas=list(BETAS), weight_decay=DECAY, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)
    loss_and_gradient = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y).mean())

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        loss, gradient = loss_and_gradient(x, y)
        gradient, norm = optim.clip_grad_norm(gradient, CLIP)
        optimizer.update(model, gradient)
        return loss, norm

    return step, state


def in_a_loop(step: Callable[[mx.array, mx.array], Any], state: Any, ids: Array) -> Train:
    """Return the loop of ``mlx-gpt train``: a step is started before the one before it is awaited."""
    x, y = mx.array(ids[:, :-1]), mx.array(ids[:, 1:])

    def run(n: int) -> None:
        previous = None
        for _ in range(n):
            results = step(x, y)
            mx.async_eval(results, state)
            mx.eval(previous)
            previous = results
        mx.eval(previous, state)

    return run


def torch_training(folder: Path, ids: Array) -> Train:
    """Train with ``torch.compile``, or without where it fails, as without a C++ compiler."""
    import torch

    model = transformers_model(folder).train()
    x = torch.from_numpy(ids.astype(np.int64)).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY)

    def loss_of(x: Any) -> Any:
        logits = model(x[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    def step(loss_of: Callable[[Any], Any]) -> Any:
        loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss

    forms = [torch.compile(loss_of), loss_of]

    def run(n: int) -> None:
        for _ in range(n):
            try:
                loss = step(forms[0])
            except Exception:  # the compiler's errors have no common class
                if len(forms) == 1:
                    raise
                del forms[0]
                loss = step(forms[0])
        loss.item()  # waits for the device

    return run


def our_speech(folder: Path, prompt: list[int]) -> Speak:
    model, tokenizer = load(folder)

    def run(n: int) -> tuple[float, float]:
        settings = GenerationSettings(temperature=0, max_tokens=n, ignore_eos=True)
        generation = Generation(model, tokenizer, [prompt], settings)
        for _ in generation:
            pass
        stats = generation.stats
        return stats.prompt_seconds, stats.tokens / stats.speed

    return run


def mlx_lm_speech(folder: Path, prompt: list[int]) -> Speak:
    from mlx_lm.generate import generate_step

    model = mlx_lm_model(folder)

    def run(n: int) -> tuple[float, float]:
        times = [time.perf_counter()]
        for _ in generate_step(mx.array(prompt), model, max_tokens=n):
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    return run


def transformers_speech(folder: Path, prompt: list[int]) -> Speak:
    import torch

    model = transformers_model(folder).eval()
    ids = torch.tensor([prompt], device=model.device)

    def seconds(n: int) -> float:
        started = time.perf_counter()
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()
        return time.perf_counter() - started

    def run(n: int) -> tuple[float, float]:
        first = seconds(1)
        return first, max(seconds(n) - first, 1e-9)

    return run


def mlx_lm_model(folder: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    return load_model(folder)[0]


def transformers_model(folder: Path) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    device = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    return model.to(device)


OURS = "mlx_gpt"
SIDES = {
    OURS: Side(our_training, our_speech),
    "mlx-lm": Side(mlx_lm_training, mlx_lm_speech, ("mlx_lm",)),
    "torch": Side(torch_training, None, ("torch", "transformers")),
    "transformers": Side(None, transformers_speech, ("torch", "transformers")),
}
