"""Healthy models of many makes, as arguments of ``examine``: none has a fault."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_gpt import GPT, GPTConfig

from .design_gpt import Design, DesignGPT
from .plain_cache import PlainCache
from .plain_gpt import PlainConfig, PlainGPT
from .plain_sampler import PlainSampler, small_forward, softmax
from .planted import Base, Given

Healthy = dict[str, Callable[[], Given]]
TINYWORLD = Path(__file__).parents[2] / "weights" / "tinyworld"


def briefly_trained(model: nn.Module, steps: int = 30, V: int = 52) -> nn.Module:
    """Train an MLX model on the characters of stories."""
    value_and_grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    optimizer = optim.AdamW(3e-3, bias_correction=True)
    for x, y in islice(Base(1).windows(), steps):
        T = model.config.n_positions
        _, grads = value_and_grad(mx.array(x[:, :T] % V), mx.array(y[:, :T] % V))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    return model.eval()


# MLX modules --------------------------------------------------------------------------------------------------------


def ours(dtype: Any = None, bits: int = 0, steps: int = 0, **sizes: Any) -> Given:
    """This package's GPT."""
    mx.random.seed(0)
    shape = {"vocab_size": 52, "n_positions": 48, "n_embd": 64, "n_layer": 2, "n_head": 2, **sizes}
    model = GPT(GPTConfig(**shape)).eval()
    model = briefly_trained(model, steps, shape["vocab_size"]) if steps else model
    return {"forward": in_dtype(model, dtype, bits)}


def in_dtype(model: nn.Module, dtype: Any = None, bits: int = 0) -> nn.Module:
    if dtype:
        model.set_dtype(dtype)
    if bits:
        fits = lambda _, part: isinstance(part, nn.Linear) and part.weight.shape[1] % 32 == 0  # noqa: E731
        nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    return model


def design(steps: int = 0, dtype: Any = None, bits: int = 0, **fields: Any) -> Given:
    model = DesignGPT(Design(**fields))
    return {"forward": in_dtype(briefly_trained(model, steps) if steps else model, dtype, bits)}


def plain(dtype: Any = None, bits: int = 0, **fields: Any) -> Given:
    return {"forward": in_dtype(PlainGPT(PlainConfig(**fields)), dtype, bits)}


