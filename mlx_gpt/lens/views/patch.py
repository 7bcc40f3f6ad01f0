"""What of a text makes the difference: activations of it, put into a corrupted text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.components import find_component
from mlx_gpt.lens.gradients import Metric, logit_difference
from mlx_gpt.lens.names import ActivationNames
from mlx_gpt.lens.patching import activation_patching, attribution_patching
from mlx_gpt.lens.paths import path_patching
from mlx_gpt.lens.trace import trace
from mlx_gpt.lens.views.subject import Subject, numbers, one_token
from mlx_gpt.lens.views.view import POSITION, Table, View
from mlx_gpt.model.gpt import GPT

PARTS = ("resid_pre", "attn_out", "mlp_out")


def patch(
    subject: Subject,
    corrupted: Sequence[int],
    answer: str | None = None,
    wrong: str | None = None,
    part: str = "resid_pre",
    path: tuple[str, str] | None = None,
    estimate: bool = False,
) -> View:
    """Show how much of a difference of two logits each activation of the text restores in a corrupted text.

    By layer and position for ``part``, a name in ``PARTS``, and by head; or with ``path`` for one component as another
    reads it. ``estimate`` takes gradients instead of a run for each. The default tokens are the most probable next one
    of each text.
    """
    if part not in PARTS:
        raise UsageError(f"what is patched is one of {', '.join(PARTS)}, not {part!r}")
    if path and estimate:
        raise UsageError("a path is not estimated; leave out one of the two")
    other = Subject(subject.model, subject.tokenizer, corrupted, subject.edits)
    if len(corrupted) != len(subject.ids):
        raise UsageError(
            f"the corrupted text must have as many tokens as the text, {len(subject.ids)}, not {len(corrupted)}: "
            f"{' '.join(subject.labels(subject.ids[:40]))} | {' '.join(other.labels(corrupted[:40]))}"
        )
    answer_id, wrong_id = pair(subject, other, answer, wrong)
    metric = logit_difference(answer_id, wrong_id)
    clean, base = (float(numbers(metric(side.trace()[0]))) for side in (subject, other))
    names = " − ".join(subject.labels([answer_id, wrong_id]))
    remarks = [f"The difference is {clean:+.3f} in the text and {base:+.3f} in the corrupted one."]
    if path:
        table, reading = path_table(subject, other, path, metric, base, names)
        return View(f"path patching of {names}", reading, [table], remarks)

    def effects(name: str, over: str) -> np.ndarray:
        run = attribution_patching if estimate else activation_patching
        found = run(subject.model, subject.tokens, other.tokens, metric, name, (over,), edits=subject.edits)
        return numbers(found) - (0 if estimate else base)

    L, H = subject.model.config.n_layer, subject.model.config.n_head
    layers = [f"L{l}" for l in range(L)]
    positions = [
        name if a == b else f"{name}|{other.labels([b])[0]}"
        for name, a, b in zip(subject.positions, subject.ids, corrupted, strict=True)
    ]
    tables = [
        Table(
            f"{part} of each layer at each position",
            layers,
            positions,
            effects(f"hook_{part}", "position"),
            ("layer", POSITION),
            format="{:+.2f}",
        ),
        Table(
            "heads, at all positions",
            layers,
            [f"H{h}" for h in range(H)],
            effects("attn.hook_z", "head"),
            ("layer", "head"),
            format="{:+.2f}",
        ),
    ]
    reading = (
        f"The corrupted text is run with one activation from the text; a cell is how much that changes the difference "
        f"of two logits after the last token, {names}, in logits"
        f"{', estimated by gradients' if estimate else ''}. To restore all of it takes {clean - base:+.3f}."
    )
    return View(f"patching of {names}", reading, tables, remarks)


def pair(subject: Subject, other: Subject, answer: str | None, wrong: str | None) -> tuple[int, int]:
    """Return the ids of the tokens to compare: by default the most probable next one of each text."""

    def choose(side: Subject, text: str | None, flag: str) -> int:
        if text is not None:
            return one_token(side.tokenizer, text, flag)
        return int(numbers(trace(side.model, side.tokens, names=())[0][0, -1]).argmax())

    found = choose(subject, answer, "--answer"), choose(other, wrong, "--wrong")
    if found[0] == found[1]:
        raise UsageError(
            f"answer and wrong answer are the same token, {subject.labels(found[:1])[0]}; give two with --answer and "
            "--wrong"
        )
    return found


def path_table(
    subject: Subject, other: Subject, path: tuple[str, str], metric: Metric, base: float, names: str
) -> tuple[Table, str]:
    """Return a table of the effect of one component on the inputs of another, and how to read it."""
    (sending, head), (receiving, reader) = (end_of_path(subject.model, name) for name in path)
    order = ActivationNames(subject.model.config).stored.index
    if sending == "hook_unembed" or (receiving != "hook_unembed" and order(sending) >= order(receiving)):
        raise UsageError(f"{path[1]} does not read {path[0]}: a path leads to a later layer, or from a head to its MLP")
    receivers = {"input": receiving.replace("hook_mlp_out", "mlp.hook_pre")}
    if reader is not None:
        receivers = {
            inputs: receiving.replace("hook_z", f"hook_{inputs[0]}") for inputs in ("queries", "keys", "values")
        }
    effects = [
        path_patching(
            subject.model, other.tokens, subject.tokens, (sending, head), (name, reader), metric, edits=subject.edits
        ).item()
        - base
        for name in receivers.values()
    ]
    reading = (
        f"The corrupted text is run, but {path[1]} reads {path[0]} as it is in the text, while other heads and MLPs "
        "stay; a cell is how much that changes the difference of two logits after the last token, "
        f"{names}, in logits."
    )
    title = f"{path[0]} to {path[1]}"
    return Table(title, [title], list(receivers), np.array([effects]), ("path", "input"), format="{:+.3f}"), reading


def end_of_path(model: GPT, name: str) -> tuple[str, int | None]:
    """Return what a name means as the beginning or end of a path."""
    found = {"embed": ("hook_embed", None), "logits": ("hook_unembed", None)}.get(name) or find_component(model, name)
    if not found[0].endswith(("hook_z", "hook_mlp_out", "hook_embed", "hook_unembed")) or "*" in found[0]:
        raise UsageError(f"a path leads between heads (L3H1), MLPs (L3MLP), embed and logits, not {name!r}")
    return found
