"""GPT-2 written from scratch in MLX.

    from mlx_gpt import generate, load

    model, tokenizer = load("openai-community/gpt2")  # or a folder
    for piece in generate(model, tokenizer, "Alan Turing theorized that"):
        print(piece, end="", flush=True)

``generate_tokens`` yields ids, and ``generate_many`` continues several prompts as a batch. Start reading at
``mlx_gpt/model/__init__.py``.
"""

import sys

if sys.platform.startswith("linux"):
    from mlx_gpt.linux_cpu import set_up

    set_up()  # only possible before MLX is imported

from mlx_gpt.config import GPTConfig

# ``mlx_gpt.generate`` is this function, not the package: Python binds a package's name at its first import, which is
# this line. ``from mlx_gpt.generate.generation import ...`` works, ``import mlx_gpt.generate.generation as g`` fails.
from mlx_gpt.generate.generation import generate, generate_many, generate_tokens
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save

__all__ = ["GPT", "GPTConfig", "generate", "generate_many", "generate_tokens", "load", "save"]
