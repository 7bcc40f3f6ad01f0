"""Where a model is: a folder on this machine, or one fetched from the Hugging Face hub into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlx_gpt.errors import ModelFolderError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # gpt2, openai-community/gpt2

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


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The model folder called ``name``: an existing folder, or else the hub repository with this id, downloaded.

    ``revision`` is a branch, tag or commit on the hub. A ``Path`` is never taken for a hub id. Raises
    ``ModelFolderError``.
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
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=NEEDED))
    except errors.GatedRepoError as error:  # first: it is also a RepositoryNotFoundError
        trouble = f"access must be asked for: accept the terms at {_site()}/{name}, then run `hf auth login`"
        raise _not_had(name, trouble) from error
    except errors.RevisionNotFoundError as error:
        raise _not_had(name, f"the hub has it, but no revision {revision!r}; leave it out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        trouble = "no such model on the hub; check the spelling, or if it is private, run `hf auth login`"
        raise _not_had(name, trouble) from error
    except errors.LocalEntryNotFoundError as error:  # the hub could not be asked, and the cache has not all of it
        raise _not_had(name, f"it is not in the cache, and {_why_unreachable(error)}") from error
    except errors.HFValidationError as error:
        raise _not_had(name, "the hub does not allow such an id; one looks like openai-community/gpt2") from error
    except errors.HfHubHTTPError as error:
        raise _not_had(name, _answer(error.response.status_code)) from error
    except Exception as error:  # the client's transport has its own errors (httpx, httpx2), and disks fill up
        first_line = (str(error).splitlines() or [""])[0]
        trouble = f"the download failed ({type(error).__name__}: {first_line}); try again, what has come is kept"
        raise _not_had(name, trouble) from error


def _not_had(name: str, trouble: str) -> ModelFolderError:
    return ModelFolderError(f"{name}: no such folder here, and from the hub: {trouble}")


def _why_unreachable(error: Exception) -> str:
    response = getattr(error.__cause__, "response", None)
    if response is not None:
        return _answer(response.status_code)
    if type(error.__cause__).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE forbids to ask the hub; unset it, or give a folder"
    return f"{_site()} cannot be reached; connect to the internet, or give a folder"


def _answer(status: int) -> str:
    remedy = "check the spelling, or run `hf auth login`" if status in (401, 403, 404) else "try again later"
    return f"the hub answered with status {status}; {remedy}"


def _site() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
