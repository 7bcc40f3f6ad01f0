"""A damaged llm.c file or TensorFlow release is refused in one line or gives the right logits.

Like the last part of ``test_hostile.py`` for the hub's folders. The right logits are those of what a second reader,
here, finds in the damaged file. Values of llm.c's are not damaged: the format could not detect it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gpt.check.hub_folder import HubWeights
from mlx_gpt.check.reference import gpt2
from mlx_gpt.errors import MLXGPTError, ModelFolderError
from mlx_gpt.store.folder import load
from mlx_gpt.store.tf_bundle import crc32c, masked, read_bundle
from mlx_gpt.text.tokenizer import Tokenizer

TENSORFLOW = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2-tensorflow"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TINY = {"n_positions": 8, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 8}  # llm.c's order
PADDED = 384

Arrays = dict[str, np.ndarray]


def compare(place: Path, weights: Arrays, config: dict[str, Any]) -> bool:
    """Return True if a damaged file still loads; then its logits must be those of ``weights``."""
    mx.reset_peak_memory()
    already = mx.get_active_memory()
    try:
        model, _ = load(place)
    except MLXGPTError as error:
        line = str(error)
    else:
        line = ""
    if line:
        assert line.isprintable()
        assert mx.get_peak_memory() - already < 1_000_000
        return False
    ids = np.arange(model.config.n_positions)[None] % model.config.vocab_size
    expected = gpt2(HubWeights(weights, config), ids)
    assert np.abs(np.array(model(ids)) - expected).max() < 1e-5 * np.abs(expected).max()
    return True


def damaged(content: bytes, how: str, end: int, random: np.random.Generator) -> bytes:
    """Return a file damaged somewhere in its first ``end`` bytes."""
    changed, at = bytearray(content), int(random.integers(end))
    if how == "flip":
        changed[at] ^= 1 << int(random.integers(8))
    elif how == "cut":
        del changed[int(random.integers(len(content))) :]
    elif how == "insert":
        changed[at:at] = random.choice([b"\0", b"9", b"-", b"}", b"\xff" * 4, b"0" * 30]).item() or b"\0"
    elif how == "remove":
        del changed[at : at + int(random.integers(1, 5))]
    elif digits := [i for i in range(end) if content[i] in b"0123456789"]:  # of a text
        changed[digits[random.integers(len(digits))]] = ord(str(random.integers(10)))
    return bytes(changed)


# llm.c ----------------------------------------------------------------------------------------------------------------


def llmc_file(version: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, *TINY.values(), PADDED
    C, L = TINY["n_embd"], TINY["n_layer"]
    n = (PADDED + TINY["n_positions"]) * C + L * (12 * C * C + 13 * C) + 2 * C
    values = np.random.default_rng(0).normal(0, 0.3, n).astype("<f4")
    return header.tobytes() + (values if version == 3 else (values.view("<u4") >> 16).astype("<u2")).tobytes()


def of_llmc(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Return the weights and settings in a file, in the hub's layout."""
    _, version, T, V, L, H, C, padded = np.frombuffer(content, "<i4", 8).tolist()
    if version == 3:
        rest = np.frombuffer(content, "<f4", offset=1024)
    else:
        rest = (np.frombuffer(content, "<u2", offset=1024).astype("<u4") << 16).view("<f4")

    def take(*shape: int) -> np.ndarray:
        nonlocal rest
        n = int(np.prod(shape))
        taken, rest = rest[:n].reshape(shape), rest[n:]
        return taken

    weights = {"wte.weight": take(padded, C)[:V], "wpe.weight": take(T, C)}
    parts = (("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)))
    for name, shape in (*parts, ("ln_2", (C,)), ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C))):
        for part, size in (("weight", shape), ("bias", shape[:1])):
            weights |= {f"h.{i}.{name}.{part}": value.T for i, value in enumerate(take(L, *size))}
    return weights | {"ln_f.weight": take(C), "ln_f.bias": take(C)}, {"n_layer": L, "n_head": H}


