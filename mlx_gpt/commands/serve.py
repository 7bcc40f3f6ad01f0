"""``mlx-gpt serve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from mlx_gpt.commands.generation_flags import FloatType, Name, load_quantized
from mlx_gpt.generate.settings import Number
from mlx_gpt.serve.access import Access
from mlx_gpt.serve.limits import Limits


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP with OpenAI's completions API: /v1/completions, /v1/models.

    Also vLLM's /tokenize and /detokenize, and /health. Concurrent requests are computed in one batch. Ctrl-C or SIGTERM
    stops the server after it has answered the requests in progress; a second one answers them 503.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    host: str = "127.0.0.1"
    """the address to listen on; any other lets other machines use the model: set --api-key then"""
    port: int = 8000
    """the port to listen on; 0 is any free port"""
    revision: Name = None
    """a branch, tag or commit on the hub"""
    quantize: Number = None
    """quantize the weights to 8 or 4 bits"""
    dtype: FloatType = None
    """the type of the weights: that of the files by default, on a CPU float32"""
    cache_bits: Number = None
    """store the cache in half precision (16) or quantized (8, 4)"""
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)

    def __call__(self) -> None:

        from mlx_gpt.errors import UsageError
        from mlx_gpt.files import expand_user
        from mlx_gpt.generate.decoder import check_cache
        from mlx_gpt.generate.memory import memory_limits

        try:
            from mlx_gpt.serve.guard import Guard
            from mlx_gpt.serve.server import listen, serve
            from mlx_gpt.serve.service import Service
        except ModuleNotFoundError as missing:
            raise UsageError(
                f"serve needs {missing.name}, which is not installed: pip install 'mlx-gpt[serve]'"
            ) from missing

        self.limits.check()
        guard = Guard(self.access, self.host)
        with listen(self.host, self.port) as sock:  # first, so that a wrong address is reported at once
            folder = expand_user(self.model)
            name = folder.resolve().name if folder.is_dir() else self.model
            model, tokenizer = load_quantized(self.model, self.revision, self.quantize, self.dtype)
            check_cache(model.config, self.cache_bits)
            with memory_limits(model, self.limits.rows):
                serve(Service(model, tokenizer, name, self.limits, self.cache_bits), guard, sock)
