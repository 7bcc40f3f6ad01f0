"""What of a text makes the difference: activations of it, put into a corrupted text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_gpt.errors import UsageError
from mlx_gpt.lens.components import find_component
from mlx_gpt.lens.gradients import Metric, logit_difference
from mlx_gpt.lens.names import ActivationNames
from mlx_gpt.lens.patching import activation_patching, attribution_patching
from mlx_gpt.lens.paths import path_patching
from mlx_gpt.lens.views.subject import Subject, numbers
from mlx_gpt.lens.views.view import POSITION, Array, Table, View
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
    contrast = Contrast.of(subject, corrupted, answer, wrong)
    if path:
        tables, reading = [path_table(contrast, path)], path_reading(contrast, path)
    else:
        tables = [positions_table(contrast, part, estimate), heads_table(contrast, estimate)]
        reading = (
            "The corrupted text is run with one activation from the text; a cell is how much that changes the "
            f"difference of two logits after the last token, {contrast.names}, in logits"
            f"{', estimated by gradients' if estimate else ''}. To restore all of it takes "
            f"{contrast.difference - contrast.base:+.3f}."
        )
    remark = f"The difference is {contrast.difference:+.3f} in the text and {contrast.base:+.3f} in the corrupted one."
    return View(f"{'path ' if path else ''}patching of {contrast.names}", reading, tables, [remark])


@dataclass(frozen=True)
class Contrast:
    """A text, a corrupted one of as many tokens, and a difference of two logits that is measured in both."""

    clean: Subject
    corrupted: Subject
    names: str
    """of the two tokens"""
    metric: Metric
    difference: float
    base: float
    """the difference in the corrupted text"""

    @classmethod
    def of(cls, clean: Subject, ids: Sequence[int], answer: str | None, wrong: str | None) -> Contrast:
        """Return the contrast of a text with another, ids (T,); by default of the most probable next token of each."""
        corrupted = replace(clean, ids=ids)
        if len(ids) != len(clean.ids):
            raise UsageError(
                f"the corrupted text must have as many tokens as the text, {len(clean.ids)}, not {len(ids)}: "
                f"{' '.join(clean.labels(clean.ids[:40]))} | {' '.join(clean.labels(ids[:40]))}"
            )
        given = clean.token(answer, "--answer"), clean.token(wrong, "--wrong")
        right, other = (
            side.likely()[0] if token is None else token for side, token in zip((clean, corrupted), given, strict=True)
        )
        names = clean.labels([right, other])
        if right == other:
            raise UsageError(
                f"answer and wrong answer are the same token, {names[0]}; give two with --answer and --wrong, such as "
                f"{' and '.join(repr(clean.tokenizer.decode([i])) for i in clean.likely()[:2])}"
            )
        metric = logit_difference(right, other)
        values = (float(numbers(metric(side.trace()[0]))) for side in (clean, corrupted))
        return cls(clean, corrupted, " − ".join(names), metric, *values)

    def effects(self, name: str, over: str, estimate: bool) -> Array:
        """Return the change of the difference for each layer and what ``over`` counts."""
        run = attribution_patching if estimate else activation_patching
        ids, edits = (self.clean.tokens, self.corrupted.tokens), self.clean.edits
        found = run(self.clean.model, *ids, self.metric, name, (over,), edits=edits)
        return numbers(found) - (0 if estimate else self.base)


def positions_table(contrast: Contrast, part: str, estimate: bool) -> Table:
    """Return the effect of a part by layer and position; where the texts differ, both tokens name it."""
    effects = contrast.effects(f"hook_{part}", "position", estimate)
    names = [
        name if clean == other else f"{name}|{other}"
        for name, clean, other in zip(
            contrast.clean.positions,
            *(side.labels(side.ids) for side in (contrast.clean, contrast.corrupted)),
            strict=True,
        )
    ]
    title = f"{part} of each layer at each position"
    return Table(title, layer_names(effects), names, effects, ("layer", POSITION), format="{:+.2f}")


def heads_table(contrast: Contrast, estimate: bool) -> Table:
    """Return the effect of each head at all positions."""
    effects = contrast.effects("attn.hook_z", "head", estimate)
    columns = [f"H{h}" for h in range(effects.shape[1])]
    return Table("heads, at all positions", layer_names(effects), columns, effects, ("layer", "head"), format="{:+.2f}")


def layer_names(effects: Array) -> list[str]:
    return [f"L{l}" for l in range(len(effects))]


def path_table(contrast: Contrast, path: tuple[str, str]) -> Table:
    """Return the effect of one component on the inputs of another."""
    model = contrast.clean.model
    (sending, head), (receiving, reader) = (end_of_path(model, name) for name in path)
    order = ActivationNames(model.config).stored.index
    if sending == "hook_unembed" or (receiving != "hook_unembed" and order(sending) >= order(receiving)):
        raise UsageError(f"{path[1]} does not read {path[0]}: a path leads to a later layer, or from a head to its MLP")
    receivers = {"input": receiving.replace("hook_mlp_out", "mlp.hook_pre")}
    if reader is not None:
        receivers = {
            inputs: receiving.replace("hook_z", f"hook_{inputs[0]}") for inputs in ("queries", "keys", "values")
        }

    def effect(receiver: str) -> float:
        ids, ends = (contrast.corrupted.tokens, contrast.clean.tokens), ((sending, head), (receiver, reader))
        return float(numbers(path_patching(model, *ids, *ends, contrast.metric, edits=contrast.clean.edits)))

    effects = np.array([[effect(receiver) - contrast.base for receiver in receivers.values()]])
    title = " to ".join(path)
    return Table(title, [title], list(receivers), effects, ("path", "input"), format="{:+.3f}")


def path_reading(contrast: Contrast, path: tuple[str, str]) -> str:
    return (
        f"The corrupted text is run, but {path[1]} reads {path[0]} as it is in the text, while other heads and MLPs "
        "stay; a cell is how much that changes the difference of two logits after the last token, "
        f"{contrast.names}, in logits."
    )


def end_of_path(model: GPT, name: str) -> tuple[str, int | None]:
    """Return what a name means as the beginning or end of a path."""
    found = {"embed": ("hook_embed", None), "logits": ("hook_unembed", None)}.get(name) or find_component(model, name)
    if not found[0].endswith(("hook_z", "hook_mlp_out", "hook_embed", "hook_unembed")) or "*" in found[0]:
        raise UsageError(f"a path leads between heads (L3H1), MLPs (L3MLP), embed and logits, not {name!r}")
    return found
