"""The arguments of ``examine`` for a model of this package: its functions, and the run that it is from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt.check.doctor.arguments import rows_of
from mlx_gpt.check.doctor.arrays import as_numpy
from mlx_gpt.check.doctor.own_data import beginning, data_of, of_data, read_data, text_settings
from mlx_gpt.device import on_cpu
from mlx_gpt.errors import MLXGPTError
from mlx_gpt.generate.decoder import Decoder
from mlx_gpt.generate.generation import generate_tokens
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.batch import Batch
from mlx_gpt.serve.row import Row
from mlx_gpt.store.checkpoint import CHECKPOINTS, METRICS, list_checkpoints, newest_checkpoint
from mlx_gpt.store.folder import load_source, read_model, save
from mlx_gpt.store.huggingface import WEIGHTS
from mlx_gpt.store.layouts import read_source
from mlx_gpt.store.run_file import RUN_FILE, read_run_file
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.gradient import make_loss_and_gradient
from mlx_gpt.train.loss import batch_loss
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

Arguments = dict[str, Any]
Note = Callable[[str], None]
SETTINGS = {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty"}
SETTINGS |= {"presence_penalty", "no_repeat_ngram"}
MOST_RELOADED = 1 << 30  # bytes of a model that is saved and loaded again


@contextmanager
def own_arguments(path: Path, data: str | None, note: Note) -> Iterator[Arguments]:
    """Yield the arguments for a run's folder, or for a folder or file of weights.

    ``data`` names the text, in place of the run's own. ``note`` is called with what cannot be used of the run. Nothing
    is written but temporary files, removed at the end. Raises ``MLXGPTError``.
    """
    path = path.parent if path.name == WEIGHTS else path
    run = run_of(path)
    settings = read_run_file(run / RUN_FILE) if run and (run / RUN_FILE).exists() else {}
    if run == path and not (run / WEIGHTS).exists() and list_checkpoints(run):
        path = newest_checkpoint(run, note)  # stopped before it had a best model
    source = read_source(path)
    model, tokenizer = load_source(source)
    arguments = of_model(model, tokenizer)
    whole = source.quantization is None and tokenizer.vocab_size == model.config.vocab_size
    if settings and whole:
        arguments |= of_training(model, TrainConfig.of(settings))
    arguments |= of_metrics(run, path) if run else {}
    with TemporaryDirectory(prefix="mlx_gpt-") as folder:
        if whole:
            arguments |= of_weights(model, tokenizer, folder)
        try:
            dataset = read_data(tokenizer, settings, data, Path(folder))
        except MLXGPTError as error:
            if data is not None:
                raise
            note(f"the text of the run cannot be used, and checks that need it are left out: {error}")
            dataset = None
        if dataset:
            arguments |= of_data(dataset, model, settings) | beginning(dataset.name, *text_settings(settings, data))
            trained_on = data_of(run) if run else None
            if dataset.hash != trained_on and (data is not None or trained_on):
                arguments.pop("val_loss", None)
                if data is None:
                    note(f"{settings['data']} has changed since the run, so its validation loss is not compared")
        with uncompiled():
            yield arguments


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run MLX's functions without compilation on a CPU, where compiling takes longer than all the checks."""
    if not on_cpu():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that a model is from: its own, or that of the run which a checkpoint is in."""
    folders = [path, path.parent.parent] if path.parent.name == CHECKPOINTS else [path]
    return next((folder for folder in folders if any((folder / name).exists() for name in (RUN_FILE, METRICS))), None)


class KnownIds(nn.Module):
    """A model without the logits of ids that its tokenizer lacks: padding, which is never generated."""

    def __init__(self, model: GPT, n: int):
        super().__init__()
        self.model, self.n = model, n

    def __call__(self, ids: Any) -> mx.array:
        return self.model(ids)[..., : self.n]


def of_model(model: GPT, tokenizer: Tokenizer) -> Arguments:
    """Return the model's forward pass, sampler, cache and tokenizer. Drawn texts repeat in each examination."""
    seeds, n_ids = count(), tokenizer.vocab_size

    def sample(ids: list[int], n: int, **settings: Any) -> list[int]:
        more = {"max_tokens": n, "ignore_eos": True, "seed": next(seeds), "temperature": 1.0}
        return list(generate_tokens(model, tokenizer, ids, **{**more, **settings}))

    def sample_many(prompts: list[list[int]], n: int, **settings: Any) -> list[list[int]]:
        chosen = GenerationSettings(**{"max_tokens": n, "ignore_eos": True, "temperature": 1.0, **settings})
        first, batch = next(seeds), Batch(model, tokenizer)
        rows = [Row(tokenizer, model.config.n_positions, ids, chosen, first, i) for i, ids in enumerate(prompts)]
        texts: list[list[int]] = [[] for _ in rows]
        batch.add(rows)
        while batch.rows:
            for row, token in batch.turn():
                if not row.reason:
                    texts[row.index].append(token.id)
                    row.push(token)
            batch.keep([row for row in rows if not row.reason])
        return texts

    def cached(ids: list[int], n_prompt: int) -> np.ndarray:
        decoder = Decoder(model)
        last = decoder.prefill(mx.array([ids[:n_prompt]]))
        prompt = as_numpy(model(mx.array([ids[:n_prompt]])))[0, :-1]
        steps = [as_numpy(decoder.step(mx.array([[i]])))[0] for i in ids[n_prompt:]]
        return np.concatenate([prompt, as_numpy(last), *steps])[:, :n_ids]

    return {
        "forward": model if n_ids == model.config.vocab_size else KnownIds(model, n_ids),
        "vocab_size": n_ids,
        "n_positions": model.config.n_positions,
        "sample": sample,
        "sample_many": sample_many,
        "sample_settings": SETTINGS,
        "cached": cached,
        "encode": lambda text: tokenizer.encode_documents(text, allow_special=True),
        "encode_training": lambda text: tokenizer.encode_batch([text])[0],
        "decode": tokenizer.decode,
        "end_of_text": tokenizer.eot_id,
    }


