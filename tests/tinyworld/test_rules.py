"""The rules of tinyworld: every path through them, the words they allow, and the frequencies of their choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import log, sqrt
from typing import Any, NamedTuple

import pytest
from helpers.derivations import Step

from mlx_gpt.tinyworld.rules import (
    MAX_EVENTS,
    MIN_EVENTS,
    RULES,
    WORDS,
    Rule,
    Scene,
    Slots,
    allowed_words,
    apply_rule,
    next_rules,
)
from mlx_gpt.tinyworld.stories import Parse
from mlx_gpt.tinyworld.words import BOYS, GIRLS

# Every path through the rules -----------------------------------------------------------------------------------------


class Paths(NamedTuple):
    """All continuations of a scene: their length in words, their number and their entropy in nats."""

    shortest: float
    longest: float
    count: float
    entropy: float


OVER = Paths(0, 0, 1, 0.0)


def all_paths(scene: Scene, known: dict[Any, Paths]) -> Paths:
    """Follow every path through the rules; scenes that differ only in names are one."""
    if not next_rules(scene):
        return OVER
    key = _kind(scene)
    if key not in known:
        shortest, longest, count, entropy = float("inf"), 0.0, 0.0, 0.0
        for rule, p in next_rules(scene):
            words = len(rule.text.split())
            entropy -= p * log(p)
            for slots, n, of in _kinds_of_sentence(rule, scene, {}, rule.pieces[1::2]):
                rest = all_paths(apply_rule(scene, rule, slots), known)
                shortest, longest = min(shortest, words + rest.shortest), max(longest, words + rest.longest)
                count += n * rest.count
                entropy += p * n / of * (log(of) + rest.entropy)
        known[key] = Paths(shortest, longest, count, entropy)
    return known[key]


def _kind(scene: Scene) -> tuple:
    people, places = [*scene.at, ""], list(dict.fromkeys([*scene.at.values(), scene.thing_place]))
    at = tuple(places.index(place) for place in scene.at.values())
    question = tuple(people.index(name) for name in scene.question)
    thing = (people.index(scene.holder), places.index(scene.thing_place), bool(scene.giver))
    if scene.part == "event":  # from here on the gender of "she" no longer matters
        return scene.events, at, thing, question, bool(scene.subject)
    return scene.part, at, thing, scene.subject in GIRLS


def _kinds_of_sentence(rule: Rule, scene: Scene, slots: Slots, empty: list[str]) -> Iterator[tuple[Slots, int, int]]:
    """Yield an example of each kind of sentence, the number of sentences of that kind, and of all kinds."""
    if not empty:
        yield slots, 1, 1
        return
    known = [*scene.at, *scene.at.values(), scene.thing_place]
    allowed = allowed_words(scene, empty[0], slots)
    kinds = Counter()
    examples = {}
    for option in allowed:
        kind = option if option in known else (option in GIRLS, option in BOYS)
        kinds[kind] += 1
        examples[kind] = option
    for kind, n in kinds.items():
        for rest, m, of in _kinds_of_sentence(rule, scene, {**slots, empty[0]: examples[kind]}, empty[1:]):
            yield rest, n * m, len(allowed) * of


@pytest.fixture(scope="module")
def paths() -> Paths:
    return all_paths(Scene(), {})


def test_no_path_through_the_rules_is_shorter_than_40_or_longer_than_120_words(paths: Paths) -> None:
    assert paths.shortest >= 40
    assert paths.longest <= 120


def test_there_are_more_than_a_trillion_stories(paths: Paths) -> None:
    assert paths.count > 1e12


def test_the_mean_negative_log_probability_is_the_entropy_of_the_rules(paths: Paths, parses: list[Parse]) -> None:
    nats = [-parse.log_prob for parse in parses]
    mean = sum(nats) / len(nats)
    deviation = sqrt(sum((one - mean) ** 2 for one in nats) / len(nats))
    assert abs(mean - paths.entropy) < 4 * deviation / sqrt(len(nats))
    assert 4 * deviation / sqrt(len(nats)) < 0.01 * paths.entropy


# All scenes -----------------------------------------------------------------------------------------------------------


def test_the_probabilities_of_the_next_rules_sum_to_one_in_every_scene(derivations: list[list[Step]]) -> None:
    for step in (step for derivation in derivations for step in derivation):
        shares = [p for _, p in next_rules(step.scene)]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
        assert {step.rule.part for rule, _ in next_rules(step.scene)} <= {"event", "fact", step.rule.part}


def test_the_allowed_words_of_a_slot_are_distinct_and_at_least_one(derivations: list[list[Step]]) -> None:
    for step in (step for derivation in derivations for step in derivation):
        for rule, _ in next_rules(step.scene):
            slots: Slots = {}
            for slot in rule.pieces[1::2]:
                allowed = allowed_words(step.scene, slot, slots)
                assert allowed, f"no word for {slot} in {rule.text}"
                assert len(set(allowed)) == len(allowed)
                assert set(allowed) <= set(WORDS[slot])
                slots[slot] = allowed[0]


# Frequencies ----------------------------------------------------------------------------------------------------------


Draws = Counter[tuple[Any, tuple[tuple[Any, float], ...]]]  # (outcome, the probabilities of all outcomes): count


def z_scores(draws: Draws) -> dict[Any, float]:
    """Return the deviation of each outcome's count from its expectation, in standard deviations."""
    seen, mean, variance = Counter[Any](), Counter[Any](), Counter[Any]()
    for (drawn, promised), n in draws.items():
        seen[drawn] += n
        for outcome, p in promised:
            mean[outcome] += n * p
            variance[outcome] += n * p * (1 - p)
    return {outcome: (seen[outcome] - mean[outcome]) / sqrt(v) for outcome, v in variance.items() if v > 20}


