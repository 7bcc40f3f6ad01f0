"""The result of reading a layout: the configuration, the lazy weights, and the orientation of the matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Quantization, Weights, checked, from_hub, from_linear, to_hub
from mlx_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A GPT-2 in the layout of its files.

    The weights can be taken once: an array that was also kept here would stay in memory after use.
    """

    kind: str  # of the layout, for the user
    folder: Path  # where the tokenizer's files are, if there are any
    config: GPTConfig
    weights: Weights
    is_linear: bool = False  # matrices are (out, in), not (in, out) as on the hub
    quantization: Quantization | None = None
    tokenizer: Tokenizer | None = None  # where the weights' file has one

    @property
    def dtype(self) -> mx.Dtype:
        """float16 or bfloat16 if all floating weights are, else float32."""
        found = {weight.dtype for weight in self.weights.values() if mx.issubdtype(weight.dtype, mx.floating)}
        return found.pop() if found in ({mx.float16}, {mx.bfloat16}) else mx.float32

    def parameters(self, dtype: mx.Dtype | None = mx.float32) -> Weights:
        """Return the parameters of ``GPT(config)`` as ``dtype``; None leaves each in its own."""
        with self._named():
            weights = self._take()
            if self.is_linear:
                return from_linear(weights, self.config, dtype, self.quantization)
            return from_hub(weights, self.config, dtype)

    def hub_tensors(self, dtype: mx.Dtype | None = None) -> Weights:
        """Return the same in the hub's layout, matrices (in, out)."""
        if self.is_linear:
            return to_hub(self.parameters(dtype))
        with self._named():
            return checked(self._take(), self.config, dtype)

    def require_floats(self, verb: str) -> None:
        """Raise ``ModelFolderError`` for a quantized model, which the command ``verb`` does not take."""
        if self.quantization:
            raise ModelFolderError(
                f"{self.folder}: is quantized already, to {self.quantization.bits} bits; "
                f"{verb} the float model that it was made from"
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Begin the message about a tensor with the folder."""
        try:
            yield
        except ModelFolderError as error:
            raise ModelFolderError(f"{self.folder}: {error}") from error

    def _take(self) -> Weights:
        weights = dict(self.weights)
        self.weights.clear()
        return weights
