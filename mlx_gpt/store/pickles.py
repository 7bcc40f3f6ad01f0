"""Open PyTorch's files safely. They are pickles, which can run code, so only torch opens them.

With ``weights_only=True`` torch builds tensors and plain containers and refuses everything else. Before torch 2.6 a
crafted file could circumvent it (CVE-2025-32434). Checksums and sizes are checked first (``zip_check.py``).
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.zip_check import check_zip, is_zip

SAFE = (2, 6)
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # torch prints parts of its errors in bold
REASON = re.compile(r"WeightsUnpickler error:\s*(.*?)(?:\. Please|\n|$)", re.DOTALL)
REFUSED = re.compile(r"(?:GLOBAL|class|global|function) ([\w.]+\.\w+)")


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
    """Return the content of a file; torch maps its tensors into memory where the format allows it.

    Raises ``ModelFolderError`` for a damaged file, and for one with objects of other classes than ``_data_classes``.
    """
    torch = import_torch(file)
    try:
        zipped = is_zip(file)
        check_zip(file) if zipped else _check_pickle(file)
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{file}: expected a whole PyTorch file, found damage or something else ({error}); copy or save it again"
        ) from error
    try:
        with torch.serialization.safe_globals(_data_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols other than torch's
            if zipped and (names := torch.serialization.get_unsafe_globals_in_checkpoint(file)):
                raise _foreign(file, names)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except ModelFolderError:
        raise
    except Exception as error:  # torch has no base class: UnpicklingError, RuntimeError, EOFError, ...
        text = STYLE.sub("", str(error))
        reason = found[1] if (found := REASON.search(text)) else (text.splitlines() or [""])[0].rstrip(".")
        if reason.startswith("Unsupported operand"):
            reason = "a pickle of another protocol than torch.save's own, 2, or a damaged one"
        if "weights_only" in reason:  # torch's advice to run the code in it
            reason = "a pickle that it does not read as data, or a damaged one"
        if name := REFUSED.search(found[1] if found else ""):
            raise _foreign(file, [name[1]]) from error
        raise ModelFolderError(
            f"{file}: expected tensors, but torch does not open it ({type(error).__name__}: {reason}); no code in it "
            f"was run; get the weights as safetensors, or copy the file again"
        ) from error


def _check_pickle(file: Path) -> None:
    """Raise ``ValueError`` unless a file begins as a pickle does; one of before torch 1.6 has no checksums."""
    with file.open("rb") as stream:
        start = stream.read(24)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer to it: run git lfs pull")
    if start[:1] != b"\x80":
        raise ValueError(f"a file that begins with {start[:12]!r}" if start else "an empty file")


def arrays_of(tensors: Mapping[Any, Any], file: Path) -> Weights:
    """Return torch tensors as MLX arrays. Raises ``ModelFolderError`` unless each is named, dense and of floats."""
    size, total, arrays = file.stat().st_size, 0, {}
    for name, tensor in tensors.items():
        arrays[name] = _to_numpy(name, tensor, 2 * size - total, file)  # twice, since a tied head may repeat
        total += arrays[name].nbytes
    return mapped_arrays(arrays)


def _to_numpy(name: Any, tensor: Any, limit: int, file: Path) -> np.ndarray:
    torch = import_torch(file)
    if not isinstance(name, str):
        raise ModelFolderError(
            f"{file}: expected the names of tensors, found {name!r:.80}; save a model's state_dict()"
        )
    if problem := _unusual(tensor, torch):
        raise ModelFolderError(
            f"{file}: {name}: expected a dense tensor of float32, float16 or bfloat16, found {problem}; "
            f"save it again as one"
        )
    if tensor.nbytes > min(limit, size := file.stat().st_size):  # an expanded view of a few numbers
        raise ModelFolderError(f"{file}: {name}: {tensor.nbytes} bytes in a file of {size}; damaged or malicious")
    tensor = tensor.detach().contiguous()
    is_bfloat16 = tensor.dtype == torch.bfloat16  # which NumPy lacks
    return tensor.view(torch.int16).numpy().view(np.uint16) if is_bfloat16 else tensor.numpy()


def _unusual(tensor: Any, torch: Any) -> str:
    """Return the property of a tensor that makes it unreadable, or ""."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"an object of {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} tensor"
    if tensor.device.type != "cpu":
        return f"a tensor without values, on the device {tensor.device.type}"
    if tensor.is_quantized or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return str(tensor.dtype).removeprefix("torch.")
    return ""


def _data_classes() -> list[Any]:
    """Return classes that hold data only, which training programs save beside the weights, by their names in files."""
    rebuild = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and since
    arrays = [(function, f"{module}.{name}") for name, function in rebuild.items() for module in modules]
    pure = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}  # which exist on every system
    paths = [(kind, f"{module}.{name}") for name, kind in pure.items() for module in ("pathlib", "pathlib._local")]
    dtypes = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    return [argparse.Namespace, np.dtype, np.ndarray, *dtypes, *arrays, *paths]


def _foreign(file: Path, names: list[str]) -> ModelFolderError:
    remedy = 'torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, "ckpt.pt")'
    if any(name.startswith("transformers.") for name in names):
        remedy = 'model.save_pretrained("FOLDER")'
    return ModelFolderError(
        f"{file}: holds objects of {', '.join(sorted(names))}, whose code would run when opened; no code in it was "
        f"run; in the program that wrote the file, save tensors and plain values only: {remedy}"
    )
