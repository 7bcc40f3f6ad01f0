"""PlainGPT in PyTorch: the same parameters, the same faults by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .plain_gpt import PlainConfig
from .planted import LEARNING_RATE, Given, Library


class TorchAttention(nn.Module):
    def __init__(self, config: PlainConfig, faults: Collection[str]):
        super().__init__()
        self.config, self.faults = config, faults
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (B, T, C), H = x.shape, self.config.heads
        q, k, v = self.qkv(x).split(C, dim=-1)
        if "attends-over-heads" in self.faults:
            q, k, v = (a.reshape(B, T, H, C // H) for a in (q, k, v))
            return self.out((torch.softmax(q @ k.mT, dim=-1) @ v).reshape(B, T, C))
        if "attends-over-batch" in self.faults:
            q, k, v = (a.reshape(B, T, H, C // H).permute(1, 2, 0, 3) for a in (q, k, v))
            return self.out((self.pattern(q @ k.mT, B) @ v).permute(2, 0, 1, 3).reshape(B, T, C))
        if "heads-mixed-up" in self.faults:
            q, k, v = (a.reshape(B, H, T, C // H) for a in (q, k, v))
        else:
            q, k, v = (a.reshape(B, T, H, C // H).transpose(1, 2) for a in (q, k, v))
        z = self.dropout(self.pattern(q @ k.mT / (C // H) ** 0.5, T)) @ v
        z = z if "heads-mixed-up" in self.faults else z.transpose(1, 2)
        return self.out(z.reshape(B, T, C))

    def pattern(self, scores: torch.Tensor, T: int) -> torch.Tensor:
        query, key = torch.arange(T)[:, None], torch.arange(T)[None]
        is_past = query >= key
        if "scores-over-length" in self.faults:
            scores = scores * 8 / T
        if "uniform" in self.faults:
            scores = scores * 0
        if "zero-mask" in self.faults:
            return torch.softmax(scores * is_past, dim=-1)
        if "mask-after-softmax" in self.faults:
            return torch.softmax(scores, dim=-1) * is_past
        if "one-head-unmasked" in self.faults:
            is_past = is_past | (torch.arange(scores.shape[1]) == 0)[:, None, None]
        if "chunked" in self.faults:
            is_past = is_past & (query // 8 == key // 8)
        if "no-mask" in self.faults or ("no-mask-in-training" in self.faults and self.training):
            is_past = torch.ones_like(is_past)
        if "inverted-mask" in self.faults:
            is_past = query <= key
        if "mask-shifted" in self.faults:
            is_past = query + 1 >= key
        if "cut" in self.faults:
            is_past = is_past & (key > query - 2)
        if "only-itself" in self.faults:
            is_past = query == key
        weak = {"weak-mask": -8.0, "mask-of-minus-1": -1.0}
        later = next((value for fault, value in weak.items() if fault in self.faults), -torch.inf)
        masked = torch.where(is_past, scores, later)
        if "softmax-over-queries" in self.faults:
            return torch.softmax(masked, dim=-2)
        if "softmax-over-batch" in self.faults:
            return torch.softmax(torch.where(is_past, scores, -1e9), dim=0) * is_past
        return torch.softmax(masked, dim=-1)


class TorchBlock(nn.Module):
    def __init__(self, config: PlainConfig, faults: Collection[str]):
        super().__init__()
        self.faults = faults
        self.ln_1, self.ln_2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = TorchAttention(config, faults)
        self.up, self.down = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "residual-after-norm" in self.faults:
            x = self.ln_1(x)
            x = x + self.dropout(self.attention(x))
            x = self.ln_2(x)
            return x + self.dropout(self.down(F.gelu(self.up(x))))
        x = x + self.dropout(self.attention(self.ln_1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.ln_2(x)))))


class TorchGPT(nn.Module):
    """Ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: PlainConfig, faults: Collection[str] = (), seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.faults, self.calls = config, {*faults}, 0
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.n_positions, config.width)
        self.blocks = nn.ModuleList(TorchBlock(config, self.faults) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.seen = torch.zeros(config.width)
        self.eval()

    def train(self, mode: bool = True) -> TorchGPT:
        return super().train(True if "dropout-left-on" in self.faults else mode)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        if "token-blind" in self.faults:
            x = x * 0
        if "position-blind" not in self.faults:
            x = x + self.wpe(self.positions(*ids.shape))
        if "noise" in self.faults:
            x = x + 0.02 * torch.randn_like(x)
        if "batch-norm" in self.faults:
            x = x - 0.5 * x.mean(dim=0, keepdim=True)
        if "remembers" in self.faults:
            x = x + self.seen
            self.seen = 0.5 * x[0, -1].detach()
        for block in self.blocks:
            x = block(x)
        if "mean-over-time" in self.faults:
            x = x - x.mean(dim=1, keepdim=True)
        x = self.ln_f(x)
        logits = x @ self.wte.weight.T if self.config.tied else self.head(x)
        if "nan" in self.faults:
            logits = torch.where(torch.arange(ids.shape[1])[:, None] == 3, torch.nan, logits)
        if "last-row-scaled" in self.faults and len(logits) > 1:
            logits = torch.cat([logits[:-1], 1.1 * logits[-1:]])
        return torch.softmax(logits, dim=-1) if "returns-probabilities" in self.faults else logits

    def positions(self, B: int, T: int) -> torch.Tensor:
        positions, P = torch.arange(T), self.config.n_positions
        if "positions-from-the-end" in self.faults:
            return positions.flip(0)
        if "positions-scaled" in self.faults:
            return positions * (P - 1) // max(T - 1, 1)
        if "one-position" in self.faults:
            return positions * 0
        if "row-alone" in self.faults and B == 1:
            return (positions + 1).clamp(max=P - 1)
        if "positions-count-on" in self.faults:
            self.calls += 1
            return (positions + self.calls) % P
        return positions


def load_into(model: nn.Module, values: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(np.asarray(values[name])))


def functions_of(model: nn.Module) -> Given:
    """Return forward passes, loss, gradient, parameters and steps of a model, as ``examine`` wants them."""

    def run_in(training: bool, ids: Any) -> np.ndarray:
        if model.training != training:
            model.train(training)
        with torch.no_grad():
            logits = model(torch.as_tensor(np.asarray(ids)).long())
        if training:
            model.train(False)
        return logits.numpy()

    def mean_loss(x: Any, y: Any) -> torch.Tensor:
        logits = model(torch.as_tensor(np.asarray(x)).long())
        targets = torch.as_tensor(np.asarray(y)).long()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=-100), ignore_index=-100)

    def gradient(x: Any, y: Any) -> dict[str, np.ndarray]:
        names, values = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(mean_loss(x, y), values, allow_unused=True)
        pairs = zip(names, values, grads, strict=True)
        return {name: (torch.zeros_like(p) if grad is None else grad).numpy() for name, p, grad in pairs}

    def new_step() -> Callable[[Any, Any], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

        def step(x: Any, y: Any) -> float:
            model.train(True)
            loss = mean_loss(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.train(False)
            return loss.item()

        return step

    def loss(x: Any, y: Any) -> float:
        with torch.no_grad():
            return mean_loss(x, y).item()

    return {
        "forward": lambda ids: run_in(False, ids),
        "forward_training": lambda ids: run_in(True, ids),
        "loss": loss,
        "gradient": gradient,
        "parameters": lambda: {name: p.detach().numpy().copy() for name, p in model.named_parameters()},
        "load_parameters": lambda values: load_into(model, values),
        "new_step": new_step,
        "step": new_step(),
    }


TORCH = Library(TorchGPT, load_into, functions_of)