def of_mlx_lm(kind: str, **fields: Any) -> Given:
    its = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    args = its.ModelArgs.from_dict({"model_type": kind, "vocab_size": 61, **fields})
    model = its.Model(args)  # with MLX's initial weights, too large for an embedding that is both scaled and tied
    model.apply(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p)
    return {"forward": model, "vocab_size": 61, "n_positions": 48}


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
}
NEOX = {**LLAMA, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25}
GPT2 = {"n_ctx": 48, "n_positions": 48, "n_embd": 32, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5}
MODULES: Healthy = {
    "this package's, untrained": ours,
    "this package's, half-trained": partial(ours, steps=20),
    "this package's, trained": partial(ours, steps=120),
    "this package's, bfloat16": partial(ours, dtype=mx.bfloat16),
    "this package's, bfloat16, trained": partial(ours, dtype=mx.bfloat16, steps=40),
    "this package's, float16": partial(ours, dtype=mx.float16),
    "this package's, 8 bits": partial(ours, bits=8),
    "this package's, 4 bits, trained": partial(ours, bits=4, steps=40),
    "this package's, six layers": partial(ours, n_layer=6, n_head=8),
    "this package's, one head": partial(ours, n_layer=1, n_head=1),
    "this package's, two tokens": partial(ours, vocab_size=2),
    "this package's, GPT-2's vocabulary": partial(ours, vocab_size=50257, n_embd=32),
    "this package's, context of 5": partial(ours, n_positions=5),
    "this package's, context of 1024": partial(ours, n_positions=1024, n_embd=32),
    "plain": plain,
    "plain, dropout": partial(plain, dropout=0.3),
    "plain, rotary, RMSNorm, bfloat16": partial(plain, rope=True, rms=True, dtype=mx.bfloat16),
    "plain, not tied, 4 bits": partial(plain, tied=False, width=64, bits=4),
    "plain, context of 2": partial(plain, n_positions=2),
    "plain, three tokens, context of 300": partial(plain, vocab_size=3, n_positions=300),
    "Llama's design": partial(design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bias=False, tied=False),
    "Llama's design, trained": partial(
        design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bias=False, kv_heads=2, steps=60
    ),
    "Llama's design, 4 bits": partial(design, positions="rope", norm=nn.RMSNorm, mlp="swiglu", bits=4, width=64),
    "ALiBi": partial(design, positions="alibi"),
    "ALiBi, trained": partial(design, positions="alibi", steps=60),
    "ALiBi, one layer": partial(design, positions="alibi", layers=1),
    "relative bias": partial(design, positions="bias"),
    "relative bias, trained": partial(design, positions="bias", steps=60),
    "sinusoidal": partial(design, positions="sinusoidal"),
    "post-norm": partial(design, post_norm=True),
    "post-norm, trained": partial(design, post_norm=True, steps=60),
    "post-norm, RMSNorm, rotary": partial(design, post_norm=True, positions="rope", norm=nn.RMSNorm),
    "multi-query": partial(design, kv_heads=1),
    "multi-query, rotary, bfloat16": partial(design, kv_heads=1, positions="rope", dtype=mx.bfloat16),
    "parallel blocks": partial(design, parallel=True, positions="rope"),
    "one block, three times": partial(design, shared=True, layers=3),
    "query-key norm, soft cap": partial(design, qk_norm=True, cap=30.0, positions="rope", steps=30),
    "scaled embedding": partial(design, scaled_embedding=True, norm=nn.RMSNorm, positions="rope"),
    "large initial weights": partial(design, std=0.3, tied=False),
    "squared ReLU, no biases": partial(design, mlp="relu2", bias=False),
    "mlx-lm: GPT-2": partial(of_mlx_lm, "gpt2", **GPT2),
    "mlx-lm: Llama": partial(of_mlx_lm, "llama", **LLAMA),
    "mlx-lm: GPT-NeoX": partial(of_mlx_lm, "gpt_neox", **NEOX),
    "mlx-lm: Qwen 2": partial(of_mlx_lm, "qwen2", **LLAMA),
    "mlx-lm: Gemma": partial(of_mlx_lm, "gemma", **LLAMA, head_dim=8),
}


# PyTorch modules ----------------------------------------------------------------------------------------------------


