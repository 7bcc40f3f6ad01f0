"""The codes of findings, by group, in the order in which to repair what they name."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "contract": ("raises", "wrong-shape", "non-finite", "changes-input", "too-slow"),
    "state": ("depends-on-earlier-calls", "not-deterministic", "training-mode-without-dropout-effect"),
    "causality": (
        "batch-leak",
        "row-alone-differs",
        "future-leak",
        "future-leak-in-training",
        "future-leak-in-gradient",
        "past-ignored",
    ),
    "inputs": ("token-blind", "position-blind", "context-too-short", "length-dependent"),
    "weights": (
        "heads-mixed-up",
        "residual-after-norm",
        "layer-without-effect",
        "head-not-tied",
        "reload-differs",
        "identical-heads",
        "dead-units",
        "precision-loss",
    ),
    "targets and data": (
        "mis-decoded-text",
        "tokenizer-not-invertible",
        "tokenizers-differ",
        "vocabulary-mismatch",
        "ids-wrapped",
        "ids-outside-vocabulary",
        "targets-not-shifted",
        "targets-shifted-twice",
        "same-batch-again",
        "validation-in-training",
        "end-of-text-never-learned",
        "corpus-repeats",
        "corpus-too-small",
    ),
    "optimisation": (
        "loss-not-cross-entropy",
        "loss-not-the-mean",
        "initial-loss-off",
        "step-without-effect",
        "parameters-frozen",
        "accumulation-differs",
        "no-bias-correction",
        "learning-rate-too-high",
        "learning-rate-too-low",
        "cannot-memorise-a-batch",
    ),
    "cache": ("cache-mismatch",),
    "sampling": (
        "prompt-changed",
        "id-outside-vocabulary",
        "probabilities-as-logits",
        "sampler-too-narrow",
        "prompt-ignored",
        "draws-correlated",
        "sampler-not-the-model",
        "setting-ignored",
        "setting-inverted",
        "setting-wrong",
        "penalty-rewards-repetition",
        "penalty-compounds",
        "padding-differs",
        "beyond-context",
    ),
    "level": (
        "reported-loss-differs",
        "samples-worse-than-loss",
        "overfitted",
        "undertrained",
        "as-good-as-its-loss",
        "repetition-loop",
    ),
}
ORDER = {code: place for place, code in enumerate(code for codes in GROUPS.values() for code in codes)}
WARNINGS = {
    "undertrained",
    "overfitted",
    "too-slow",
    "corpus-too-small",
    "identical-heads",
    "dead-units",
    "precision-loss",
}
NOTES = {"training-mode-without-dropout-effect", "as-good-as-its-loss", "repetition-loop"}
RESTS_ON = {"as-good-as-its-loss": "sampling"}  # code -> group: reported only if no check of the group lacked time
# The order of examination: the data, for which the model is not called; the level of loss and text; the cheap exact
# properties; then the checks that draw samples, and last those that make training steps.
EXAMINED = ["contract", "state", "targets and data", "level", "causality", "inputs", "cache", "weights", "sampling"]
EXAMINED += ["optimisation"]


def severity_of(code: str) -> str:
    return "warning" if code in WARNINGS else "note" if code in NOTES else "fault"


def group_of(code: str) -> str:
    return next(group for group, codes in GROUPS.items() if code in codes)
