"""Small GPTs with all arguments of ``examine`` that a healthy user would give, and the form of a planted fault."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.tinyworld.stories import generate_stories

from .plain_cache import PlainCache
from .plain_gpt import PlainConfig, PlainGPT
from .plain_sampler import SETTINGS, PlainSampler

Given = dict[str, Any]
EOT = "<|endoftext|>"  # ends a story at size 2
SIZES = (
    PlainConfig(n_positions=16, width=16, layers=1, heads=2),
    PlainConfig(n_positions=48, width=32, layers=2, heads=2, dropout=0.1),
    PlainConfig(n_positions=64, width=48, layers=3, heads=4, tied=False),
)
STEPS, BATCH, LEARNING_RATE = 100, 8, 5e-3


@dataclass(frozen=True)
class Base:
    """A small GPT on a small corpus: lower-case characters, characters, or words (sizes 0, 1, 2).

    ``faults`` are names of PlainGPT's, ``config_changes`` fields of its configuration; ``change_text`` and
    ``change_ids`` are applied to the corpus, and ``draw(base, seed)`` yields the batches. A trained model was trained
    with all of these. ``model`` is a copy that belongs to this object.
    """

    size: int = 0
    seed: int = 0
    trained: bool = False
    library: str = "mlx"
    faults: frozenset[str] = frozenset()
    config_changes: tuple[tuple[str, Any], ...] = ()
    change_text: Callable[[str], str] | None = None
    change_ids: Callable[[np.ndarray], np.ndarray] | None = None
    draw: Callable[[Base, int], Iterator[tuple[np.ndarray, np.ndarray]]] | None = None

    def with_faults(self, *faults: str, **config: Any) -> Base:
        """Return the same model with faults of PlainGPT, or with other fields of its configuration."""
        changes = tuple(sorted({**dict(self.config_changes), **config}.items()))
        return replace(self, faults=self.faults | {*faults}, config_changes=changes)

    @property
    def config(self) -> PlainConfig:
        return replace(SIZES[self.size], **{"vocab_size": len(self.vocabulary), **dict(self.config_changes)})

    @cached_property
    def model(self) -> Any:
        weights, _ = trained(self) if self.trained else (None, [])
        model = self.new_model()
        if weights is not None:
            library(self.library).load(model, weights)
        return model

    def new_model(self) -> Any:
        """Return a model with its initial weights."""
        return library(self.library).new(self.config, self.faults, self.seed)

    def forward(self, ids: Any) -> np.ndarray:
        """Return logits (B, T, V) of ids (B, T), as NumPy."""
        return library(self.library).functions(self.model)["forward"](np.asarray(ids))

    # The corpus: 90 % of a text for training, the rest for validation.

    @property
    def vocabulary(self) -> list[str]:
        return corpus(self.size, self.seed, self.change_text)[0]

    @property
    def train_ids(self) -> np.ndarray:
        ids = corpus(self.size, self.seed, self.change_text)[1]
        ids = ids[: len(ids) * 9 // 10]
        return self.change_ids(ids) if self.change_ids else ids

    @property
    def val_ids(self) -> np.ndarray:
        ids = corpus(self.size, self.seed, self.change_text)[1]
        ids = ids[len(ids) * 9 // 10 :]
        return self.change_ids(ids) if self.change_ids else ids

    def encode(self, text: str) -> list[int]:
        return encoded(text, self.size, self.vocabulary)

    def decode(self, ids: Any) -> str:
        return "".join(map(self.vocabulary.__getitem__, np.asarray(ids, int).tolist()))

    def batches(self, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what training is fed: x and y, (B, T) each, without end."""
        return self.draw(self, seed) if self.draw else self.windows(seed=seed)

    def windows(
        self, B: int = BATCH, shift: int = 1, seed: int = 0, ids: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield random windows x of the training ids or others, and y, which begins ``shift`` later."""
        rng, ids, T = np.random.default_rng(seed), self.train_ids if ids is None else ids, self.config.n_positions
        while True:
            rows = rng.integers(2, len(ids) - T - 3, B)[:, None] + np.arange(T)
            yield ids[rows], ids[rows + shift]

    # The functions of a healthy user.

    def sampler(self, fault: str = "", forward: Any = None) -> PlainSampler:
        config = self.config
        return PlainSampler(forward or self.forward, config.vocab_size, config.n_positions, fault, self.seed)

    def sample_many(self, prompts: list[list[int]], n: int, **settings: Any) -> list[list[int]]:
        sampler = self.sampler()
        return [sampler(prompt, n, **settings) for prompt in prompts]

    def cached(self, ids: list[int], n_prompt: int) -> np.ndarray:
        """Return logits as a cache gives them: of the prompt at once, then of each longer text its last."""
        if not self.faults:
            return PlainCache(library(self.library).functions(self.model)["parameters"](), self.config)(ids, n_prompt)
        later = [self.forward([ids[: t + 1]])[0, -1:] for t in range(n_prompt, len(ids))]
        return np.concatenate([self.forward([ids[:n_prompt]])[0], *later])

    def reload(self) -> Callable[[np.ndarray], np.ndarray]:
        """Save the parameters and load them into a new model; return its forward pass."""
        its, file = library(self.library), io.BytesIO()
        np.savez(file, **its.functions(self.model)["parameters"]())
        model = self.new_model()
        its.load(model, dict(np.load(io.BytesIO(file.getvalue()))))
        return its.functions(model)["forward"]

    def mean_loss(self, ids: np.ndarray, most: int = 1000) -> float:
        """Return the mean loss over consecutive windows of ids."""
        T = self.config.n_positions
        rows = np.arange(min((len(ids) - 1) // T, most))[:, None] * T + np.arange(T)
        return float(library(self.library).functions(self.model)["loss"](ids[rows], ids[rows + 1]))

    def arguments(self, **changes: Any) -> Given:
        """Return all arguments of ``examine`` but ``minutes``, some changed; None leaves one out."""
        given = {
            **library(self.library).functions(self.model),
            "vocab_size": self.config.vocab_size,
            "n_positions": self.config.n_positions,
            "learning_rate": LEARNING_RATE,
            "sample": self.sampler(),
            "sample_many": self.sample_many,
            "sample_settings": {*SETTINGS},
            "cached": self.cached,
            "reload": self.reload,
            "encode": self.encode,
            "decode": self.decode,
            "end_of_text": self.encode(EOT)[0] if self.size == 2 else None,
            "batches": self.batches,
            "train_ids": self.train_ids,
            "val_ids": self.val_ids,
            "train_text": self.decode(self.train_ids) if "train_text" not in changes else None,
            "metrics": [dict(row) for row in trained(self)[1]] if self.trained else None,
            "val_loss": self.mean_loss(self.val_ids) if "val_loss" not in changes else None,
            **changes,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Planted:
    """A fault: ``plant(base)`` returns the arguments of ``examine`` with it, and ``code`` is to be named alone."""

    code: str
    plant: Callable[[Base], Given]
    states: tuple[bool, ...] = (False, True)  # untrained, trained: where the fault means something
    sizes: tuple[int, ...] = (0, 1, 2)
    libraries: tuple[str, ...] = ("mlx",)


def tokens_of(text: str, size: int) -> list[str]:
    return list(text) if size < 2 else re.findall(r"<\|endoftext\|>|\w+|\W", text)


def encoded(text: str, size: int, vocabulary: list[str]) -> list[int]:
    """Return the ids of a text; a word that is not in the vocabulary is split into its characters."""
    to_id = {token: i for i, token in enumerate(vocabulary)}
    tokens = tokens_of(text, size)
    return [to_id[part] for token in tokens for part in ([token] if token in to_id else token)]


@cache
def corpus(size: int, seed: int, change: Callable[[str], str] | None) -> tuple[list[str], np.ndarray]:
    """Return the vocabulary and the ids of a text of 200 to 400 stories."""
    stories = generate_stories((200, 200, 400)[size], seed=seed)
    text = (EOT if size == 2 else "\n").join([*stories, ""])
    text = re.sub(r"[^a-z ,.\n]", "", text.lower()) if size == 0 else text
    text = change(text) if change else text
    vocabulary = sorted({*text, *tokens_of(text, size)})
    return vocabulary, np.array(encoded(text, size, vocabulary), np.int32)


@cache
def trained(base: Base) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Train a model for seconds; return its weights and the rows of its metrics."""
    its, model = library(base.library), base.new_model()
    functions = its.functions(model)
    step, batches, metrics = functions["new_step"](), base.batches(seed=base.seed), []
    held_out = replace(base, trained=False)
    held_out.__dict__["model"] = model
    for i in range(STEPS):
        loss = step(*next(batches))
        if i % 20 == 0 or i == STEPS - 1:
            row = {"step": i, "loss": loss, "val_loss": held_out.mean_loss(base.val_ids, 16)}
            metrics.append({**row, "learning_rate": LEARNING_RATE, "grad_norm": 1.0})
    return functions["parameters"](), metrics


# MLX ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A framework: ``new(config, faults, seed)``, ``load(model, weights)``, ``functions(model)`` as in examine."""

    new: Callable[..., Any]
    load: Callable[..., None]
    functions: Callable[..., Given]


def library(name: str) -> Library:
    if name == "torch":
        from .torch_gpt import TORCH

        return TORCH
    return Library(PlainGPT, load_into, functions_of)


def load_into(model: nn.Module, values: dict[str, Any]) -> None:
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in values.items()]))
    mx.eval(model.parameters())


