"""Planted faults of a GPT made of PyTorch's own layers, as tutorials have it; the module alone is examined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .planted import Base, Given, Planted

CODES = {
    "no mask": "future-leak",
    "mask of −1": "future-leak-in-training",  # in evaluation PyTorch masks wherever it is not 0
    "mask as 1 and 0": "non-finite",
    "mask without the diagonal": "future-leak",
    "norm over time": "future-leak",
    "convolution padded on both sides": "future-leak",
    "mask in evaluation only": "future-leak-in-training",
    "batch and time exchanged": "batch-leak",
    "batch normalisation by the batch": "batch-leak",
    "no positions": "position-blind",
    "window of eight": "context-too-short",
    "positions of the end": "length-dependent",
    "dropout by function": "not-deterministic",
    "keeps the last hidden state": "depends-on-earlier-calls",
    "logits of the last token": "wrong-shape",
}


def tutorial_gpt(base: Base, fault: str = "") -> Any:
    import torch
    from torch import nn

    V, P, C = base.config.vocab_size, base.config.n_positions, 32
    torch.manual_seed(base.seed)

    class TutorialGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(V, C)
            layer = nn.TransformerEncoderLayer(
                C, 4, 64, 0.1, batch_first="batch and time" not in fault, norm_first=base.size != 0
            )
            norm = nn.LayerNorm(C) if base.size else None  # of the stream, which a pre-norm leaves as it is
            self.blocks = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
            self.head = nn.Linear(C, V)
            if fault == "convolution padded on both sides":
                self.mixing = nn.Conv1d(C, C, 3, padding=1)
            self.kept = torch.zeros(C)
            angles = torch.arange(P)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, C, 2) / C)
            self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

        def mask(self, T: int) -> torch.Tensor:
            future = torch.ones(T, T).triu(1).bool()
            if fault == "no mask" or (fault == "mask in evaluation only" and self.training):
                return torch.zeros(T, T)
            if fault == "window of eight":
                future |= torch.ones(T, T).tril(-4).bool()  # four tokens in each of two layers
            if fault == "mask without the diagonal":
                future = torch.ones(T, T).triu(2).bool()
            if fault == "mask as 1 and 0":  # added to the scores
                return (~future).float()
            return -future.float() if fault == "mask of −1" else future

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            B, T = ids.shape
            x = self.tokens(ids) * math.sqrt(C)
            if fault != "no positions":
                x = x + (self.pe[-T:] if fault == "positions of the end" else self.pe[:T])
            if fault == "convolution padded on both sides":
                x = x + self.mixing(x.mT).mT
            if fault == "norm over time":
                x = (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True, correction=0) + 1e-3)
            if fault == "batch normalisation by the batch":
                x = nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x) if B > 1 else x
            if fault == "keeps the last hidden state":
                x, self.kept = x + self.kept, x[-1, -1].detach()
            if fault == "dropout by function":
                x = nn.functional.dropout(x, 0.1)
            x = self.blocks(x, mask=self.mask(B if "batch and time" in fault else T))
            return self.head(x[:, -1:] if fault == "logits of the last token" else x)

    return TutorialGPT().eval()


def planted(fault: str) -> Callable[[Base], Given]:
    return lambda base: {
        "forward": tutorial_gpt(base, fault),
        "vocab_size": base.config.vocab_size,
        "n_positions": base.config.n_positions,
    }


FAULTS = {fault: Planted(code, planted(fault), states=(False,), libraries=("torch",)) for fault, code in CODES.items()}
