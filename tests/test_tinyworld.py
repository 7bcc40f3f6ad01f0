"""tinyworld: what is told can be read, exactly once, with the probability it was told with."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from math import log, sqrt
from typing import Any, NamedTuple

import pytest

from mlx_gpt.text.tinyworld import Reading, best_loss, read_story, sentences, stories, story
from mlx_gpt.text.tinyworld_rules import (
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
from mlx_gpt.text.tinyworld_words import BOYS, GIRLS, LOOKS, NAMES, PLACES, THINGS

N = 10_000


@pytest.fixture(scope="module")
def told() -> list[str]:
    return stories(N, seed=0)


@pytest.fixture(scope="module")
def readings(told: list[str]) -> list[Reading]:
    return [read_story(text) for text in told]


class Step(NamedTuple):
    """One sentence of a story: the scene before it, the rule, what stands in its slots."""

    scene: Scene
    rule: Rule
    said: Said


def steps(text: str) -> Iterator[Step]:
    """A story taken apart with regular expressions: a second reader, which tries every rule and every slot."""
    scene = Scene()
    for sentence in sentences(text):
        fitting = [(rule, said) for rule, _ in choices(scene) for said in _readings(rule, scene, sentence)]
        assert len(fitting) == 1, f"{len(fitting)} ways to read {sentence!r}"
        rule, said = fitting[0]
        yield Step(scene, rule, said)
        scene = after(scene, rule, said)
    assert not choices(scene)


def _readings(rule: Rule, scene: Scene, sentence: str) -> list[Said]:
    literals = [re.escape(literal) for literal in rule.pieces[::2]]
    found = re.fullmatch(r"(\w+)".join(literals), sentence)
    said: Said = {}
    for slot, word in zip(rule.pieces[1::2], found.groups() if found else (), strict=False):
        if word not in options(scene, slot, said):
            return []
        said[slot] = word
    return [said] if found else []


@pytest.fixture(scope="module")
def walked(told: list[str]) -> list[list[Step]]:
    """The first three thousand stories, step by step."""
    return [list(steps(text)) for text in told[:3000]]


# Told -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_tells_the_same_stories_and_another_seed_others(told: list[str]) -> None:
    assert stories(50, seed=0) == told[:50]  # and fewer stories are the first of more
    assert not set(stories(50, seed=1)) & set(told)


def test_the_world_has_at_least_300_word_forms(told: list[str]) -> None:
    assert len({word.lower() for text in told for word in re.findall(r"\w+", text)}) >= 300


def test_ten_thousand_stories_are_all_different_and_have_40_to_120_words(told: list[str]) -> None:
    assert len(set(told)) == N
    lengths = [len(text.split()) for text in told]
    assert min(lengths) >= 40
    assert max(lengths) <= 120


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
    mean = sum(nats) / N
    deviation = sqrt(sum((one - mean) ** 2 for one in nats) / N)
    assert abs(mean - ways.entropy) < 4 * deviation / sqrt(N)
    assert 4 * deviation / sqrt(N) < 0.01 * ways.entropy


# Read -------------------------------------------------------------------------------------------------------------


def test_reading_inverts_telling_on_ten_thousand_stories(told: list[str], readings: list[Reading]) -> None:
    assert [reading.broken for reading in readings if not reading.valid] == []
    assert [reading.sentences for reading in readings] == [len(sentences(text)) for text in told]


class Counting(random.Random):
    """Sums the log-probabilities of what is drawn from it."""

    log_prob = 0.0

    def choices(self, population: Any, weights: Any = None, **options: Any) -> Any:
        (drawn,) = super().choices(population, weights, **options)
        self.log_prob += log(weights[population.index(drawn)] / sum(weights))
        return [drawn]

    def choice(self, seq: Any) -> Any:
        self.log_prob -= log(len(seq))
        return super().choice(seq)


def test_the_probability_that_is_read_is_the_one_it_was_told_with() -> None:
    for seed in range(2000):
        rng = Counting(seed)
        text = story(rng).text
        assert read_story(text).log_prob == pytest.approx(rng.log_prob, abs=1e-9)


def test_no_story_can_be_read_in_two_ways(walked: list[list[Step]], told: list[str]) -> None:
    # ``steps`` has asserted that each sentence fits one rule, in one way. It is the way the reader took:
    for text, way in zip(told[:200], walked, strict=False):
        assert " ".join(step.rule.text.format(**step.said) for step in way) == text


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


# Over twenty words and more ---------------------------------------------------------------------------------------

KINDS = {  # slots in which the scene leaves one word only, and what else might be thought to stand there
    "thing": (("the_thing",), THINGS),
    "look": (("the_look",), LOOKS),
    "place": (("here", "thing_place"), PLACES),
    "name": (("holder", "giver", "receiver", "asked"), NAMES),
}
FAR = 20  # words


class Recalled(NamedTuple):
    """A word that had to be carried over ``distance`` words, and the same story with another word in its place."""

    sentence: int
    distance: int
    spoiled: str


def recalled(way: list[Step], slots: tuple[str, ...], words: tuple[str, ...], rng: random.Random) -> Iterator[Recalled]:
    before: list[str] = []
    texts = [step.rule.text.format(**step.said) for step in way]
    for i, step in enumerate(way):
        spoken = re.findall(r"\w+", texts[i])
        for slot in set(slots) & set(step.said):
            word = step.said[slot]
            if len(options(step.scene, slot, step.said)) == 1 and word in before:
                distance = before[::-1].index(word) + 1 + spoken.index(word)
                other = rng.choice([one for one in words if one not in spoken])
                spoiled = step.rule.text.format(**{**step.said, slot: other})
                yield Recalled(i + 1, distance, " ".join([*texts[:i], spoiled, *texts[i + 1 :]]))
        before += spoken


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_word_breaks_the_story_even_twenty_words_after_the_right_one(
    kind: str, walked: list[list[Step]]
) -> None:
    rng = random.Random(0)
    far = [found for way in walked[:1500] for found in recalled(way, *KINDS[kind], rng) if found.distance > FAR]
    assert len(far) > 200
    for found in far:
        reading = read_story(found.spoiled)
        assert reading.sentences == found.sentence - 1
        assert reading.broken.startswith(f"sentence {found.sentence} does not follow: ")


def test_most_stories_recall_something_over_more_than_twenty_words(walked: list[list[Step]]) -> None:
    rng = random.Random(0)
    far = [
        any(found.distance > FAR for kind in KINDS.values() for found in recalled(way, *kind, rng))
        for way in walked[:500]
    ]
    assert sum(far) / len(far) > 0.9


def test_a_wrong_pronoun_breaks_the_story_in_its_sentence(told: list[str]) -> None:
    wrong = {"She": "He", "He": "She", "Her": "His", "His": "Her"}
    for text in told[:500]:
        parts = sentences(text)
        for i, sentence in enumerate(parts):
            first, _, rest = sentence.partition(" ")
            if first in wrong:
                reading = read_story(" ".join([*parts[:i], f"{wrong[first]} {rest}", *parts[i + 1 :]]))
                assert reading.broken.startswith(f"sentence {i + 1} ")


# The best possible loss -------------------------------------------------------------------------------------------


def test_the_best_possible_loss_is_what_the_stories_take_over_the_number_of_tokens(
    told: list[str], readings: list[Reading]
) -> None:
    nats = -sum(reading.log_prob for reading in readings[:100])
    assert best_loss(told[:100], n_tokens=8000) == pytest.approx(nats / 8000)


def test_a_text_that_is_no_story_has_no_best_possible_loss() -> None:
    with pytest.raises(ValueError, match="expected stories of tinyworld, but sentence 1 is not of this world"):
        best_loss([*stories(1, seed=0), "Once upon a time."], 100)
