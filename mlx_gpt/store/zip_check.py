"""Check a zip file of PyTorch's before torch opens it: torch checks neither sizes nor checksums.

``torch.save`` stores every member uncompressed, with its CRC-32 (PKWARE, APPNOTE.TXT). A compressed member, which
could grow to any size in memory, is refused, and so are a wrong checksum and members that share bytes.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

SIGNATURE = b"PK\x03\x04"  # torch takes a file for a zip if it begins with this
END, END64, LOCATOR64 = (b"PK\x05\x06", 22), (b"PK\x06\x06", 56), (b"PK\x06\x07", 20)  # records: signature, bytes
MEMBER = 30  # bytes before a member's name
DIRECTORY_LIMIT = 50_000_000  # bytes; a thousand layers with an optimizer's state take 4 million
CHUNK = 1 << 20


def is_zip(file: Path) -> bool:
    """Return True if torch would read a file as a zip."""
    with file.open("rb") as stream:
        return stream.read(4) == SIGNATURE


def check_zip(file: Path) -> None:
    """Read a whole zip file, 1 MB at a time. Raises ``ValueError`` unless all members are stored, apart and intact."""
    size = file.stat().st_size
    try:
        count = _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            if len(members) != count:
                raise ValueError(f"{len(members)} members, where its directory promises {count}")
            _check_extents(members, size)
            if any(member.CRC for member in members):  # else torch was told not to compute them
                for member in members:
                    _check_member(archive, member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        raise ValueError(str(error) or "a member is cut short") from error


def _check_directory(file: Path, size: int) -> int:
    """Check that the directory ends where its end record begins, so that every reader finds the same; count members."""
    with file.open("rb") as stream:
        stream.seek(max(0, size - 98))
        tail = stream.read()
    end, start = tail[-END[1] :], size - END[1]
    if end[:4] != END[0]:
        raise ValueError("no directory at its end")
    count, length, offset = struct.unpack("<HII", end[10:20])
    locator = tail[-END[1] - LOCATOR64[1] : -END[1]]
    if locator[:4] == LOCATOR64[0]:
        end64, start = tail[: END64[1]], start - LOCATOR64[1] - END64[1]
        if end64[:4] != END64[0]:
            raise ValueError("no zip64 directory before its end")
        count, length, offset = struct.unpack("<QQQ", end64[32:56])
    if length > DIRECTORY_LIMIT or offset + length != start:
        raise ValueError(f"a directory of {length} bytes at {offset}, which should end at {start}")
    return count


def _check_extents(members: list[zipfile.ZipInfo], size: int) -> None:
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two members of one name")
    end = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(
                f"{member.filename} is compressed or encrypted, which torch.save never does (torch.jit.save does)"
            )
        if member.header_offset < end or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} at byte {member.header_offset}, inside the member before it")
        end = member.header_offset + MEMBER + member.file_size
    if end > size:
        raise ValueError(f"{members[-1].filename} ends at byte {end} of {size}")


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as stream:  # which compares the checksum at the end
        while stream.read(CHUNK):
            pass
