"""Healthy PyTorch models of transformers, from random configurations."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

from .healthy_modules import LLAMA
from .planted import Base, Given

OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
NEW = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
EQUAL_HEADS = {**NEW, "num_key_value_heads": 4}


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


TRANSFORMERS = {
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