def of_weights(model: GPT, tokenizer: Tokenizer, folder: str) -> Arguments:
    """Return the loss, its gradient, and ``reload``, which saves the model in ``folder`` and loads it again."""
    loss_and_gradient = make_loss_and_gradient(model, TrainConfig())

    def loss(x: np.ndarray, y: np.ndarray) -> float:
        model.eval()
        return float(batch_loss(model, model.hidden(mx.array(x)), mx.array(y)).item())  # type: ignore[arg-type]

    def gradient(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        model.eval()
        _, gradients = loss_and_gradient(mx.array(x), mx.array(y))
        return {name: as_numpy(part) for name, part in dict(tree_flatten(gradients)).items()}

    def reload() -> GPT:
        saved = mkdtemp(dir=folder)
        save(model, tokenizer, saved)
        return read_model(saved)

    small = 4 * model.n_parameters < MOST_RELOADED
    return {"loss": loss, "gradient": gradient, **({"reload": reload} if small else {})}


def of_training(model: GPT, config: TrainConfig) -> Arguments:
    """Return the run's own training step, at its highest learning rate."""

    def new_step() -> Callable[[np.ndarray, np.ndarray], float]:
        optimizer = make_optimizer(config, model.config.n_head)
        steps: dict[int, Any] = {}  # by the number of rows, which a step is compiled for

        def step(x: np.ndarray, y: np.ndarray) -> float:
            if (B := len(x)) not in steps:
                steps[B], _ = make_train_step(model, optimizer, replace(config, batch_size=B, accumulate=1))
            model.train()
            loss, _ = steps[B](mx.array(x), mx.array(y))
            mx.eval(model.state, optimizer.state, loss)
            model.eval()
            return float(loss.item())

        return step

    return {"step": new_step(), "new_step": new_step, "learning_rate": config.learning_rate}


def of_metrics(run: Path, path: Path) -> Arguments:
    """Return the metrics of a run, and for its best model the lowest validation loss; a checkpoint's is not known."""
    file = run / METRICS
    if not file.exists() or not file.stat().st_size:
        return {}
    arguments: Arguments = {"metrics": rows_of(file)}
    losses = [row["val_loss"] for row in arguments["metrics"] if row.get("val_loss") is not None]
    return arguments | ({"val_loss": min(losses)} if losses and path == run else {})