def llmc_loads_right(version: int, how: str, seed: int) -> bool:
    random, content = np.random.default_rng(seed), llmc_file(version)
    header = np.frombuffer(content, "<i4", 8).copy()
    one, other = random.integers(8, size=2)
    if how == "number":
        header[one] = random.choice([0, -1, 1, 2, 4, 5, 300, 2**20, 2**31 - 1, -(2**31), header[other]])
    elif how == "swap":
        header[[one, other]] = header[[other, one]]
    else:
        content = damaged(content, how, 1024 if random.random() < 0.5 else 32, random)
    if how in ("number", "swap"):
        content = header.tobytes() + content[32:]
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.bytes().save(folder)
        file = Path(folder) / "gpt2.bin"
        file.write_bytes(content)
        try:
            right: Any = of_llmc(content)
        except (ValueError, MemoryError):  # nothing right can be read, so it must not load
            right = {}, {"n_layer": 0, "n_head": 1}
        return compare(file, *right)


LLMC = ["number", "swap", "flip", "cut", "insert", "remove"]


@settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([3, 5]), st.sampled_from(LLMC), st.integers(0, 2**32 - 1))
def test_a_damaged_llmc_file_is_refused_in_one_line_or_gives_the_right_numbers(
    version: int, how: str, seed: int
) -> None:
    llmc_loads_right(version, how, seed)


def test_the_damage_to_llmc_is_neither_always_fatal_nor_always_harmless() -> None:
    loaded = [llmc_loads_right(version, how, seed) for version in (3, 5) for how in LLMC for seed in range(6)]
    assert 0.05 < sum(loaded) / len(loaded) < 0.6


def test_a_sparse_file_larger_than_the_memory_is_refused_unread(tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path)
    header = np.zeros(256, "<i4")
    T, V, L, H, C = 8, 257, 40, 1, 65536
    header[:8] = 20240326, 3, T, V, L, H, C, PADDED
    file = tmp_path / "gpt2.bin"
    file.write_bytes(header.tobytes())
    os.truncate(file, 1024 + 4 * ((PADDED + T) * C + L * (12 * C * C + 13 * C) + 2 * C))  # 8 TB, not on the disk
    with pytest.raises(ModelFolderError, match=r"the weights take 8,246\.\d GB, but this machine has"):
        load(file)


# TensorFlow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = shutil.copytree(TENSORFLOW, tmp_path / "release")
    Tokenizer.bytes().save(folder)
    return folder


def of_tensorflow() -> Arrays:
    """Return TensorFlow's values under the hub's names."""
    weights = {}
    for variable, value in np.load(TENSORFLOW / "values.npz").items():
        name = variable.removeprefix("model/").replace("h0", "h/0").replace("h1", "h/1").replace("/", ".")
        for last, ours in ((".g", ".weight"), (".w", ".weight"), (".b", ".bias"), ("e", "e.weight")):
            if name.endswith(last):
                name = name.removesuffix(last) + ours
                break
        weights[name] = value[0] if value.ndim == 3 else value
    return weights


def tensorflow_loads_right(how: str, seed: int) -> bool:
    random = np.random.default_rng(seed)
    name = random.choice(["hparams.json", "checkpoint", INDEX, INDEX, DATA])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(TENSORFLOW, Path(temporary) / "release"))
        Tokenizer.bytes().save(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged(content, how, len(content), random))
        try:
            n_head = json.loads((folder / "hparams.json").read_text())["n_head"]
        except (ValueError, LookupError, TypeError):  # then it must not load
            n_head = 0
        return compare(folder, of_tensorflow(), {"n_layer": 2, "n_head": n_head})


TF = ["flip", "cut", "insert", "remove", "digit"]


@settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TF), st.integers(0, 2**32 - 1))
def test_a_damaged_release_is_refused_in_one_line_or_gives_the_right_numbers(how: str, seed: int) -> None:
    tensorflow_loads_right(how, seed)


def test_the_damage_to_a_release_is_neither_always_fatal_nor_always_harmless() -> None:
    loaded = [tensorflow_loads_right(how, seed) for how in TF for seed in range(12)]
    assert 0.05 < sum(loaded) / len(loaded) < 0.6