def of_transformers(kind: str, steps: int = 0, own_sampler: bool = False, **fields: Any) -> Given:
    """A model of transformers, from a random configuration, briefly trained if asked for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=52, bos_token_id=0, eos_token_id=0, pad_token_id=0, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train(steps > 0)
    for x, _ in islice(Base(1).windows(), steps):
        ids = torch.from_numpy(x).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def sample(ids: list[int], n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[int]:
        if n == 0:
            return list(ids)
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
        window = torch.tensor([ids[-max(1, 48 - n) :]])
        mask = torch.ones_like(window)  # without it, generate takes ids 0 of the prompt for padding and hides them
        how |= {"attention_mask": mask, "max_new_tokens": n, "min_new_tokens": n, "eos_token_id": None}
        out = model.generate(window, do_sample=temperature > 0, **how)
        return out[0, window.shape[1] :].tolist()

    given = {"sample": sample, "sample_settings": {"temperature", "top_k", "top_p"}} if own_sampler else {}
    return {"forward": model, "vocab_size": 52, "n_positions": 48, **given}


OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
NEW = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
EQUAL_HEADS = {**NEW, "num_key_value_heads": 4}
TRANSFORMERS: Healthy = {
    "transformers: GPT-2": partial(of_transformers, "gpt2", **OLD),
    "transformers: GPT-2, trained": partial(of_transformers, "gpt2", steps=40, **OLD),
    "transformers: GPT-1": partial(of_transformers, "openai-gpt", **OLD),
    "transformers: GPT-Neo": partial(
        of_transformers,
        "gpt_neo",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=48,
    ),
    "transformers: GPT-J": partial(of_transformers, "gptj", **OLD, rotary_dim=4),
    "transformers: GPT-NeoX": partial(of_transformers, "gpt_neox", **EQUAL_HEADS),
    "transformers: GPT-BigCode": partial(of_transformers, "gpt_bigcode", **OLD),
    "transformers: BLOOM": partial(of_transformers, "bloom", hidden_size=32, n_layer=2, n_head=4),
    "transformers: Falcon": partial(of_transformers, "falcon", **EQUAL_HEADS),
    "transformers: OPT": partial(
        of_transformers,
        "opt",
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        word_embed_proj_dim=32,
    ),
    "transformers: Llama, trained": partial(of_transformers, "llama", steps=40, **NEW),
    "transformers: Mistral": partial(of_transformers, "mistral", **NEW),
    "transformers: Mistral, window of 32": partial(of_transformers, "mistral", sliding_window=32, **NEW),
    "transformers: Mixtral": partial(of_transformers, "mixtral", num_local_experts=4, **NEW),
    "transformers: Qwen 2": partial(of_transformers, "qwen2", **NEW),
    "transformers: Qwen 3": partial(of_transformers, "qwen3", head_dim=8, **NEW),
    "transformers: Gemma, one key": partial(of_transformers, "gemma", **{**NEW, "num_key_value_heads": 1}, head_dim=8),
    "transformers: Phi": partial(of_transformers, "phi", **EQUAL_HEADS),
    "transformers: OLMo 2": partial(of_transformers, "olmo2", **NEW),
    "transformers: StableLM": partial(of_transformers, "stablelm", **NEW),
    "transformers: GPT-2, its generate": partial(of_transformers, "gpt2", steps=40, own_sampler=True, **OLD),
}


# Functions, with samplers, caches and data --------------------------------------------------------------------------


def with_everything(size: int, seed: int, trained: bool, library: str = "mlx", **config: Any) -> Given:
    return Base(size, seed, trained, library).with_faults(**config).arguments()


def with_ids_as(kind: Callable[[np.ndarray], Any]) -> Given:
    """Give the ids as another type; the validation loss is that of 30 windows, the metrics lack all but the loss."""
    base = Base(1, 6, True)
    given = base.arguments(val_loss=base.mean_loss(base.val_ids, 30))
    metrics = [{"step": row["step"], "loss": row["loss"]} for row in given["metrics"]]
    return {**given, "train_ids": kind(base.train_ids), "val_ids": kind(base.val_ids), "metrics": metrics}


def as_tensor(ids: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(ids)


def tutorial(size: int) -> Given:
    from .planted_tutorial import planted

    return planted("")(Base(size, 3))


def in_numpy() -> Given:
    base = Base(1, 5, True)
    weights = base.arguments()["parameters"]()
    read = PlainCache(weights, base.config)

    def forward(ids: np.ndarray) -> np.ndarray:
        return np.stack([read(row.tolist(), len(row)) for row in ids])

    return {"forward": forward, "cached": read, "vocab_size": base.config.vocab_size, "n_positions": 48}


def one_row(ids: np.ndarray) -> np.ndarray:
    if ids.shape[0] != 1:
        raise ValueError("batch size 1 only")
    return small_forward(31, 24)(ids)


def as_type(kind: Any) -> Given:
    forward = small_forward(31, 24)
    return {"forward": lambda ids: mx.array(forward(ids)).astype(kind), "vocab_size": 31, "n_positions": 24}


def sampled(make: Callable[[Base], Any], *settings: str, **given: Any) -> Given:
    """A trained model with a sampler of one's own and nothing else."""
    base = Base(1, 4, True)
    its = {"vocab_size": base.config.vocab_size, "n_positions": base.config.n_positions}
    return {"forward": base.forward, "sample": make(base), "sample_settings": {*settings}, **its, **given}


def drawn_by(choose: Callable[[np.ndarray, Any], int], whole: bool = False) -> Callable[[Base], Any]:
    """Return a sampler that crops the text to the context and chooses from the last logits."""

    def make(base: Base) -> Any:
        rng = np.random.default_rng(0)

        def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
            text = list(ids)
            for _ in range(n):
                text.append(int(choose(base.forward([text[-48:]])[0, -1].astype(np.float64), rng, **settings)))
            return text if whole else text[len(ids) :]

        return sample

    return make


def by_inverse(logits: np.ndarray, rng: Any, temperature: float = 1.0) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(np.searchsorted(softmax(logits / temperature).cumsum(), rng.random()).clip(0, len(logits) - 1))