LIMIT = 4.5  # deviations: among a thousand counts, one is further off in about one of 150 seeds


@pytest.fixture(scope="module")
def rules_drawn(derivations: list[list[Step]]) -> Draws:
    return Counter((step.rule, tuple(next_rules(step.scene))) for derivation in derivations for step in derivation)


CHOSEN = [rule for rule in RULES if rule.part != "answer"]  # each question has just one answer


def test_rules_are_as_frequent_as_their_probabilities(rules_drawn: Draws) -> None:
    found = z_scores(rules_drawn)
    assert set(found) == set(CHOSEN)
    assert max(map(abs, found.values())) < LIMIT


@pytest.mark.parametrize("wrong", CHOSEN, ids=lambda rule: rule.text)
def test_a_weight_twice_as_large_would_be_detected(wrong: Rule, rules_drawn: Draws) -> None:
    promised_wrongly: Draws = Counter()
    for (drawn, promised), n in rules_drawn.items():
        shares = [(rule, p * (1 + (rule is wrong))) for rule, p in promised]
        mass = sum(p for _, p in shares)
        promised_wrongly[drawn, tuple((rule, p / mass) for rule, p in shares)] += n
    assert abs(z_scores(promised_wrongly)[wrong]) > LIMIT


def test_words_are_equally_frequent_in_every_slot(derivations: list[list[Step]]) -> None:
    draws: Draws = Counter()
    for step in (step for derivation in derivations for step in derivation):
        slots: Slots = {}
        for slot, word in step.slots.items():
            allowed = allowed_words(step.scene, slot, slots)
            promised = tuple(((step.rule.text, slot, option), 1 / len(allowed)) for option in allowed)
            draws[(step.rule.text, slot, word), promised] += 1
            slots[slot] = word
    found = z_scores(draws)
    assert len(found) > 500
    assert max(map(abs, found.values())) < LIMIT


def share(outcomes: list[bool], promised: float) -> bool:
    """Return True if the share of true outcomes is the promised one, within chance."""
    deviation = sqrt(promised * (1 - promised) / len(outcomes))
    return abs(sum(outcomes) / len(outcomes) - promised) <= LIMIT * deviation < 0.1


def test_the_probabilities_stated_as_weights_are_those_of_the_stories(derivations: list[list[Step]]) -> None:
    for i, part in [(0, "begin"), (1, "who"), (2, "thing"), (3, "friend"), (-1, "end")]:  # whatever the scene
        rivals = [rule for rule in RULES if rule.part == part]
        for rule in rivals:
            taken = [derivation[i].rule is rule for derivation in derivations]
            assert share(taken, rule.weight / sum(rival.weight for rival in rivals))
    for events in range(MIN_EVENTS, MAX_EVENTS):  # the fewer events may still follow, the likelier is the end
        could_end = [step for derivation in derivations for step in derivation if _could_end(step.scene, events)]
        assert share([step.rule.part == "fact" for step in could_end], 1 / (MAX_EVENTS + 1 - events))


def _could_end(scene: Scene, events: int) -> bool:
    return scene.part == "event" and scene.events == events and not scene.question[0]
