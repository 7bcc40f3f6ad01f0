"""The checks of draws and settings: each returns the finding for its code from the evidence they share."""

from __future__ import annotations

from contextlib import suppress

from mlx_gpt.check.doctor.case import BudgetSpent, Case
from mlx_gpt.check.doctor.checks import Found, NotApplicable, check
from mlx_gpt.check.doctor.probes import first_call, in_half_precision, largest
from mlx_gpt.check.doctor.sampling.cuts import cut_faults
from mlx_gpt.check.doctor.sampling.draws import accepted, changed_prompts, count, draw_many, outside, settings_off
from mlx_gpt.check.doctor.sampling.evidence import evidence
from mlx_gpt.check.doctor.sampling.penalty import penalty_faults
from mlx_gpt.check.doctor.sampling.probes import short_prompts, temperatures
from mlx_gpt.check.doctor.sampling.verdict import undecided, verdict

AFTER_SOFTMAX = (  # what a model that returns probabilities may also show
    "loss-not-cross-entropy",
    "cannot-memorise-a-batch",
    "learning-rate-too-low",
    "sampler-not-the-model",
    "prompt-ignored",
    "setting-ignored",
    "setting-wrong",
    "reported-loss-differs",
    "samples-worse-than-loss",
    "undertrained",
    "as-good-as-its-loss",
)
MOST = 3000  # draws of a sampler that is off by one


def of_verdict(case: Case, code: str) -> Found:
    decided = case.once(verdict)
    if code in decided.open:
        raise undecided(case)
    return decided.findings.get(code)


def of_settings(case: Case, code: str) -> Found:
    """Return the finding of a code about a setting: of the temperature, of the cuts, or of the repetition penalty."""
    if (known := case.once(verdict).findings.get(code)) is not None:
        return known
    left = set(case.once(verdict).open)
    with_penalty = "repetition_penalty" in accepted(case)
    for find in (cut_faults, penalty_faults) if with_penalty else (cut_faults,):
        findings, more = case.once(find)
        left |= more
        for name, fields in findings:
            if name == code:
                return fields
    if code in left:
        raise undecided(case)
    return None


@check("prompt-changed", "sample")
def prompt_changed(case: Case) -> Found:
    """The returned text begins with another prompt, or sample changes the caller's list of ids."""
    try:
        case.once(evidence)
    except NotApplicable:
        if not case.once(changed_prompts):
            raise
    changes = case.once(changed_prompts)
    if not changes:
        return None
    what, given, became = changes[0]
    common = min(len(given), len(became))
    place = next((i for i in range(common) if given[i] != became[i]), common)
    return {
        "measured": became[place : place + 16],
        "expected": given[place : place + 16],
        "why": f"sample changed {what}, from token {place} on",
        "remedy": "copy the prompt before appending to it, and return it whole",
        "evidence": {"times": len(changes)},
    }


@check("id-outside-vocabulary", "sample", explains=("sampler-not-the-model",))
def id_outside_vocabulary(case: Case) -> Found:
    """A drawn id is negative, or not below the size of the vocabulary."""
    draws = 0
    with suppress(NotApplicable):
        draws = sum(count(calls) for _, calls in case.once(evidence))
        draws += draws_of_the_last_id(case)
    bad = case.once(outside)
    if not bad:
        return None
    return {
        "measured": bad[0],
        "expected": f"0 to {case.vocab_size - 1}",
        "why": f"{len(bad)} drawn ids are not in the vocabulary, such as {bad[0]}",
        "remedy": "draw an index of the logits' last axis, cut padded ones off, and look for logits that are NaN",
        "evidence": {"draws": draws + len(bad), "ids": sorted(set(bad))[:8]},
    }


def draws_of_the_last_id(case: Case) -> int:
    """Draw as uniformly as the settings allow until the last id has probably come, where ids are off by one."""
    base = case.once(verdict).base
    if base is None or not base.shift or case.once(outside):
        return 0
    flat = {"temperature": case.once(temperatures)[-1].item()} if "temperature" in accepted(case) else {}
    with suppress(BudgetSpent):
        return count(
            draw_many(case, case.once(short_prompts), min(5 * case.vocab_size, MOST), **settings_off(case, **flat))
        )
    return 0


@check("sampler-too-narrow", "sample")
def sampler_too_narrow(case: Case) -> Found:
    """Every token is the most probable one, though greedy decoding was not asked for.

    Exact: with all settings off every draw is the argmax, which would have a probability below e^-20 = 2e-9.
    """
    return of_verdict(case, "sampler-too-narrow")


