"""The rules of tinyworld: every way through them, what they allow, and that choices come as often as they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import log, sqrt
from typing import Any, NamedTuple

import pytest
from helpers.walked_stories import Step

from mlx_gpt.tinyworld.rules import (
    FEWEST_EVENTS,
    MOST_EVENTS,
    RULES,
    WORDS,
    Rule,
    Said,
    Scene,
    after,
    choices,
    options,
)
from mlx_gpt.tinyworld.stories import Reading
from mlx_gpt.tinyworld.words import BOYS, GIRLS

# Every way through the rules --------------------------------------------------------------------------------------


class Ways(NamedTuple):
    """All stories that may follow a scene: how long in words, how many, and how many nats one of them takes."""

    shortest: float
    longest: float
    count: float
    entropy: float


OVER = Ways(0, 0, 1, 0.0)


def all_ways(scene: Scene, known: dict[Any, Ways]) -> Ways:
    """Walk every way through the rules; scenes that differ only in names are one."""
    if not choices(scene):
        return OVER
    key = _kind(scene)
    if key not in known:
        shortest, longest, count, entropy = float("inf"), 0.0, 0.0, 0.0
        for rule, p in choices(scene):
            words = len(rule.text.split())
            entropy -= p * log(p)
            for said, n, of in _kinds_of_saying(rule, scene, {}, rule.pieces[1::2]):
                rest = all_ways(after(scene, rule, said), known)
                shortest, longest = min(shortest, words + rest.shortest), max(longest, words + rest.longest)
                count += n * rest.count
                entropy += p * n / of * (log(of) + rest.entropy)
        known[key] = Ways(shortest, longest, count, entropy)
    return known[key]


def _kind(scene: Scene) -> tuple:
    people, places = [*scene.at, ""], list(dict.fromkeys([*scene.at.values(), scene.thing_place]))
    at = tuple(places.index(place) for place in scene.at.values())
    question = tuple(people.index(name) for name in scene.question)
    thing = (people.index(scene.holder), places.index(scene.thing_place), bool(scene.giver))
    if scene.part == "event":  # from here on it matters whether "she" is somebody, no longer who
        return scene.events, at, thing, question, bool(scene.subject)
    return scene.part, at, thing, scene.subject in GIRLS


def _kinds_of_saying(rule: Rule, scene: Scene, said: Said, slots: list[str]) -> Iterator[tuple[Said, int, int]]:
    """One example of each kind of saying a rule, how many are of that kind, and how many there are of all kinds."""
    if not slots:
        yield said, 1, 1
        return
    known = [*scene.at, *scene.at.values(), scene.thing_place]
    allowed = options(scene, slots[0], said)
    kinds = Counter()
    examples = {}
    for option in allowed:
        kind = option if option in known else (option in GIRLS, option in BOYS)
        kinds[kind] += 1
        examples[kind] = option
    for kind, n in kinds.items():
        for rest, m, of in _kinds_of_saying(rule, scene, {**said, slots[0]: examples[kind]}, slots[1:]):
            yield rest, n * m, len(allowed) * of


@pytest.fixture(scope="module")
def ways() -> Ways:
    return all_ways(Scene(), {})


def test_no_way_through_the_rules_is_shorter_than_40_or_longer_than_120_words(ways: Ways) -> None:
    assert ways.shortest >= 40
    assert ways.longest <= 120


def test_there_are_more_than_a_million_million_stories(ways: Ways) -> None:
    assert ways.count > 1e12


def test_a_story_takes_as_many_nats_as_the_rules_say_on_average(ways: Ways, readings: list[Reading]) -> None:
    nats = [-reading.log_prob for reading in readings]
    mean = sum(nats) / len(nats)
    deviation = sqrt(sum((one - mean) ** 2 for one in nats) / len(nats))
    assert abs(mean - ways.entropy) < 4 * deviation / sqrt(len(nats))
    assert 4 * deviation / sqrt(len(nats)) < 0.01 * ways.entropy


# In every scene ---------------------------------------------------------------------------------------------------


def test_the_probabilities_of_what_may_come_next_sum_to_one_in_every_scene(walked: list[list[Step]]) -> None:
    for step in (step for way in walked for step in way):
        shares = [p for _, p in choices(step.scene)]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
        assert {step.rule.part for rule, _ in choices(step.scene)} <= {"event", "fact", step.rule.part}


def test_what_may_stand_in_a_slot_is_never_nothing_and_never_the_same_word_twice(walked: list[list[Step]]) -> None:
    for step in (step for way in walked for step in way):
        for rule, _ in choices(step.scene):
            said: Said = {}
            for slot in rule.pieces[1::2]:
                allowed = options(step.scene, slot, said)
                assert allowed, f"nothing to say for {slot} in {rule.text}"
                assert len(set(allowed)) == len(allowed)
                assert set(allowed) <= set(WORDS[slot])
                said[slot] = allowed[0]


# Frequencies ------------------------------------------------------------------------------------------------------


Draws = Counter[
    tuple[Any, tuple[tuple[Any, float], ...]]
]  # (what was drawn, of what with which probability): how often


def surprise(draws: Draws) -> dict[Any, float]:
    """For each thing that could be drawn: how many standard deviations its count is from what was promised."""
    seen, mean, variance = Counter[Any](), Counter[Any](), Counter[Any]()
    for (drawn, promised), n in draws.items():
        seen[drawn] += n
        for outcome, p in promised:
            mean[outcome] += n * p
            variance[outcome] += n * p * (1 - p)
    return {outcome: (seen[outcome] - mean[outcome]) / sqrt(v) for outcome, v in variance.items() if v > 20}


LIMIT = 4.5  # deviations: among a thousand counts, one further off comes about once in 150 seeds


@pytest.fixture(scope="module")
def rules_drawn(walked: list[list[Step]]) -> Draws:
    return Counter((step.rule, tuple(choices(step.scene))) for way in walked for step in way)


CHOSEN = [rule for rule in RULES if rule.part != "answer"]  # each question has just one answer


def test_rules_come_as_often_as_their_probabilities_say(rules_drawn: Draws) -> None:
    found = surprise(rules_drawn)
    assert set(found) == set(CHOSEN)
    assert max(map(abs, found.values())) < LIMIT


@pytest.mark.parametrize("wrong", CHOSEN, ids=lambda rule: rule.text)
def test_a_weight_twice_as_large_would_be_noticed(wrong: Rule, rules_drawn: Draws) -> None:
    promised_wrongly: Draws = Counter()
    for (drawn, promised), n in rules_drawn.items():
        shares = [(rule, p * (1 + (rule is wrong))) for rule, p in promised]
        mass = sum(p for _, p in shares)
        promised_wrongly[drawn, tuple((rule, p / mass) for rule, p in shares)] += n
    assert abs(surprise(promised_wrongly)[wrong]) > LIMIT


def test_words_come_equally_often_in_every_slot(walked: list[list[Step]]) -> None:
    draws: Draws = Counter()
    for step in (step for way in walked for step in way):
        said: Said = {}
        for slot, word in step.said.items():
            allowed = options(step.scene, slot, said)
            promised = tuple(((step.rule.text, slot, option), 1 / len(allowed)) for option in allowed)
            draws[(step.rule.text, slot, word), promised] += 1
            said[slot] = word
    found = surprise(draws)
    assert len(found) > 500
    assert max(map(abs, found.values())) < LIMIT


def share(outcomes: list[bool], promised: float) -> bool:
    """Is the share of the true ones the promised one, to what chance allows?"""
    deviation = sqrt(promised * (1 - promised) / len(outcomes))
    return abs(sum(outcomes) / len(outcomes) - promised) <= LIMIT * deviation < 0.1


def test_the_shares_that_the_rules_state_in_numbers_are_those_of_the_stories(walked: list[list[Step]]) -> None:
    for i, part in [(0, "begin"), (1, "who"), (2, "thing"), (3, "friend"), (-1, "end")]:  # whatever the scene
        rivals = [rule for rule in RULES if rule.part == part]
        for rule in rivals:
            taken = [way[i].rule is rule for way in walked]
            assert share(taken, rule.weight / sum(rival.weight for rival in rivals))
    for events in range(FEWEST_EVENTS, MOST_EVENTS):  # the fewer may still come, the likelier is the end
        could_end = [step for way in walked for step in way if _could_end(step.scene, events)]
        assert share([step.rule.part == "fact" for step in could_end], 1 / (MOST_EVENTS + 1 - events))


def _could_end(scene: Scene, events: int) -> bool:
    return scene.part == "event" and scene.events == events and not scene.question[0]
