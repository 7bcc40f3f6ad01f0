"""``mlx-gpt serve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from mlx_gpt.commands.generation_flags import Name, load_in
from mlx_gpt.generate.settings import Number
from mlx_gpt.serve.limits import Limits


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP, with OpenAI's completions API: /v1/completions, /v1/models, /health.

    Requests that come at the same time are computed side by side. Ctrl-C or SIGTERM ends it, when what is under way
    has been answered.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, or a hub id such as openai-community/gpt2"""
    host: str = "127.0.0.1"
    """where to listen; anything but this machine itself lets others use the model, without a password"""
    port: int = 8000
    """0 takes one that is free"""
    revision: Name = None
    """a branch, tag or commit of the hub's"""
    quantize: Number = None
    """keep the weights in so many bits, 8 or 4"""
    cache_bits: Number = None
    """keep the cache in half precision (16) or quantized (8, 4): less memory"""
    limits: Limits = field(default_factory=Limits)

    def __call__(self) -> None:
        from pathlib import Path

        from mlx_gpt.errors import UsageError
        from mlx_gpt.generate.decoder import check_cache

        try:
            from mlx_gpt.serve.server import listen, serve
            from mlx_gpt.serve.service import Service
        except ModuleNotFoundError as missing:
            raise UsageError(
                f"serve needs {missing.name}, which is not installed: pip install 'mlx-gpt[serve]'"
            ) from missing

        self.limits.check()
        with listen(self.host, self.port) as sock:  # before the model is read: wrong addresses are told at once
            folder = Path(self.model).expanduser()
            name = folder.resolve().name if folder.is_dir() else self.model
            model, tokenizer = load_in(self.quantize, self.model, self.revision)
            check_cache(model.config, self.cache_bits)
            serve(Service(model, tokenizer, name, self.limits, self.cache_bits), sock)
