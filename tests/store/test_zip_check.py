"""A PyTorch file with a wrong checksum, a compressed member or a false size is refused before a number is used."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gpt.errors import ModelFolderError
from mlx_gpt.store.pickles import arrays_of, read_pickle
from mlx_gpt.store.zip_check import check_zip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Create a zip as torch.save writes it: stored members, with checksums."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in {"data.pkl": b"pickle" * 50, "data/0": bytes(range(256)) * 8, "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return tmp_path / "x.pt"


def test_no_flipped_bit_changes_what_a_member_holds(file: Path) -> None:
    content = file.read_bytes()
    whole = {info.filename: zipfile.ZipFile(file).read(info) for info in zipfile.ZipFile(file).infolist()}
    refused = 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        try:
            check_zip(file)
        except ValueError:
            refused += 1
        else:  # a date, an attribute, or a field of the local header that no reader uses
            archive = zipfile.ZipFile(file)
            assert {info.filename: archive.read(info) for info in archive.infolist()} == whole
    assert refused > 0.9 * len(content)


@pytest.mark.parity
def test_no_flipped_bit_changes_what_torch_reads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(60.0), "b": torch.ones(3)}, file := tmp_path / "x.pt")
    content, read = file.read_bytes(), 0
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        try:
            tensors = read_pickle(file)
        except ModelFolderError:
            continue
        read += 1
        assert torch.equal(tensors["a"], torch.arange(60.0))
        assert torch.equal(tensors["b"], torch.ones(3))
    assert read < len(content) / 6  # padding between the members, dates


@pytest.mark.parity
def test_a_file_that_was_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert np.array_equal(arrays_of(read_pickle(tmp_path / "x.pt"), tmp_path / "x.pt")["a"], np.arange(6))


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))


def twice(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"other")


def behind_another(file: Path) -> None:
    """Place a second zip before the first: readers disagree on which directory counts."""
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("archive/data.pkl", b"other")
    file.write_bytes(other.getvalue() + file.read_bytes())


def in_directory(offset: int, value: int, size: int = 4) -> Callable[[Path], None]:
    """Set a number in the last entry of the directory."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        entry = content.rindex(b"PK\x01\x02")
        content[entry + offset : entry + offset + size] = value.to_bytes(size, "little")
        file.write_bytes(content)

    return change


def endless_directory(file: Path) -> None:
    content = file.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, 2**40, end - 2**40 & 2**64 - 1)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    file.write_bytes(content[:end] + record + locator + content[end:])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "compressed": (compressed, "compressed or encrypted"),
    "encrypted": (in_directory(8, 1, 2), "compressed or encrypted"),
    "one name twice": (twice, "two members of one name"),
    "behind another zip": (behind_another, "which should end at"),
    "larger than the file": (lambda f: (in_directory(20, 2**31)(f), in_directory(24, 2**31)(f)), "ends at byte"),
    "two sizes": (in_directory(24, 2**31), "inside the member before it"),
    "overlapping": (in_directory(42, 0), "inside the member before it"),
    "a directory of a terabyte": (endless_directory, "a directory of 1099511627776 bytes"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "no directory at its end"),
    "empty": (lambda file: file.write_bytes(b"PK\x03\x04"), "no directory at its end"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_false_size_is_refused_before_memory_is_taken(file: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(file)
    with pytest.raises(ValueError, match=message):
        check_zip(file)
