"""Where a model is: a folder on this machine, or one fetched from the Hugging Face hub into its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_gpt.errors import HubError, ModelFolderError
from mlx_gpt.store.download import LargeFile, download
from mlx_gpt.store.tensors import has_safetensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # gpt2, openai-community/gpt2
PATIENCE = 10  # seconds for the hub to begin to answer

# Only what is read: the gpt2 repository also holds its weights for TensorFlow, Flax, Rust and ONNX.
NEEDED = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def find_folder(name: str | os.PathLike[str], revision: str | None = None, pickles: bool = False) -> Path:
    """The model folder called ``name``: an existing folder, or else the hub repository with this id, downloaded.

    ``revision`` is a branch, tag or commit on the hub. ``pickles``: where the hub has no safetensors, they are fetched
    instead. A ``Path`` is never taken for a hub id. Raises ``ModelFolderError``.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelFolderError(
                f"{path}: a revision ({revision!r}) names a version on the hub, but this is a folder here; leave it out"
            )
        return path
    if path.exists():
        raise ModelFolderError(f"{path}: expected a model folder, found a file; give the folder it lies in")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ModelFolderError(
            f"{name}: no such folder, and not a hub id either, which looks like gpt2 or openai-community/gpt2"
        )
    try:
        folder = fetch(name, NEEDED, revision)
        if pickles and not has_safetensors(folder):
            folder = fetch(name, PICKLES, revision)
    except HubError as error:
        raise ModelFolderError(f"{name}: no such folder here, and from the hub: {error}") from error
    if not (folder / "config.json").exists():
        raise ModelFolderError(
            f"{name}: the hub has it, but without a config.json: no model as transformers keeps them"
        )
    if not pickles and not has_safetensors(folder):
        raise ModelFolderError(
            f"{name}: the hub has it, but not as safetensors; if it has a pickle, which can run code when opened, then "
            f"with torch installed make a model folder of it: mlx-gpt convert {name} DEST"
        )
    return folder


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
