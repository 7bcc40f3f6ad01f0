"""Files of the Hugging Face hub, fetched into its client's cache.

The hub's client (huggingface_hub 2, ``file_download.py``) goes on after a lost connection, but throws away what has
come when the program ends. So here a large file grows in the client's cache under the name ``SHA256.incomplete``, and
gets its own name, by which the client finds it, when its bytes have the sha256 that the hub announced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_gpt.errors import HubError
from mlx_gpt.files import sha256_of

PATIENCE = 10  # seconds for the hub to begin to answer


def fetch(name: str, patterns: Sequence[str], revision: str | None = None, kind: str = "model") -> Path:
    """The files of these patterns, of a model or dataset on the hub, as a folder in the client's cache.

    The hub is asked what is the newest, and only what is not in the cache is downloaded; if the hub cannot be asked,
    what is in the cache will do. Raises ``HubError``: what was the trouble, and what to do.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    wanted: dict[str, Any] = {"repo_id": name, "repo_type": kind, "revision": revision, "allow_patterns": patterns}
    with _no_chatter():
        try:
            about = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True, timeout=PATIENCE)
        except errors.RevisionNotFoundError as error:
            raise HubError(f"the hub has it, but no revision {revision!r}; leave it out for the newest") from error
        except Exception as error:
            return _from_the_cache(wanted, error)
        try:
            for file in getattr(about, "siblings", None) or ():
                if file.lfs and any(fnmatch(file.rfilename, pattern) for pattern in patterns):
                    download(LargeFile(name, kind, str(about.sha), file.rfilename, file.lfs.size, file.lfs.sha256))
            return Path(snapshot_download(**wanted, tqdm_class=_no_bar()))  # what is left is small
        except HubError:
            raise
        except Exception as error:  # the client's transport has its own errors (httpx, httpx2), and disks fill up
            reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
            if isinstance(reason, errors.HfHubHTTPError):
                raise HubError(_refused(reason, wanted)) from error
            trouble = _line(reason or error)
            raise HubError(f"the download failed ({trouble}); try again, what has come is kept") from error


def _from_the_cache(wanted: dict[str, Any], trouble: Exception) -> Path:
    """What is in the cache, if all of it is. Raises ``HubError`` for the trouble with the hub."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except errors.HFValidationError as error:
        raise HubError("the hub does not allow such an id; one looks like openai-community/gpt2") from error
    except errors.LocalEntryNotFoundError:
        if isinstance(trouble, errors.HfHubHTTPError):
            line = _refused(trouble, wanted)
        elif isinstance(trouble, errors.OfflineModeIsEnabled):
            line = "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; unset it, or give a folder"
        else:
            unreachable = f"{constants.ENDPOINT} cannot be reached ({_line(trouble)})"
            line = f"it is not in the cache, and {unreachable}; connect to the internet, or give a folder"
        raise HubError(line) from trouble


def _refused(error: Any, wanted: dict[str, Any]) -> str:
    """What the hub's answer means, and what to do: ``error`` is an ``HfHubHTTPError``."""
    from huggingface_hub import constants, errors

    name, kind = wanted["repo_id"], wanted["repo_type"]
    if isinstance(error, errors.GatedRepoError):  # first: it is also a RepositoryNotFoundError
        return f"access must be asked for: accept the terms at {constants.ENDPOINT}/{name}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such {kind} on the hub; check the spelling, or if it is private, run `hf auth login`"
    if isinstance(error, errors.DisabledRepoError):
        return f"the hub has shut this {kind}; take it from elsewhere"
    status = error.response.status_code
    remedy = "check the spelling, or run `hf auth login`" if status in (401, 403, 404) else "try again later"
    return f"the hub answered with status {status}; {remedy}"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")


def _no_bar() -> Any:
    """A progress bar that is not seen: the client's counts files, and comes also where nothing is fetched."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *rest: Any, **options: Any) -> None:
            super().__init__(*rest, **options | {"disable": True})

    return NoBar


@contextmanager
def _no_chatter() -> Iterator[None]:
    """The client says nothing of its own but the progress bars: what goes wrong is told once, in the error."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
        if (found := sha256_of(part)) != file.sha256:
            part.unlink()
            raise HubError(
                f"{file.name} came damaged: expected sha256 {file.sha256[:12]}…, found {found[:12]}…; try again"
            )
        os.replace(part, blob)
