"""The optimizers: AdamW as GPT-2's successors use it, and Muon. A new one is an entry in ``OPTIMIZERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from mlx_gpt.train.muon import StackedMuon


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizers. ``TrainConfig`` inherits and validates them."""

    optimizer: str = "adamw"  # adamw, or muon for the matrices of the blocks
    learning_rate: float = 1e-3  # peak, of AdamW
    muon_learning_rate: float = 0.02  # peak, of the matrices that Muon updates
    muon_embeddings: bool = False  # Muon updates the token embedding too
    muon_iterations: int = 5  # Newton-Schulz iterations of Muon; fewer are faster and less exact
    weight_decay: float = 0.1  # decoupled weight decay of AdamW, on matrices only
    beta1: float = 0.9  # decay of AdamW's mean of gradients
    beta2: float = 0.95  # decay of AdamW's mean of squared gradients


def make_optimizer(config: OptimizerConfig, n_head: int) -> optim.Optimizer:
    """Return the optimizer that ``config`` names, for a model with ``n_head`` heads."""
    return OPTIMIZERS[config.optimizer].make(config, n_head)


def adamw(config: OptimizerConfig, n_head: int) -> optim.Optimizer:
    """Return AdamW with bias correction and decoupled weight decay on matrices (Loshchilov & Hutter 2019).

    Biases and norms have no decay.
    """
    return optim.MultiOptimizer(_adamw_groups(config), [_is_matrix])


def muon(config: OptimizerConfig, n_head: int) -> optim.Optimizer:
    """Return Muon for the matrices of the blocks and AdamW for all other weights (Jordan et al. 2024).

    Query, key and value of each head in ``attn.c_attn`` are separate matrices. ``muon_embeddings`` adds the token
    embedding: AdamW updates the rows of a small vocabulary alike, which slows down learning to tell one name from
    another. With a large vocabulary that is slow.
    """
    prefixes = ("h.", "wte") if config.muon_embeddings else ("h.",)
    settings: dict[str, Any] = {"momentum": 0.95, "weight_decay": 0.0, "ns_steps": config.muon_iterations}
    parts = [StackedMuon(config.muon_learning_rate, n, **settings) for n in (3 * n_head, 1)]
    filters = [
        lambda path, weight: path.endswith("attn.c_attn.weight"),
        lambda path, weight: _is_matrix(path, weight) and path.startswith(prefixes),
        _is_matrix,
    ]
    return optim.MultiOptimizer([*parts, *_adamw_groups(config)], filters)


class OptimizerEntry(NamedTuple):
    """An optimizer that ``--optimizer`` can name."""

    make: Callable[[OptimizerConfig, int], optim.Optimizer]
    max_learning_rate: float  # the highest that auto/defaults.py picks, tuned on small models


OPTIMIZERS = {"adamw": OptimizerEntry(adamw, 0.004), "muon": OptimizerEntry(muon, 0.01)}


def _adamw_groups(config: OptimizerConfig) -> list[optim.Optimizer]:
    """AdamW with weight decay, then without."""
    return [
        optim.AdamW(config.learning_rate, [config.beta1, config.beta2], 1e-8, decay, bias_correction=True)
        for decay in (config.weight_decay, 0.0)
    ]


def _is_matrix(path: str, weight: mx.array) -> bool:
    return weight.ndim >= 2
