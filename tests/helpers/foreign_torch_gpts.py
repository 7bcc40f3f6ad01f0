"""GPTs as different people write them in PyTorch, each healthy or with a mistake that people ask about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from .foreign_training import IDS, Given, P, V, batches


def tensor(ids: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids), dtype=torch.long)


# nanoGPT's style: one matrix for q, k, v; returns (logits, loss) ------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, C: int, n_head: int, mistake: str):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.n_head, self.mistake = n_head, mistake
        self.register_buffer("bias", torch.tril(torch.ones(P, P)).view(1, 1, P, P))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        if self.mistake == "view without transpose":
            q, k, v = (a.reshape(B, H, T, D) for a in (q, k, v))
        elif self.mistake != "attends over the heads":
            q, k, v = (a.view(B, T, H, D).transpose(1, 2) for a in (q, k, v))
        else:
            q, k, v = (a.view(B, T, H, D) for a in (q, k, v))
        if self.mistake == "masked_fill not assigned":
            att = q @ k.transpose(-2, -1) / D**0.5
            att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.mistake != "is_causal forgotten")
        if self.mistake in ("view without transpose", "attends over the heads"):
            return self.c_proj(y.reshape(B, T, C))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, C: int, n_head: int, mistake: str):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), Attention(C, n_head, mistake)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(0.1))
        self.mistake = mistake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mistake == "adds to the normed":
            x = self.ln_1(x)
            x = x + self.attn(x)
            x = self.ln_2(x)
            return x + self.mlp(x)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoStyle(nn.Module):
    def __init__(self, mistake: str = "", C: int = 32, n_head: int = 4, n_layer: int = 1):
        super().__init__()
        self.config = {"vocab_size": V, "block_size": P}
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(P, C)
        blocks = [Block(C, n_head, mistake) for _ in range(n_layer)]
        self.h = blocks if mistake == "blocks in a plain list" else nn.ModuleList(blocks)
        self.ln_f, self.lm_head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.mistake = mistake
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=1.0 if mistake == "std 1" else 0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        B, T = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(B if self.mistake == "positions of the batch" else T))
        if self.mistake == "F.dropout":  # without training=self.training it is always on
            x = F.dropout(x, 0.1)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, V), targets.reshape(-1))
        return logits, loss


def nano(mistake: str = "") -> Given:
    torch.manual_seed(0)
    model = NanoStyle(mistake)
    lr = 1e-3

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        trained = model.lm_head.parameters() if mistake == "optimizer of the head alone" else model.parameters()
        optimizer = torch.optim.AdamW(trained, lr=lr)

        def step(x: np.ndarray, y: np.ndarray) -> float:
            model.train()
            _, loss = model(tensor(x), tensor(y))
            if mistake == "detached":
                loss = loss.detach().requires_grad_()
            if mistake != "zero_grad forgotten":
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.eval()
            return loss.item()

        return step

    @torch.no_grad()
    def generate(ids: list[int], n: int, temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
        model.eval()
        idx = tensor([ids])
        for _ in range(n):
            logits = model(idx[:, -P:])[0][:, -1] / max(temperature, 1e-6)
            if top_p < 1:
                values, order = logits.sort(descending=True)
                probs = values.softmax(-1)
                out = probs.cumsum(-1) > top_p if mistake == "top-p not shifted" else probs.cumsum(-1) - probs >= top_p
                logits = logits.scatter(1, order, values.masked_fill(out, float("-inf")))
            probs = F.softmax(logits, dim=-1)
            new = torch.distributions.Categorical(logits=probs).sample()[:, None]
            idx = torch.cat([idx, new if mistake == "Categorical of probs" else torch.multinomial(probs, 1)], dim=1)
        return idx[0].tolist()

    def reload() -> Callable[[np.ndarray], torch.Tensor]:
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        fresh = NanoStyle(mistake)
        if mistake == "head made anew":
            fresh.lm_head = nn.Linear(32, V, bias=False)
            del saved["lm_head.weight"]
        fresh.load_state_dict(saved, strict=False)
        fresh.eval()
        return lambda ids: fresh(tensor(ids))[0].detach()

    given = {"forward": model.eval(), "new_step": new_step, "step": new_step(), "learning_rate": lr, "reload": reload}
    given |= {"loss": lambda x, y: model(tensor(x), tensor(y))[1].item(), "batches": batches, "train_ids": IDS}
    return {**given, "sample": generate, "sample_settings": ["temperature", "top_p"], "vocab_size": V, "n_positions": P}


# nn.TransformerEncoder, with nn.MultiheadAttention inside -------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, mistake: str, d_model: int = 32):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model, 4, 64, dropout=0.1, batch_first=mistake != "batch_first forgotten", norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.emb, self.head, self.mistake = nn.Embedding(V, d_model), nn.Linear(d_model, V), mistake
        nn.init.uniform_(self.emb.weight, -0.1, 0.1)
        place, rate = torch.arange(P)[:, None], torch.exp(-torch.arange(0, d_model, 2) * 9.2 / d_model)
        self.register_buffer("pe", torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1))

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        T = src.shape[0 if self.mistake == "batch_first forgotten" else 1]
        mask = torch.triu(torch.ones(T, T), diagonal=1).bool()
        if self.mistake == "mask inverted":  # True forbids in nn.MultiheadAttention
            mask = ~mask
        x = self.emb(src) * 32**0.5
        if self.mistake != "no positions":
            x = x + self.pe[: src.shape[1]]
        return self.head(self.encoder(x, mask=None if self.mistake == "no mask" else mask))


def encoder(mistake: str = "") -> Given:
    torch.manual_seed(0)
    return {"forward": Encoder(mistake).eval(), "vocab_size": V, "n_positions": P}


PEOPLE: dict[str, Callable[[str], Given]] = {"nano": nano, "encoder": encoder}
MISTAKES: dict[tuple[str, str], str] = {
    ("nano", "view without transpose"): "heads-mixed-up",
    ("nano", "attends over the heads"): "heads-mixed-up|past-ignored",
    ("nano", "masked_fill not assigned"): "future-leak",
    ("nano", "is_causal forgotten"): "future-leak",
    ("nano", "adds to the normed"): "residual-after-norm",
    ("nano", "blocks in a plain list"): "parameters-frozen|not-deterministic",
    ("nano", "std 1"): "initial-loss-off",
    ("nano", "positions of the batch"): "raises|position-blind",
    ("nano", "F.dropout"): "not-deterministic",
    ("nano", "optimizer of the head alone"): "parameters-frozen",
    ("nano", "detached"): "step-without-effect",
    ("nano", "zero_grad forgotten"): "accumulation-differs",
    ("nano", "top-p not shifted"): "setting-wrong",
    ("nano", "Categorical of probs"): "probabilities-as-logits",
    ("nano", "head made anew"): "reload-differs|head-not-tied",
    ("encoder", "batch_first forgotten"): "batch-leak",
    ("encoder", "mask inverted"): "non-finite|future-leak",
    ("encoder", "no mask"): "future-leak",
    ("encoder", "no positions"): "position-blind",
}
