"""GPT-2 written from scratch in MLX.

    from mlx_gpt import generate, load

    model, tokenizer = load("openai-community/gpt2")  # or a folder of your own
    for piece in generate(model, tokenizer, "Alan Turing theorized that"):
        print(piece, end="", flush=True)

``generate_tokens`` yields ids instead, and ``generate_many`` continues several prompts side by side. Start
reading at ``mlx_gpt/model/__init__.py``.
"""

from mlx_gpt.config import GPTConfig
from mlx_gpt.linux_cpu.openblas import lend_openblas

lend_openblas()  # the one thing that importing does: later would be too late, since MLX is imported below

# The function takes the name of its package here. It keeps it: Python binds a package's name when it first imports
# it, which this line does, and never again. So ``from mlx_gpt.generate.generation import ...`` works as ever, and only
# ``import mlx_gpt.generate.generation as d`` does not.
from mlx_gpt.generate.generation import generate, generate_many, generate_tokens  # noqa: E402
from mlx_gpt.model.gpt import GPT  # noqa: E402
from mlx_gpt.store.folder import load, save  # noqa: E402

__all__ = ["GPT", "GPTConfig", "generate", "generate_many", "generate_tokens", "load", "save"]
