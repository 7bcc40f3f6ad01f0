"""Download files of the Hugging Face hub into its client's cache.

The hub's client (huggingface_hub 2, ``file_download.py``) resumes a lost connection, but discards a partial download
when the program ends. Here a large file is downloaded in the client's cache as ``SHA256.incomplete``, and gets the
name by which the client finds it once its bytes have the sha256 that the hub announced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_gpt.errors import HubError
from mlx_gpt.files import fsync, sha256_of

TIMEOUT = 10  # seconds for the hub's first answer


def fetch(name: str, patterns: Sequence[str], revision: str | None = None, kind: str = "model") -> Path:
    """Return a folder in the client's cache with those files of a model or dataset that match ``patterns``.

    Asks the hub for the newest version and downloads only what is not in the cache. If the hub cannot be reached, the
    cached version is used. Raises ``HubError``.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    wanted: dict[str, Any] = {"repo_id": name, "repo_type": kind, "revision": revision, "allow_patterns": patterns}
    with _quiet_client():
        try:
            about = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except errors.RevisionNotFoundError as error:
            raise HubError(f"the hub has it, but no revision {revision!r}; leave it out for the newest") from error
        except Exception as error:
            return _from_cache(wanted, error)
        place = {"repo_id": name, "repo_type": kind}
        try:
            for file in getattr(about, "siblings", None) or ():
                if file.lfs and any(fnmatch(file.rfilename, pattern) for pattern in patterns):
                    _download(place, str(about.sha), file.rfilename, file.lfs.size, file.lfs.sha256)
            return Path(snapshot_download(**wanted, tqdm_class=_hidden_bar()))  # the small files
        except HubError:
            raise
        except Exception as error:  # the client's transport has its own errors (httpx, httpx2), and disks fill up
            reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
            if isinstance(reason, errors.HfHubHTTPError):
                raise HubError(_refusal(reason, wanted)) from error
            problem = _first_line(reason or error)
            raise HubError(f"the download failed ({problem}); try again, the downloaded part is kept") from error


def _from_cache(wanted: dict[str, Any], problem: Exception) -> Path:
    """Return the cached folder if it is complete. Raises ``HubError`` for the ``problem`` with the hub otherwise."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except errors.HFValidationError as error:
        raise HubError("the hub does not allow such an id; one looks like openai-community/gpt2") from error
    except errors.LocalEntryNotFoundError:
        if isinstance(problem, errors.HfHubHTTPError):
            line = _refusal(problem, wanted)
        elif isinstance(problem, errors.OfflineModeIsEnabled):
            line = "it is not in the cache, and HF_HUB_OFFLINE forbids access to the hub; unset it, or give a folder"
        else:
            unreachable = f"{constants.ENDPOINT} cannot be reached ({_first_line(problem)})"
            line = f"it is not in the cache, and {unreachable}; connect to the internet, or give a folder"
        raise HubError(line) from problem


def _refusal(error: Any, wanted: dict[str, Any]) -> str:
    """Return the meaning of an ``HfHubHTTPError`` and the remedy."""
    from huggingface_hub import constants, errors

    name, kind = wanted["repo_id"], wanted["repo_type"]
    if isinstance(error, errors.GatedRepoError):  # first: it is also a RepositoryNotFoundError
        return f"access must be requested: accept the terms at {constants.ENDPOINT}/{name}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such {kind} on the hub; check the spelling, or if it is private, run `hf auth login`"
    if isinstance(error, errors.DisabledRepoError):
        return f"the hub has disabled this {kind}; use another source"
    status = error.response.status_code
    remedy = "check the spelling, or run `hf auth login`" if status in (401, 403, 404) else "try again later"
    return f"the hub answered with status {status}; {remedy}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


def _hidden_bar() -> Any:
    """Return a disabled progress bar: the client's counts files, and appears even if nothing is downloaded."""
    from huggingface_hub.utils import tqdm

    class HiddenBar(tqdm):
        def __init__(self, *rest: Any, **options: Any) -> None:
            super().__init__(*rest, **options | {"disable": True})

    return HiddenBar


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's warnings: a failure is reported once, in the exception."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _download(place: dict[str, str], commit: str, name: str, size: int, sha256: str) -> None:
    """Download a file of ``size`` bytes into the client's cache, unless it is there, with a progress bar on stderr.

    Raises ``HubError`` for other bytes than announced, and the client's own errors.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return  # not usable as a file name: leave the file to the client
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(**place)
    blob, lock = cache / folder / "blobs" / sha256, cache / ".locks" / folder / f"{sha256}.lock"
    if isinstance(try_to_load_from_cache(filename=name, revision=commit, **place), str):
        return
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the client's: another process may be downloading the same file
        if blob.exists():
            return
        part = blob.with_name(f"{sha256}.incomplete")
        with part.open("ab") as stream:
            if stream.tell() > size:
                stream.truncate(0)
            url, headers = hf_hub_url(filename=name, revision=commit, **place), build_hf_headers()
            options: dict[str, Any] = {"resume_size": stream.tell(), "expected_size": size, "displayed_filename": name}
            http_get(url, stream, headers=headers, **options)
        if (found := sha256_of(part)) != sha256:
            part.unlink()
            raise HubError(f"{name} is damaged: expected sha256 {sha256[:12]}…, found {found[:12]}…; try again")
        fsync(part)  # or a loss of power could leave an empty file with the name that means it is whole
        os.replace(part, blob)
