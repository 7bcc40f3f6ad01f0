"""Read GGUF, llama.cpp's format: its header, its tensors, quantized or not, and the tokenizer inside.

The layout is that of ggml's ``docs/gguf.md``, versions 2 and 3; the blocks of quantized values are those of its
``ggml-common.h``. Every length is checked against the file before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.convert import Weights, is_linear
from mlx_gpt.store.mapped import mapped_arrays
from mlx_gpt.store.model_config import config_of
from mlx_gpt.store.source import ModelSource
from mlx_gpt.text.settings_files import Files
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import Parts, build_vocabulary, pairs

NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))  # llama.cpp ends at each
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types

MAGIC, VERSIONS = b"GGUF", (2, 3)
HEADER_LIMIT = 50_000_000  # bytes; GPT-2's vocabulary takes 2 million
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
OURS = {theirs: ours for ours, theirs in (NAMES | BLOCK_NAMES).items()}
# GGUF's names of GPTConfig's fields.
FIELDS = {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer"}
FIELDS |= {"attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon"}
PRE = ("gpt-2", "gpt2", "default", None)  # names of GPT-2's split into words, and none in old files


class TensorInfo(NamedTuple):
    """A tensor of a file: ``shape`` as in NumPy, ``kind`` the number of its type, ``offset`` from the first tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class BlockType(NamedTuple):
    """A type of values: ``n`` of them in blocks of ``size`` bytes, and the function that decodes (blocks, size)."""

    name: str
    n: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray] | None = None


def is_gguf(path: Path) -> bool:
    """Return True for a file that begins as GGUF does."""
    if path.is_file():
        with suppress(OSError), path.open("rb") as stream:
            return stream.read(4) == MAGIC
    return False


def read_gguf(file: Path) -> ModelSource:
    """Read a GPT-2; quantized tensors become float32. Raises ``ModelFolderError``, also for another architecture."""
    try:
        metadata, tensors, start, alignment = _read_header(file)
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise _damaged(file, f"an invalid header ({error})") from error
    if (found := metadata.get("general.architecture")) != "gpt2" or metadata.get("split.count", 1) not in (0, 1):
        found = f"{found!r:.80}" if found != "gpt2" else "a part of a split one: merge them with gguf-split"
        raise ModelFolderError(f"{file}: expected a GGUF of the architecture gpt2, found {found}")
    weights = _read_tensors(file, tensors, start, alignment)
    config = _read_config(metadata, weights, file)
    return ModelSource("GGUF", file.parent, config, weights, is_linear(weights), None, _tokenizer(metadata, file))


# The header -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Values from the beginning of a file, one after the other; ``ValueError`` or ``struct.error`` at its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(letter)
        return value

    def string(self) -> str:
        n = self.number("Q")
        if n > len(self.data) - self.at:
            raise ValueError(f"a string of {n} bytes")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in FORMATS:
            raise ValueError(f"a value of type {kind}")
        return self.number(FORMATS[kind])

    def array(self, kind: int, n: int) -> list[Any]:
        size = 8 if kind == STRING else struct.calcsize(FORMATS[kind]) if kind in FORMATS else 0
        if not size or n * size > len(self.data) - self.at:
            raise ValueError(f"an array of {n} values of type {kind}")
        if kind == STRING:
            return [self.string() for _ in range(n)]
        self.at += n * size
        return list(struct.unpack_from(f"<{n}{FORMATS[kind]}", self.data, self.at - n * size))


def _read_header(file: Path) -> tuple[dict[str, Any], list[TensorInfo], int, int]:
    """Return the metadata, the tensors, the first byte of their values, and the alignment of each."""
    with file.open("rb") as stream:
        reader = _Reader(stream.read(HEADER_LIMIT))
    reader.at = len(MAGIC)
    if (version := reader.number("I")) not in VERSIONS:
        raise ValueError(f"version {version}, where {' and '.join(map(str, VERSIONS))} are read")
    n_tensors, n_values = reader.number("Q"), reader.number("Q")
    metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(n_values)}
    tensors = []
    for _ in range(n_tensors):
        name, n_axes = reader.string(), reader.number("I")
        shape = tuple(reader.array(10, n_axes)[::-1])
        tensors.append(TensorInfo(name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r:.20}")
    return metadata, tensors, _aligned(reader.at, alignment), alignment


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _read_config(metadata: dict[str, Any], weights: Weights, file: Path) -> GPTConfig:
    lacking = [f"gpt2.{name}" for name in FIELDS if f"gpt2.{name}" not in metadata]
    if lacking or "wte.weight" not in weights:
        raise _damaged(file, f"no {[*lacking, 'token_embd.weight'][0]}")
    settings = {ours: metadata[f"gpt2.{theirs}"] for theirs, ours in FIELDS.items()}
    if isinstance(epsilon := settings["layer_norm_epsilon"], float):
        settings["layer_norm_epsilon"] = float(f"{epsilon:.7g}")  # a float32: 1e-5, not 9.99999975e-6
    inner = metadata.get("gpt2.feed_forward_length")
    V, C = weights["wte.weight"].shape[0], settings["n_embd"]
    is_tied = "lm_head.weight" not in weights or mx.array_equal(weights["lm_head.weight"], weights["wte.weight"])
    settings |= {"vocab_size": V, "tie_word_embeddings": bool(is_tied)}
    return config_of(file, **settings, n_inner=None if inner == 4 * C else inner)


def _tokenizer(metadata: dict[str, Any], file: Path) -> Tokenizer | None:
    """Return the tokenizer in a file, None if there is none. Raises ``ModelFolderError`` for one of another kind."""
    names, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if names is None:
        return None
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE:
        raise ModelFolderError(
            f"{file}: expected GPT-2's kind of tokenizer, found {kind!r:.40} with words of {pre!r:.40}; this package "
            f"has no other"
        )
    types = metadata.get("tokenizer.ggml.token_type", [])
    used = {i: name for i, name in enumerate(names) if types[i : i + 1] != [UNUSED]}
    if len(set(used.values())) < len(used):
        raise _damaged(file, "a token twice")
    vocab = {name: i for i, name in used.items()}
    added = {i: name for i, name in used.items() if types[i : i + 1] not in ([], [NORMAL])}
    try:
        config: dict[str, Any] = {"add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix")}
        for name in ("bos", "eos"):
            config |= {f"add_{name}_token": metadata.get(f"tokenizer.ggml.add_{name}_token")}
            config |= {f"{name}_token": used.get(metadata.get(f"tokenizer.ggml.{name}_token_id", -1))}
        config["added_tokens_decoder"] = {
            str(i): {"content": name, "special": types[i] != USER_DEFINED} for i, name in added.items()
        }
        files = Files.of(file, config)
        ends = [end for key in END_KEYS if (end := metadata.get(key)) in used]
        files = files._replace(generation={"eos_token_id": ends or None})
        return Tokenizer(*build_vocabulary(Parts(vocab, pairs(merges or []), file, file), files))
    except (ValueError, TypeError) as error:
        raise _damaged(file, f"an invalid merge ({error})") from error


