"""The text that the model generates, with and without edits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_gpt.errors import one_line
from mlx_gpt.lens.generation import generate
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import Table, View


def generated(subject: Subject, n: int, without: str) -> View:
    """Show the n most probable next tokens in turn, as the model is and under the subject's edits."""
    sides = {"as it is": replace(subject, edits={})} | ({f"without {without}": subject} if subject.edits else {})
    end_id = next(iter(subject.tokenizer.end_ids), None)
    values, texts, remarks = [], [], []
    for name, side in sides.items():
        new = generate(side.model, side.tokens, n, edits=side.edits, end_id=end_id)  # (1, n)
        ids = [int(i) for i in np.array(new[0])]
        whole = replace(side, ids=[*side.ids, *ids[:-1]])  # the last is not read
        logprobs = whole.trace()[0][:, -len(ids) :].astype(mx.float32)
        logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, new[..., None], axis=-1)[0, :, 0]
        values.append([*np.exp(numbers(chosen)), *[np.nan] * (n - len(ids))])
        texts.append([*side.labels(ids), *[""] * (n - len(ids))])
        remarks.append(f"{name}: {one_line(side.tokenizer.decode(ids).strip())}")
    columns = [str(i + 1) for i in range(n)]
    title = "continuation at temperature 0, and the probability of each token"
    table = Table(title, list(sides), columns, np.array(values), ("", "token"), texts, scale="share")
    return View("generated text", "", [table], remarks)
