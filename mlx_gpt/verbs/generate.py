"""``mlx-gpt generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a model folder or a GPT-2 from the Hugging Face hub.

    The continuation goes to stdout, everything else to stderr.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, or a hub id such as openai-community/gpt2"""
    prompt: str = ""
    """the text to continue; nothing starts a new one"""
    max_tokens: int = 200
    """how long the continuation may be"""
    temperature: float = 0.8
    """0 takes the most probable token, 1 draws from the model's own distribution"""
    top_k: int = 0
    """draw only from the K most probable tokens; 0 is off"""
    top_p: float = 1.0
    """draw only from the most probable tokens that together have this probability; 1 is off"""
    seed: int | None = None
    """the same seed gives the same text"""

    def __call__(self) -> None:
        from mlx_gpt.generate.decode import generate
        from mlx_gpt.generate.settings import Settings
        from mlx_gpt.store.folder import load

        Settings(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed
        )
        model, tokenizer = load(self.model)
        for piece in generate(
            model,
            tokenizer,
            self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        ):
            print(piece, end="", flush=True)
        print(flush=True)