def functions_of(model: nn.Module) -> Given:
    """Return forward passes, loss, gradient, parameters and steps of a model, as ``examine`` wants them."""

    def run_in(training: bool, ids: Any) -> mx.array:
        if model.training != training:  # setting it takes as long as a small forward pass
            model.train(training)
        logits = model(mx.array(ids))
        mx.eval(logits)
        if training:
            model.train(False)
        return logits

    def mean_loss(x: mx.array, y: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(x), mx.maximum(y, 0))
        return (losses * (y >= 0)).sum() / (y >= 0).sum()

    value_and_grad = nn.value_and_grad(model, mean_loss)

    def gradient(x: Any, y: Any) -> dict[str, np.ndarray]:
        grads = value_and_grad(mx.array(x), mx.array(y))[1]
        return {name: np.array(value) for name, value in tree_flatten(grads)}

    def parameters() -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in tree_flatten(model.parameters())}

    def new_step() -> Callable[[Any, Any], float]:
        optimizer = optim.AdamW(LEARNING_RATE, weight_decay=0.0, bias_correction=True)

        def step(x: Any, y: Any) -> float:
            model.train(True)
            loss, grads = value_and_grad(mx.array(x), mx.array(y))
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
            model.train(False)
            return float(loss.item())

        return step

    return {
        "forward": lambda ids: np.array(run_in(False, ids).astype(mx.float32)),
        "forward_training": lambda ids: np.array(run_in(True, ids).astype(mx.float32)),
        "loss": lambda x, y: mean_loss(mx.array(x), mx.array(y)).item(),
        "gradient": gradient,
        "parameters": parameters,
        "load_parameters": lambda values: load_into(model, values),
        "new_step": new_step,
        "step": new_step(),
    }