def test_the_checksum_is_castagnolis(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720
    monkeypatch.setattr("mlx_gpt.store.crc32c.BLOCK", 64)
    for n in (*range(9), 63, 64, 65, 200, 333):
        data = np.random.default_rng(n).bytes(n)
        crc = 0xFFFFFFFF
        for bit in (byte >> k & 1 for byte in data for k in range(8)):  # its definition, bit by bit
            crc = crc >> 1 ^ (0x82F63B78 if (crc ^ bit) & 1 else 0)
        assert crc32c(data) == crc32c(np.frombuffer(b"x" + data, np.uint8)[1:]) == crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("at", [0, 5001, -1])
def test_a_flipped_bit_of_a_value_is_refused(release: Path, at: int) -> None:
    content = bytearray((release / DATA).read_bytes())
    content[at] ^= 4
    (release / DATA).write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"\(model/.* with a wrong checksum\)"):
        load(release)


@pytest.mark.parametrize("at", range(0, 2400, 97))
def test_no_flipped_bit_of_the_index_goes_unnoticed(release: Path, at: int) -> None:
    """Without the checksum each would be another offset, shape or name, and no error."""
    content = bytearray((release / INDEX).read_bytes())
    footer = len(content) - 48
    content[at % footer] ^= 1
    (release / INDEX).write_bytes(content)
    try:
        found = read_bundle(release / INDEX)
    except ModelFolderError:
        return
    for name, value in np.load(TENSORFLOW / "values.npz").items():  # the bit was in the metaindex block or in padding
        assert np.array_equal(found[name], value)


def test_bytes_before_the_values_are_refused(release: Path) -> None:
    (release / DATA).write_bytes(bytes(4) + (release / DATA).read_bytes())
    with pytest.raises(ModelFolderError, match=r"bytes in shard 0, of which \d+ are used"):
        load(release)


@pytest.mark.parametrize("name", ["checkpoint", INDEX, DATA])
def test_an_endless_file_of_a_release_is_not_read(release: Path, name: str) -> None:
    file = release / name
    os.truncate(file, 2**40)  # a sparse file
    with pytest.raises(ModelFolderError, match="more than" if name != DATA else "bytes in shard 0"):
        load(release)
    for make in (lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file)):
        file.unlink()
        make()
        with pytest.raises(ModelFolderError, match="device or a pipe"):
            load(release)


def block(*entries: tuple[bytes, bytes]) -> bytes:
    """Return a block of a table, followed by its type and its checksum."""
    content = b"".join(bytes([0, len(key), len(value)]) + key + value for key, value in entries)
    content += (0).to_bytes(4, "little") + (1).to_bytes(4, "little")  # one restart, at 0
    return content + b"\0" + masked(crc32c(content + b"\0")).to_bytes(4, "little")


def table(values: bytes, handles: bytes) -> bytes:
    return values + handles + bytes([0, 0, len(values), len(handles) - 5]).ljust(40, b"\0") + MAGIC


MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
HEADER = block((b"", b"\x08\x01"))  # one shard
ENDLESS = block((b"", b"\x08" + b"\xff" * 90))


def handle(values: bytes) -> bytes:
    return bytes([0, len(values) - 5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(HEADER, block(*[(b"k", handle(HEADER))] * 2)), "found blocks that overlap"),
        (table(HEADER, block((b"k", b"\xff" * 100))), "found a number of more than 64 bits"),
        (table(ENDLESS, block((b"k", handle(ENDLESS)))), "found a number of more than 64 bits"),
        (table(HEADER[:-1] + b"x", block((b"k", handle(HEADER)))), "found a block with a wrong checksum"),
        (table(HEADER, block((b"k", b"\x7f\x7f"))), "index out of range"),
    ],
    ids=["one block twice", "a handle without end", "a message without end", "another checksum", "past the end"],
)
def test_a_malicious_table_is_refused(release: Path, content: bytes, message: str) -> None:
    (release / INDEX).write_bytes(content)
    with pytest.raises(ModelFolderError, match=message):
        load(release)