@check("probabilities-as-logits", "forward")
def probabilities_as_logits(case: Case) -> Found:
    """The text is almost random, since the softmax is applied twice.

    Forward must not return probabilities: values of which none is negative and each row sums to 1, within 1e-3 (0.05 in
    half precision). Else the draws are examined.
    A fault if the draws are e^20 times as probable under softmax(softmax(logits / temperature)), or under
    softmax(softmax(logits) / temperature), as under the softmax of the logits.
    """
    logits = case.once(first_call)
    off = largest(logits.sum(axis=-1) - 1)
    if case.vocab_size > 1 and logits.min() >= 0 and off <= (0.05 if case.once(in_half_precision) else 1e-3):
        return {
            "measured": float(logits.sum(axis=-1).mean()),
            "expected": "logits, of any sign and sum",
            "why": "forward returns probabilities: none is negative, and those of each position sum to 1",
            "remedy": "return the logits; cross-entropy and sampling take their softmax",
            "evidence": {"least": float(logits.min())},
            "explains": AFTER_SOFTMAX,
        }
    if not case.has("sample"):
        raise NotApplicable("sample")
    return of_verdict(case, "probabilities-as-logits")


@check("prompt-ignored", "sample")
def prompt_ignored(case: Case) -> Found:
    """The text does not depend on the prompt, or on more than its last token.

    A fault if the draws are e^20 times as probable after another text, such as the last token alone, and no test
    rejects that they follow the predictions after it.
    """
    return of_verdict(case, "prompt-ignored")


@check("draws-correlated", "sample")
def draws_correlated(case: Case) -> Found:
    """The tokens of a text are not drawn independently: the same random number is used again at each step.

    A fault if Pearson's chi-square test of pairs of successive draws, each transformed to be uniform, gives p below
    1e-9; or for an e-value of e^20 in favour of one random number, or one noise, for a whole call. A sampler that gives
    the same text at each call is not faulty.
    """
    return of_verdict(case, "draws-correlated")


@check("sampler-not-the-model", "sample")
def sampler_not_the_model(case: Case) -> Found:
    """The drawn tokens do not follow the softmax of the model's logits, and no other code explains why.

    A fault if Pearson's chi-square tests of the draws, transformed to be uniform, and of their pairs give p below 1e-9.
    """
    return of_verdict(case, "sampler-not-the-model")


@check("setting-ignored", "sample", "sample_settings")
def setting_ignored(case: Case) -> Found:
    """A setting such as the temperature or top-k changes nothing.

    A fault if the draws are e^20 times as probable without the setting, and no test rejects that they follow this.
    """
    return of_settings(case, "setting-ignored")


@check("setting-inverted", "sample", "sample_settings")
def setting_inverted(case: Case) -> Found:
    """A setting works the wrong way: top-k keeps the least probable ids, or a low temperature makes text more random.

    A fault if the draws are e^20 times as probable under the inverted rule, and no test rejects that they follow it.
    """
    return of_settings(case, "setting-inverted")


@check("setting-wrong", "sample", "sample_settings")
def setting_wrong(case: Case) -> Found:
    """A setting does not do what its value says: top-k keeps one id more or less, or the value for off is not off.

    A fault if the draws are e^20 times as probable with one id more or less, where a draw that the right rule excludes
    counts e^15 at most; or if they fit no known rule: p below 1e-9 in the tests of ``sampler-not-the-model``.
    """
    return of_settings(case, "setting-wrong")


@check("penalty-rewards-repetition", "sample", "sample_settings")
def penalty_rewards_repetition(case: Case) -> Found:
    """The repetition penalty makes repetition more probable, as dividing negative logits does.

    A fault if the draws are e^20 times as probable under such a rule as under that of Keskar et al. 2019, section 4.1,
    applied to the prompt and the new ids or to the new ids only.
    """
    return of_penalty(case, "penalty-rewards-repetition")


@check("penalty-compounds", "sample", "sample_settings")
def penalty_compounds(case: Case) -> Found:
    """The repetition penalty counts each occurrence, so that common words become impossible.

    The threshold is that of ``penalty-rewards-repetition``.
    """
    return of_penalty(case, "penalty-compounds")


def of_penalty(case: Case, code: str) -> Found:
    findings, left = case.once(penalty_faults)
    if code in left:
        raise undecided(case)
    return dict(findings).get(code)