# The tensors ----------------------------------------------------------------------------------------------------------


def _read_tensors(file: Path, tensors: list[TensorInfo], start: int, alignment: int) -> Weights:
    """Return the tensors under the hub's names, consecutive in the file; quantized ones are decoded to float32."""
    data, end = np.memmap(file, np.uint8, "r"), 0
    mapped: dict[str, np.ndarray] = {}
    arrays: Weights = {}
    for name, shape, kind, offset in sorted(tensors, key=lambda tensor: tensor.offset):
        block = _block_type(kind, name, file)
        if not shape or shape[-1] % block.n or max(shape) >= 2**31 or offset != _aligned(end, alignment):
            raise _damaged(file, f"{name} of shape {shape} at byte {offset}, which does not fit its type or neighbours")
        if (end := offset + prod(shape) // block.n * block.size) > len(data) - start:
            raise _damaged(file, f"{name} at bytes {start + offset} to {start + end} of {len(data)}")
        values = data[start + offset : start + end]
        if block.decode:
            arrays[_our_name(name)] = mx.array(block.decode(values.reshape(-1, block.size)).reshape(shape))
        else:
            mapped[_our_name(name)] = values.view(PLAIN[kind]).reshape(shape)
    if len(mapped.keys() | arrays.keys()) < len(tensors):
        raise _damaged(file, "one name for two tensors")
    if start + _aligned(end, alignment) < len(data):
        raise _damaged(file, f"{len(data)} bytes, of which {start + end} are used")
    return (mapped_arrays(mapped) if mapped else {}) | arrays


def _our_name(name: str) -> str:
    """Return the hub's name: ``blk.3.attn_qkv.weight`` -> ``h.3.attn.c_attn.weight``; another name unchanged."""
    stem, _, part = name.rpartition(".")
    block, _, inside = stem.rpartition(".")
    if block.startswith("blk."):
        return f"h.{block.removeprefix('blk.')}.{OURS.get(inside, inside)}.{part}"
    return f"{OURS.get(stem, stem)}.{part}"


def _half(octets: np.ndarray) -> np.ndarray:
    """Return pairs of bytes (blocks, 2) as float16 numbers (blocks, 1), in float32."""
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """Return the lower halves of bytes (blocks, n), then the upper: (blocks, 2n)."""
    return np.concatenate([octets & 15, octets >> 4], axis=1).astype(np.float32)


def _q8_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * x[:, 2:].view(np.int8)


def _q4_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * (_nibbles(x[:, 2:]) - 8)


def _q4_1(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * _nibbles(x[:, 4:]) + _half(x[:, 2:4])


PLAIN = {0: "<f4", 1: "<f2", 30: "<u2"}  # MLX reads these as they are
TYPES = {0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2)}
TYPES |= {2: BlockType("Q4_0", 32, 18, _q4_0), 3: BlockType("Q4_1", 32, 20, _q4_1), 8: BlockType("Q8_0", 32, 34, _q8_0)}


def _block_type(kind: int, name: str, file: Path) -> BlockType:
    """Return a type of values; all but ``TYPES`` are decoded by llama.cpp's package, if that is installed."""
    if kind in TYPES:
        return TYPES[kind]
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        type_ = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
        n_values, n_bytes = GGML_QUANT_SIZES[type_]
        return BlockType(type_.name, n_values, n_bytes, lambda blocks: dequantize(blocks, type_))
    except ImportError as error:
        known = ", ".join(block.name for block in TYPES.values())
        raise ModelFolderError(
            f"{file}: {name}: expected {known}, found type {kind}; "
            "llama.cpp's package decodes more: pip install 'mlx-gpt[gguf]'"
        ) from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelFolderError(
            f"{file}: {name}: expected floats or a quantized type, found type {kind}; use a file in Q8_0 or F16"
        ) from error


def _damaged(file: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"{file}: expected a whole GGUF file, found {found}; copy or download it again")
