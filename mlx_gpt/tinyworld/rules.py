"""The rules of tinyworld: which sentences may follow, how often, and what each changes.

A rule is one sentence with slots, ``"{holder} sent that {the_thing} to {receiver}."``. The scene (who is where, who
has the thing, who was mentioned last) decides which rules may come next and which words each slot allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from mlx_gpt.tinyworld import words
from mlx_gpt.tinyworld.words import GIRLS, NAMES, PLACES, ROLES, THINGS

MAX_PEOPLE = 3
MIN_EVENTS, MAX_EVENTS = 4, 8  # each number is about equally likely; a question is answered before the end

Options = Sequence[str]
Slots = dict[str, str]  # slot -> the word that fills it


class Facts(NamedTuple):
    """The facts of a scene that decide which rules may come next. Scenes that differ in names and places share them."""

    part: str
    events: int
    n_people: int
    has_subject: bool
    is_held: bool  # someone has the thing
    was_sent: bool  # in the previous sentence
    is_question: bool  # the previous sentence is one
    asks_person: bool  # ... about a person rather than the thing


class Scene(NamedTuple):
    """The state between two sentences of a story."""

    part: str = "begin"  # of the story: begin, who, thing, friend, event, fact, end, over
    events: int = 0  # so far
    at: Mapping[str, str] = MappingProxyType({})  # person -> place, in the order of their first mention
    subject: str = ""  # the person whom "she" or "he" would mean; "" where that would be unclear
    thing: str = ""
    look: str = ""  # of the thing
    holder: str = ""  # of the thing; "" if no one has it
    lies_in: str = ""  # place of a thing that no one has
    giver: str = ""  # who sent the thing in the previous sentence
    question: tuple[str, str] = ("", "")  # of the previous sentence: (who asks, the person asked for)

    @property
    def thing_place(self) -> str:
        return self.at[self.holder] if self.holder else self.lies_in

    @property
    def facts(self) -> Facts:
        asker, asked = self.question
        state = (bool(self.subject), bool(self.holder), bool(self.giver), bool(asker), bool(asked))
        return Facts(self.part, self.events, len(self.at), *state)

    def others(self, name: str) -> Options:
        """All people but this one."""
        return [person for person in self.at if person != name]


# All words of each slot ...
WORDS: dict[str, Options] = {
    **{"weather": words.WEATHER, "time": words.TIMES, "trait": words.TRAITS, "feeling": words.FEELINGS},
    **{"food": words.FOODS, "taste": words.TASTES, "nice": words.NICE, "size": words.SIZES, "animal": words.ANIMALS},
    **{"soon": words.SOON, "how": words.HOW, "went": words.WENT, "passed": words.PASSED, "did": words.DID},
    **{"do": words.DO, "role": tuple(ROLES), "She": ("She", "He"), "Her": ("Her", "His"), "girl": ("girl", "boy")},
    **{"thing": THINGS, "the_thing": THINGS, "look": words.LOOKS, "the_look": words.LOOKS},
    **dict.fromkeys(("place", "elsewhere", "thing_place", "subject_place", "who_place", "asked_place"), PLACES),
    **dict.fromkeys(("hero", "friend", "new", "who", "other", "mover", "holder", "finder", "she_named"), NAMES),
    **dict.fromkeys(("giver", "receiver", "asked", "answerer"), NAMES),
}

# ... and those that the scene and the slots to the left allow, all equally likely.
ALLOWED: dict[str, Callable[[Scene, Slots], Options]] = {
    "She": lambda scene, slots: ["She" if scene.subject in GIRLS else "He"],
    "Her": lambda scene, slots: ["Her" if scene.subject in GIRLS else "His"],
    "girl": lambda scene, slots: ["girl" if scene.subject in GIRLS else "boy"],
    "friend": lambda scene, slots: [name for name in ROLES[slots["role"]] if name not in scene.at],
    "new": lambda scene, slots: [name for name in NAMES if name not in scene.at],
    "who": lambda scene, slots: list(scene.at),
    "other": lambda scene, slots: scene.others(slots["who"]),
    "mover": lambda scene, slots: scene.others(scene.holder),
    "holder": lambda scene, slots: [scene.holder],
    "finder": lambda scene, slots: list(scene.at),
    "she_named": lambda scene, slots: [scene.subject],
    "who_place": lambda scene, slots: [scene.at[slots["who"]]],
    "giver": lambda scene, slots: [scene.giver],
    "receiver": lambda scene, slots: scene.others(scene.holder),
    "asked": lambda scene, slots: [scene.question[1]],
    "answerer": lambda scene, slots: scene.others(scene.question[0]),
    "elsewhere": lambda scene, slots: [p for p in PLACES if p != scene.at[slots.get("mover") or scene.holder]],
    "subject_place": lambda scene, slots: [scene.at[scene.subject]],
    "asked_place": lambda scene, slots: [scene.at[scene.question[1]]],
    "thing_place": lambda scene, slots: [scene.thing_place],
    "the_thing": lambda scene, slots: [scene.thing],
    "the_look": lambda scene, slots: [scene.look],
}


@dataclass(frozen=True, eq=False)
class Rule:
    """One kind of sentence: its weight among those of its part, ``when`` it may come, and ``then`` its effects."""

    part: str
    text: str
    weight: float = 1
    when: Callable[[Facts], bool] = lambda facts: True
    then: Callable[[Scene, Slots], dict[str, Any]] = lambda scene, slots: {}  # field of the scene -> new value
    subject: str = ""  # the slot of the person whom "she" or "he" may mean in the next sentence

    @cached_property
    def pieces(self) -> list[str]:
        """Literal text and slot names in turn: ``["", "holder", " sent that ", "the_look", ...]``."""
        return re.split(r"\{(\w+)\}", self.text)

    @cached_property
    def slots(self) -> list[tuple[str, str]]:
        """Each slot and the literal text after it."""
        return list(zip(self.pieces[1::2], self.pieces[2::2], strict=True))


def _move(person: str, place: str) -> Callable[[Scene, Slots], dict[str, Any]]:
    return lambda scene, slots: {"at": {**scene.at, slots[person]: slots[place]}}


RULES = (
    Rule("begin", "One {weather} {time}, {hero} went to the {place}.", 3, then=_move("hero", "place"), subject="hero"),
    Rule(
        "begin",
        "It was a {weather} {time}, and {hero} ran to the {place}.",
        then=_move("hero", "place"),
        subject="hero",
    ),
    Rule("who", "{She} was a {trait} {girl}.", subject="She"),
    Rule("who", "{She} was {feeling}.", subject="She"),
    Rule("who", "{She} wanted to {do}.", subject="She"),
    Rule(
        "thing",
        "{she_named} had a {look} {thing}.",
        4,
        then=lambda scene, slots: {"look": slots["look"], "thing": slots["thing"], "holder": slots["she_named"]},
        subject="she_named",
    ),
    Rule(
        "thing",
        "Somebody took a {look} {thing} to the {place}.",
        then=lambda scene, slots: {"look": slots["look"], "thing": slots["thing"], "lies_in": slots["place"]},
        subject="She",
    ),
    Rule("friend", "{Her} {role} {friend} went to the {place}.", 2, then=_move("friend", "place"), subject="friend"),
    Rule(
        "friend",
        "{Her} {role} {friend} was in the {subject_place} too.",
        then=_move("friend", "subject_place"),
        subject="friend",
    ),
    # People move
    Rule("event", "{mover} {went} {how} to the {elsewhere}.", 5, then=_move("mover", "elsewhere"), subject="mover"),
    Rule(
        "event",
        "{holder} took that {the_look} {the_thing} to the {elsewhere}.",
        4,
        when=lambda facts: facts.is_held,
        then=_move("holder", "elsewhere"),
        subject="holder",
    ),
    Rule(
        "event",
        "{soon} {new} went to the {place}.",
        2,
        when=lambda facts: facts.n_people < MAX_PEOPLE,
        then=_move("new", "place"),
        subject="new",
    ),
    # The thing changes hands
    Rule(
        "event",
        "{holder} sent that {the_look} {the_thing} to {receiver}.",
        4,
        when=lambda facts: facts.is_held,
        then=lambda scene, slots: {"holder": slots["receiver"], "giver": slots["holder"]},
    ),
    Rule("event", '"Thank you, {giver}," said {holder}.', 12, when=lambda facts: facts.was_sent),
    Rule(
        "event",
        "{holder} left that {the_look} {the_thing} in the {thing_place}.",
        when=lambda facts: facts.is_held,
        then=lambda scene, slots: {"holder": "", "lies_in": slots["thing_place"]},
        subject="holder",
    ),
    Rule(
        "event",
        "{finder} found that {the_look} {the_thing} in the {thing_place}.",
        8,
        when=lambda facts: not facts.is_held,
        then=lambda scene, slots: {
            "holder": slots["finder"],
            "lies_in": "",
            "at": {**scene.at, slots["finder"]: slots["thing_place"]},
        },
        subject="finder",
    ),
    # Nothing changes
    Rule("event", "{who} was {feeling}.", 2, subject="who"),
    Rule("event", "{She} {did} in the {subject_place}.", 6, when=lambda facts: facts.has_subject, subject="She"),
    Rule("event", "{She} ate a {taste} {food}.", 2, when=lambda facts: facts.has_subject, subject="She"),
    Rule("event", "A {size} {animal} {passed} past {who}."),
    # People speak
    Rule("event", '"What a {nice} {the_thing}!" said {who}.'),
    Rule("event", '{who} said, "Let us {do} in the {who_place}".', 4, subject="who"),
    Rule(
        "event",
        '"Where is that {the_look} {the_thing}?" asked {mover}.',
        3,
        then=lambda scene, slots: {"question": (slots["mover"], "")},
    ),
    Rule(
        "event",
        '"Where are you, {who}?" asked {other}.',
        3,
        then=lambda scene, slots: {"question": (slots["other"], slots["who"])},
    ),
    Rule(
        "answer",
        '{answerer} said, "It is in the {thing_place}".',
        when=lambda facts: not facts.asks_person and not facts.is_held,
    ),
    Rule(
        "answer",
        '{holder} said, "I have it in the {thing_place}".',
        when=lambda facts: not facts.asks_person and facts.is_held,
        subject="holder",
    ),
    Rule("answer", '{asked} said, "I am in the {asked_place}".', when=lambda facts: facts.asks_person, subject="asked"),
    # The end
    Rule(
        "fact",
        "In the end, {holder} had that {the_look} {the_thing} in the {thing_place}.",
        when=lambda facts: facts.is_held,
    ),
    Rule(
        "fact",
        "In the end, that {the_look} {the_thing} was in the {thing_place}.",
        when=lambda facts: not facts.is_held,
    ),
    Rule("end", "{who} and {other} were {feeling}."),
    Rule("end", "Everyone went home {feeling}."),
)
_NEXT_PART = {"begin": "who", "who": "thing", "thing": "friend", "friend": "event", "fact": "end", "end": "over"}


def next_rules(scene: Scene) -> tuple[tuple[Rule, float], ...]:
    """Return the rules that may make the next sentence, with their probabilities; none at the end of a story."""
    return _next_rules(scene.facts)


@cache
def _next_rules(facts: Facts) -> tuple[tuple[Rule, float], ...]:
    if facts.part == "over":
        return ()
    if facts.is_question:
        return _share("answer", facts, 1.0)
    if facts.part != "event":
        return _share(facts.part, facts, 1.0)
    stop = 1 / max(1, MAX_EVENTS + 1 - facts.events) if facts.events >= MIN_EVENTS else 0.0
    return _share("event", facts, 1 - stop) + _share("fact", facts, stop)


def _share(part: str, facts: Facts, mass: float) -> tuple[tuple[Rule, float], ...]:
    """Divide a probability among the rules of a part by their weights."""
    rules = [rule for rule in RULES if rule.part == part and rule.when(facts)] if mass else []
    total = sum(rule.weight for rule in rules)
    return tuple((rule, mass * rule.weight / total) for rule in rules)


def allowed_words(scene: Scene, slot: str, slots: Slots) -> Options:
    """Return the words that may fill a slot, all equally likely; ``slots`` are those to its left."""
    return ALLOWED[slot](scene, slots) if slot in ALLOWED else WORDS[slot]


def apply_rule(scene: Scene, rule: Rule, slots: Slots) -> Scene:
    """Return the scene after a sentence."""
    return scene._replace(
        **{"giver": "", "question": ("", ""), **rule.then(scene, slots)},
        part=_NEXT_PART.get(rule.part, "event"),
        events=scene.events + (rule.part in ("event", "answer")),
        subject=scene.subject if rule.subject == "She" else slots.get(rule.subject, ""),
    )