def by_gumbel(logits: np.ndarray, rng: Any, top_k: int = 0) -> int:
    lowest = np.sort(logits)[-top_k] if top_k else -np.inf
    return int((np.where(logits >= lowest, logits, -np.inf) + rng.gumbel(size=len(logits))).argmax())


def by_nucleus(logits: np.ndarray, rng: Any, temperature: float = 1.0, top_p: float = 1.0) -> int:
    """As transformers: the first token that passes p is kept."""
    p = softmax(logits / max(temperature, 1e-6))
    order = np.argsort(-p)
    kept = order[: 1 + int((p[order].cumsum() < top_p).sum())]
    return int(rng.choice(kept, p=p[kept] / p[kept].sum()))


def by_torch(logits: np.ndarray, rng: Any, temperature: float = 1.0, top_k: int | None = None) -> int:
    """As nanoGPT."""
    import torch

    row = torch.from_numpy(logits)[None] / max(temperature, 1e-8)
    if top_k:
        v, _ = torch.topk(row, min(top_k, row.size(-1)))
        row[row < v[:, [-1]]] = -float("inf")
    return int(torch.multinomial(torch.softmax(row, dim=-1), 1))


def ends(base: Base) -> Any:
    def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
        new = base.sampler()(ids, n, **settings)
        return new[: new.index(5) + 1] if 5 in new else new

    return sample


def plain_sampler(fault: str = "") -> Callable[[Base], PlainSampler]:
    return lambda base: base.sampler(fault)


def tinyworld() -> Given:
    from mlx_gpt.store.folder import load

    model, tokenizer = load(TINYWORLD)
    return {"forward": model, "encode": tokenizer.encode, "decode": tokenizer.decode}


FUNCTIONS: Healthy = {
    **{
        f"with everything: size {size}, {'trained' if trained else 'untrained'}": partial(
            with_everything, size, size + 3, trained
        )
        for size in range(3)
        for trained in (False, True)
    },
    "with everything: PyTorch, untrained": partial(with_everything, 1, 3, False, "torch"),
    "with everything: PyTorch, trained": partial(with_everything, 1, 3, True, "torch"),
    "with everything: dropout of 0.3": partial(with_everything, 1, 3, True, dropout=0.3),
    "with everything: not tied": partial(with_everything, 0, 3, True, tied=False),
    "with everything: vocabulary rounded up": partial(with_everything, 1, 3, True, vocab_size=64),
    "with everything: ids in uint16": partial(with_ids_as, lambda ids: ids.astype(np.uint16)),
    "with everything: ids in a list": partial(with_ids_as, lambda ids: ids.tolist()),
    "with everything: ids in a tensor": partial(with_ids_as, as_tensor),
    "in NumPy, with a cache": in_numpy,
    "PyTorch's own layers": lambda: tutorial(1),
    "PyTorch's own layers, post-norm": lambda: tutorial(0),
    "one row": lambda: {"forward": one_row, "vocab_size": 31, "n_positions": 24},
    "returns bfloat16": partial(as_type, mx.bfloat16),
    "returns float16": partial(as_type, mx.float16),
    "sampler: returns the prompt": partial(sampled, plain_sampler("returns the prompt")),
    "sampler: seeded": partial(sampled, plain_sampler("seeded"), "temperature", "top_k"),
    "sampler: returns an array": partial(sampled, plain_sampler("returns an array"), "top_p"),
    "sampler: no settings": partial(sampled, drawn_by(by_inverse)),
    "sampler: inverse, temperature": partial(sampled, drawn_by(by_inverse), "temperature"),
    "sampler: Gumbel, top-k only": partial(sampled, drawn_by(by_gumbel), "top_k"),
    "sampler: nucleus": partial(sampled, drawn_by(by_nucleus, whole=True), "temperature", "top_p"),
    "sampler: nanoGPT's": partial(sampled, drawn_by(by_torch, whole=True), "temperature", "top_k"),
    "sampler: ends": partial(sampled, ends, "temperature", "top_k", "top_p", end_of_text=5),
    "tinyworld of this package": tinyworld,
}

HEALTHY: Healthy = {**MODULES, **TRANSFORMERS, **FUNCTIONS}
