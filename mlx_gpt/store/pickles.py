"""Open PyTorch's files safely. They are pickles, which can run code, so only torch opens them.

With ``weights_only=True`` torch builds tensors and plain containers and refuses everything else. Before torch 2.6 a
crafted file could circumvent it (CVE-2025-32434).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights, is_buffer
from mlx_gpt.store.mapped import mapped_arrays

SAFE = (2, 6)


def import_torch(file: Path) -> Any:
    """Return the module ``torch``. Raises ``ModelFolderError`` if there is none that opens ``file`` safely."""
    install = "pip install 'torch>=2.6'"
    try:
        import torch
    except ImportError as error:
        raise ModelFolderError(f"{file}: a PyTorch pickle, which takes torch to read or write: {install}") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE:
        raise ModelFolderError(f"{file}: torch {torch.__version__} does not open a pickle safely: {install}")
    return torch


def read_pickle(file: Path) -> Any:
    """Return the content of a file; torch maps its tensors into memory where the format allows it."""
    torch = import_torch(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch has no base class: UnpicklingError, RuntimeError, EOFError, ...
        first_line = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ModelFolderError(
            f"{file}: expected tensors, but torch does not open it ({type(error).__name__}: {first_line}); no code in "
            f"it was run; get the weights as safetensors, or copy the file again"
        ) from error


def arrays_of(tensors: Any, file: Path) -> Weights:
    """Return a dict of torch tensors as MLX arrays, without the mask buffers."""
    torch = import_torch(file)
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelFolderError(f"{file}: expected a dict of name to tensor, found something else; this is no GPT-2")
    kept: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if is_buffer(name):
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ModelFolderError(f"{file}: {name}: expected float32, float16 or bfloat16, found {tensor.dtype}")
        if tensor.nbytes > file.stat().st_size:  # an expanded view of a few numbers
            raise ModelFolderError(
                f"{file}: {name}: {tensor.nbytes} bytes in a file of {file.stat().st_size}; damaged or malicious"
            )
        tensor = tensor.detach().contiguous()
        is_bfloat16 = tensor.dtype == torch.bfloat16  # which NumPy lacks
        kept[name] = tensor.view(torch.int16).numpy().view(np.uint16) if is_bfloat16 else tensor.numpy()
    return mapped_arrays(kept)
