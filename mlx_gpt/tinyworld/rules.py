"""The rules of tinyworld: what can be said, when, how often, and what is true after it.

Each rule is one sentence with slots, ``"{holder} sent that {the_thing} to {receiver}."``; the scene (who is where, who
has the thing, who was spoken of last) decides which rules may come next and what may stand in each slot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mlx_gpt.tinyworld.words import (
    ANIMALS,
    DID,
    DO,
    FEELINGS,
    FOODS,
    GIRLS,
    HOW,
    LOOKS,
    NAMES,
    NICE,
    PASSED,
    PLACES,
    ROLES,
    SIZES,
    SOON,
    TASTES,
    THINGS,
    TIMES,
    TRAITS,
    WEATHER,
    WENT,
)

MOST_PEOPLE = 3
FEWEST_EVENTS, MOST_EVENTS = 4, 8  # each number about as likely as the others; a question is answered before the end

Options = Sequence[str]
Said = dict[str, str]  # slot -> the words that stand in it


@dataclass(frozen=True)
class Scene:
    """What is true between two sentences of a story."""

    part: str = "begin"  # which rules come next: begin, who, thing, friend, event ..., fact, end, over
    events: int = 0  # so far
    at: dict[str, str] = field(default_factory=dict)  # person -> place, in the order they came in
    subject: str = ""  # whom "she" or "he" would mean; nobody where that would be unclear
    thing: str = ""
    look: str = ""  # of the thing
    holder: str = ""  # who has the thing, or nobody
    lies_in: str = ""  # where it lies if nobody has it
    giver: str = ""  # who sent the thing, right after it was sent
    question: tuple[str, str] = ("", "")  # (who asks, who is asked, if only one), right after it was asked

    @property
    def thing_place(self) -> str:
        return self.at[self.holder] if self.holder else self.lies_in

    def others(self, name: str) -> Options:
        """Everybody but this one."""
        return [person for person in self.at if person != name]


# Slots: what can stand there at all ...
WORDS: dict[str, Options] = {
    **{"weather": WEATHER, "time": TIMES, "trait": TRAITS, "feeling": FEELINGS, "food": FOODS, "nice": NICE},
    **{"taste": TASTES, "size": SIZES, "soon": SOON, "how": HOW},
    **{"animal": ANIMALS, "passed": PASSED, "did": DID, "do": DO, "went": WENT, "role": tuple(ROLES)},
    **{"thing": THINGS, "the_thing": THINGS, "look": LOOKS, "the_look": LOOKS},
    **{"She": ("She", "He"), "Her": ("Her", "His"), "girl": ("girl", "boy")},
    **dict.fromkeys(("place", "elsewhere", "thing_place", "subject_place", "who_place", "asked_place"), PLACES),
    **dict.fromkeys(("hero", "friend", "new", "who", "other", "mover", "holder", "finder", "she_named"), NAMES),
    **dict.fromkeys(("giver", "receiver", "asked", "answerer"), NAMES),
}

# ... and what the scene, and the slots further left, leave of it. All that is left is equally likely.
LEFT: dict[str, Callable[[Scene, Said], Options]] = {
    "She": lambda scene, said: ["She" if scene.subject in GIRLS else "He"],
    "Her": lambda scene, said: ["Her" if scene.subject in GIRLS else "His"],
    "girl": lambda scene, said: ["girl" if scene.subject in GIRLS else "boy"],
    "friend": lambda scene, said: [name for name in ROLES[said["role"]] if name not in scene.at],
    "new": lambda scene, said: [name for name in NAMES if name not in scene.at],
    "who": lambda scene, said: list(scene.at),
    "other": lambda scene, said: scene.others(said["who"]),
    "mover": lambda scene, said: scene.others(scene.holder),
    "holder": lambda scene, said: [scene.holder],
    "finder": lambda scene, said: list(scene.at),
    "she_named": lambda scene, said: [scene.subject],
    "who_place": lambda scene, said: [scene.at[said["who"]]],
    "giver": lambda scene, said: [scene.giver],
    "receiver": lambda scene, said: scene.others(scene.holder),
    "asked": lambda scene, said: [scene.question[1]],
    "answerer": lambda scene, said: scene.others(scene.question[0]),
    "elsewhere": lambda scene, said: [p for p in PLACES if p != scene.at[said.get("mover") or scene.holder]],
    "subject_place": lambda scene, said: [scene.at[scene.subject]],
    "asked_place": lambda scene, said: [scene.at[scene.question[1]]],
    "thing_place": lambda scene, said: [scene.thing_place],
    "the_thing": lambda scene, said: [scene.thing],
    "the_look": lambda scene, said: [scene.look],
}


@dataclass(frozen=True)
class Rule:
    """One kind of sentence: what it says, how often, when it may be said, and what is true after it."""

    part: str
    text: str
    weight: float = 1
    when: Callable[[Scene], object] = lambda scene: True
    then: Callable[[Scene, Said], dict] = lambda scene, said: {}
    about: str = ""  # the slot of the one person it is about, whom "she" or "he" may mean in the next sentence

    @cached_property
    def pieces(self) -> list[str]:
        """Literal text and slot names in turn: ``["", "holder", " sent that ", "the_look", ...]``."""
        return re.split(r"\{(\w+)\}", self.text)


def _goes(person: str, place: str) -> Callable[[Scene, Said], dict]:
    return lambda scene, said: {"at": {**scene.at, said[person]: said[place]}}


RULES = (
    Rule("begin", "One {weather} {time}, {hero} went to the {place}.", 3, then=_goes("hero", "place"), about="hero"),
    Rule(
        "begin",
        "It was a {weather} {time}, and {hero} ran to the {place}.",
        then=_goes("hero", "place"),
        about="hero",
    ),
    Rule("who", "{She} was a {trait} {girl}.", about="She"),
    Rule("who", "{She} was {feeling}.", about="She"),
    Rule("who", "{She} wanted to {do}.", about="She"),
    Rule(
        "thing",
        "{she_named} had a {look} {thing}.",
        4,
        then=lambda scene, said: {"look": said["look"], "thing": said["thing"], "holder": said["she_named"]},
        about="she_named",
    ),
    Rule(
        "thing",
        "Somebody took a {look} {thing} to the {place}.",
        then=lambda scene, said: {"look": said["look"], "thing": said["thing"], "lies_in": said["place"]},
        about="She",
    ),
    Rule("friend", "{Her} {role} {friend} went to the {place}.", 2, then=_goes("friend", "place"), about="friend"),
    Rule(
        "friend",
        "{Her} {role} {friend} was in the {subject_place} too.",
        then=_goes("friend", "subject_place"),
        about="friend",
    ),
    # Who goes where
    Rule("event", "{mover} {went} {how} to the {elsewhere}.", 5, then=_goes("mover", "elsewhere"), about="mover"),
    Rule(
        "event",
        "{holder} took that {the_look} {the_thing} to the {elsewhere}.",
        4,
        when=lambda scene: scene.holder,
        then=_goes("holder", "elsewhere"),
        about="holder",
    ),
    Rule(
        "event",
        "{soon} {new} went to the {place}.",
        2,
        when=lambda scene: len(scene.at) < MOST_PEOPLE,
        then=_goes("new", "place"),
        about="new",
    ),
    # Who has the thing
    Rule(
        "event",
        "{holder} sent that {the_look} {the_thing} to {receiver}.",
        4,
        when=lambda scene: scene.holder,
        then=lambda scene, said: {"holder": said["receiver"], "giver": said["holder"]},
    ),
    Rule(
        "event",
        '"Thank you, {giver}," said {holder}.',
        12,
        when=lambda scene: scene.giver,
    ),
    Rule(
        "event",
        "{holder} left that {the_look} {the_thing} in the {thing_place}.",
        1,
        when=lambda scene: scene.holder,
        then=lambda scene, said: {"holder": "", "lies_in": said["thing_place"]},
        about="holder",
    ),
    Rule(
        "event",
        "{finder} found that {the_look} {the_thing} in the {thing_place}.",
        8,
        when=lambda scene: not scene.holder,
        then=lambda scene, said: {
            "holder": said["finder"],
            "lies_in": "",
            "at": {**scene.at, said["finder"]: said["thing_place"]},
        },
        about="finder",
    ),
    # What else happens
    Rule("event", "{who} was {feeling}.", 2, about="who"),
    Rule("event", "{She} {did} in the {subject_place}.", 6, when=lambda scene: scene.subject, about="She"),
    Rule("event", "{She} ate a {taste} {food}.", 2, when=lambda scene: scene.subject, about="She"),
    Rule("event", "A {size} {animal} {passed} past {who}."),
    # What somebody says
    Rule("event", '"What a {nice} {the_thing}!" said {who}.'),
    Rule("event", '{who} said, "Let us {do} in the {who_place}".', 4, about="who"),
    Rule(
        "event",
        '"Where is that {the_look} {the_thing}?" asked {mover}.',
        3,
        then=lambda scene, said: {"question": (said["mover"], "")},
    ),
    Rule(
        "event",
        '"Where are you, {who}?" asked {other}.',
        3,
        then=lambda scene, said: {"question": (said["other"], said["who"])},
    ),
    Rule(
        "answer",
        '{answerer} said, "It is in the {thing_place}".',
        when=lambda scene: not scene.question[1] and not scene.holder,
    ),
    Rule(
        "answer",
        '{holder} said, "I have it in the {thing_place}".',
        when=lambda scene: not scene.question[1] and scene.holder,
        about="holder",
    ),
    Rule("answer", '{asked} said, "I am in the {asked_place}".', when=lambda scene: scene.question[1], about="asked"),
    # How it ends
    Rule(
        "fact",
        "In the end, {holder} had that {the_look} {the_thing} in the {thing_place}.",
        when=lambda scene: scene.holder,
    ),
    Rule(
        "fact",
        "In the end, that {the_look} {the_thing} was in the {thing_place}.",
        when=lambda scene: not scene.holder,
    ),
    Rule("end", "{who} and {other} were {feeling}."),
    Rule("end", "Everyone went home {feeling}."),
)
_BY_PART = {part: tuple(r for r in RULES if r.part == part) for part in dict.fromkeys(r.part for r in RULES)}
_NEXT_PART = {"begin": "who", "who": "thing", "thing": "friend", "friend": "event", "fact": "end", "end": "over"}


def choices(scene: Scene) -> list[tuple[Rule, float]]:
    """The rules that may make the next sentence, with their probabilities. None where the story is over."""
    if scene.part == "over":
        return []
    if scene.part == "event":
        stop = 1 / max(1, MOST_EVENTS + 1 - scene.events) if scene.events >= FEWEST_EVENTS else 0.0
        if scene.question[0]:
            return _shares("answer", scene, 1.0)
        return _shares("event", scene, 1 - stop) + _shares("fact", scene, stop)
    return _shares(scene.part, scene, 1.0)


def _shares(part: str, scene: Scene, mass: float) -> list[tuple[Rule, float]]:
    rules = [rule for rule in _BY_PART[part] if rule.when(scene)] if mass else []
    total = sum(rule.weight for rule in rules)
    return [(rule, mass * rule.weight / total) for rule in rules]


def options(scene: Scene, slot: str, said: Said) -> Options:
    """What may stand in a slot now, all equally likely."""
    return LEFT[slot](scene, said) if slot in LEFT else WORDS[slot]


def after(scene: Scene, rule: Rule, said: Said) -> Scene:
    """The scene when this has been said."""
    changes: dict = {"giver": "", "question": ("", ""), **rule.then(scene, said)}
    changes["part"] = _NEXT_PART.get(rule.part, "event")
    changes["events"] = scene.events + (rule.part in ("event", "answer"))
    changes["subject"] = scene.subject if rule.about == "She" else said.get(rule.about, "")
    return replace(scene, **changes)
