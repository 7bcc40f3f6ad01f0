"""Write ``fixtures/tiny-gpt2``: a tiny random GPT-2 saved by transformers, and transformers' logits.

Run with the parity extra: ``python tests/helpers/make_fixture.py``. The tests then need neither torch nor transformers.
No weight is 0 and no norm is 1, so that a missing bias or norm changes the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
SHAPE = {"vocab_size": 97, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}
VARIANTS: dict[str, dict[str, Any]] = {  # the same weights with other settings
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
}


def tiny_gpt2(**settings: Any) -> Any:
    """Return a ``GPT2LMHeadModel`` of ``SHAPE`` with eager attention and random weights, the same each time."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**(SHAPE | {"bos_token_id": 0, "eos_token_id": 0} | settings), attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = ".ln_" in name and name.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_scale else 0.3 * noise)
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of a transformers model, in the model's precision."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def main() -> None:
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, SHAPE["n_positions"]))
    model = tiny_gpt2()
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    arrays = {"ids": ids, "plain_float32": logits_of(model, ids)}
    for name, settings in VARIANTS.items():
        arrays[name] = logits_of(tiny_gpt2(**settings).double(), ids).astype(
            np.float64 if name == "plain" else np.float32
        )
    np.savez_compressed(FOLDER / "logits.npz", **arrays)
    print(f"{FOLDER}: {sum(file.stat().st_size for file in FOLDER.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
