"""Large files of the hub, one at a time: a download that was cut short goes on where it stopped.

The hub's client (huggingface_hub 2, ``file_download.py``) goes on after a lost connection, but throws away what has
come when the program ends. So here a file grows in the client's cache under the name ``SHA256.incomplete``, and gets
its own name, by which the client finds it, when its bytes have the sha256 that the hub announced.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.errors import HubError


@dataclass(frozen=True)
class LargeFile:
    """A file that the hub keeps under its sha256 (by git-lfs), and where: in which repository, at which commit."""

    repository: str
    kind: str  # model or dataset
    commit: str
    name: str
    size: int  # bytes
    sha256: str


def download(file: LargeFile) -> None:
    """Fetch a file into the client's cache, unless it is there, with a progress bar on stderr.

    Raises ``HubError`` where other bytes came than were announced, and the client's own errors.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    if not re.fullmatch("[0-9a-f]{64}", file.sha256):
        return  # no name for a file: the client shall fetch it
    place: dict[str, str] = {"repo_id": file.repository, "repo_type": file.kind}
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(**place)
    blob, lock = cache / folder / "blobs" / file.sha256, cache / ".locks" / folder / f"{file.sha256}.lock"
    if isinstance(try_to_load_from_cache(filename=file.name, revision=file.commit, **place), str):
        return
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the client's own: another process may be fetching the same
        if blob.exists():
            return
        part = blob.with_name(f"{file.sha256}.incomplete")
        with part.open("ab") as stream:
            if stream.tell() > file.size:
                stream.truncate(0)
            http_get(
                hf_hub_url(filename=file.name, revision=file.commit, **place),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        if (found := sha256(part)) != file.sha256:
            part.unlink()
            raise HubError(
                f"{file.name} came damaged: expected sha256 {file.sha256[:12]}…, found {found[:12]}…; try again"
            )
        os.replace(part, blob)


def sha256(file: Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()
