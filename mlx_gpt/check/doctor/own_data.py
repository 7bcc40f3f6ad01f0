"""The arguments of ``examine`` about the text that a model of this package was trained on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_gpt.errors import DataError
from mlx_gpt.files import expand_user, parse_json, read_small
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import MAX_SMALL, PROGRESS, list_checkpoints
from mlx_gpt.store.run_file import RunSettings
from mlx_gpt.text.corpora import CORPORA, GeneratedCorpus
from mlx_gpt.text.dataset import BEST, Dataset, load_dataset
from mlx_gpt.text.pipes import is_pipe
from mlx_gpt.text.prepare import (
    OnProgress,
    Prepared,
    cached_folder,
    is_prepared,
    open_prepared,
    prepare_text,
)
from mlx_gpt.text.records import TEXT
from mlx_gpt.text.sources import Sources, find_sources
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.windows import endless_batches
from mlx_gpt.train.config import TrainConfig

Arguments = dict[str, Any]
MOST_TEXT = 2_000_000  # characters of the training text


def data_of(run: Path) -> str | None:
    """Return the hash of the text that a run was trained on, or None if no checkpoint has it."""
    for checkpoint in list_checkpoints(run):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(parse_json(read_small(checkpoint / PROGRESS, MAX_SMALL))["data"])
    return None


def read_data(of_model: Tokenizer, settings: RunSettings, data: str | None, folder: Path) -> Dataset | None:
    """Return the text that is named or that the run was trained on, encoded; None without one.

    It is encoded in ``folder`` if the user's cache does not have it. Raises ``MLXGPTError``.
    """
    name = data if data is not None else settings.get("data")
    if name is None:
        return None
    if data is None and is_pipe(name):
        raise DataError(f"{name}: was read from a pipe; give the text with --data")

    def prepare(sources: Sources, tokenizer: str | Tokenizer, on_progress: OnProgress | None) -> Prepared:
        for spec in (tokenizer, settings.get("tokenizer", tokenizer)):  # a run's may be named, such as bpe:1000
            with suppress(DataError):
                prepared = open_prepared(cached_folder(sources, spec))
                if prepared.tokenizer.hash == of_model.hash:
                    return prepared
        return prepare_text(sources, tokenizer, folder / "text", on_progress)

    return load_dataset(name, of_model, None, *text_settings(settings, data), prepare)


def text_settings(settings: RunSettings, data: str | None) -> tuple[str | None, str]:
    """Return the name of the run's validation text, and the field of its records; defaults for other ``data``."""
    own = settings if data is None else {}
    return own.get("val_data"), own.get("field", TEXT)


def of_data(dataset: Dataset, model: GPT, settings: RunSettings) -> Arguments:
    """Return the ids of a text, batches as in training, and ``best_loss``, which is known of a generated corpus."""
    config, T = TrainConfig.of(settings), model.config.n_positions
    arguments: Arguments = {"train_ids": dataset.train.ids, "val_ids": dataset.val.ids}
    arguments["best_loss"] = dataset.baselines.get(BEST)
    if dataset.train.n_tokens >= T:
        arguments["batches"] = lambda: endless_batches(dataset.train, T, config.batch_size, config.seed)
    return arguments


def beginning(name: str, val_data: str | None, field: str) -> Arguments:
    """Return the beginning of a training text in files, with ``<|endoftext|>`` between documents."""
    if is_prepared(expand_user(name)) or isinstance(CORPORA.get(name), GeneratedCorpus):
        return {}
    pieces = (piece for piece in find_sources([name], val_data=val_data, text_field=field).pieces() if not piece.val)
    text = ""
    for piece in pieces:
        text += (EOT if piece.starts and text else "") + piece.text[:MOST_TEXT]
        if len(text) > MOST_TEXT:
            break
    return {"train_text": text}
