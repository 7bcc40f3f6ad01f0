"""tinyworld: a corpus of short stories whose best possible loss is known.

A story is told by rules. Each rule is one sentence with slots, ``"{holder} sent that {the_thing} to {receiver}."``; the
scene (who is where, who has the thing, who was spoken of last) decides which rules may come next and what
may stand in each slot. The same rules are read in three ways:

    ``stories``         draws them at random: the corpus,
    ``read_story``      matches a text against them: its exact log-probability, or where it breaks,
    ``is_sentence``     asks of one sentence alone whether some story of this world contains it.

Since every choice has a stated probability, the entropy of the corpus is known, and with it the loss of a perfect
model (``best_loss``): no model can do better on average, and the distance to it is what is left to learn.
What a model must carry over twenty words and more: names, she or he, who has the thing, and where everything is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import log


def _words(text: str, between: str = " ") -> tuple[str, ...]:
    return tuple(text.split(between))


GIRLS = _words("Anna Lily Mia Rose Ella Ruby Nora Ivy Lucy Zoe Emma Clara Alice Maya Sara Molly")
BOYS = _words("Tom Ben Max Sam Leo Jack Finn Noah Paul Hugo Adam Oscar Luke Theo Dan Felix")
NAMES = GIRLS + BOYS
PLACES = _words(
    "garden kitchen park forest barn school library market attic cellar river hill lake tower mill bakery castle farm "
    "meadow cave"
)
THINGS = _words(
    "ball kite book hat drum doll boat lamp key cup box bell coin map ring rope shell stone spoon basket blanket "
    "whistle mirror feather pencil scarf lantern puzzle trumpet crown"
)
LOOKS = _words("red blue green yellow pink white black brown purple golden silver wooden new round heavy shiny")
TRAITS = _words("kind brave clever quiet funny gentle shy loyal cheerful curious careful lazy polite friendly")
FEELINGS = _words(
    "happy sad tired proud hungry glad excited sleepy calm cross worried surprised lonely merry bored thirsty"
)
WEATHER = _words("sunny rainy windy cloudy snowy warm cold foggy bright stormy misty frosty")
TIMES = _words("morning afternoon evening day")
TASTES = _words("sweet fresh tasty juicy crisp delicious")
FOODS = _words("apple pear plum bun pie cookie carrot cherry sandwich peach melon pancake biscuit tomato waffle muffin")
SIZES = _words("little big small tiny large young")
ANIMALS = _words("dog cat bird duck fox frog owl hen cow horse sheep mouse rabbit squirrel bee goat pig lamb hare deer")
PASSED = _words("ran flew hopped walked crept wandered rushed came")
DID = _words("sang danced played read rested swam climbed dug painted cooked laughed slept jumped skipped whistled")
DO = _words("sing dance play read rest swim climb dig paint cook laugh sleep jump skip whistle")
WENT = _words("went ran walked hurried")
HOW = _words(
    "happily quickly slowly quietly gladly proudly bravely eagerly carefully calmly cheerfully silently noisily"
)
SOON = _words("Then Soon Later")
NICE = _words("nice lovely pretty fine wonderful great beautiful splendid charming")
ROLES = {"sister": GIRLS, "brother": BOYS, "friend": NAMES, "cousin": NAMES, "neighbour": NAMES}

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


# Writing ----------------------------------------------------------------------------------------------------------


def story(rng: random.Random) -> str:
    """One story, drawn from the rules."""
    scene, sentences = Scene(), []
    while allowed := choices(scene):
        sentence, scene = tell(rng, scene, allowed)
        sentences.append(sentence)
    return " ".join(sentences)


def tell(
    rng: random.Random, scene: Scene, allowed: Sequence[tuple[Rule, float]], without: Collection[str] = ()
) -> tuple[str, Scene]:
    """One more sentence, by one of the rules ``allowed``, and the scene after it; ``without`` some words, if it can."""
    rule = rng.choices([rule for rule, _ in allowed], [share for _, share in allowed])[0]
    said: Said = {}
    for slot in rule.pieces[1::2]:
        left = options(scene, slot, said)
        if without:
            left = [word for word in left if word not in without] or left
        said[slot] = rng.choice(left)
    return rule.text.format(**said), after(scene, rule, said)


def stories(n: int, seed: int) -> list[str]:
    """The first n stories of a seed: the same ones every time."""
    rng = random.Random(seed)
    return [story(rng) for _ in range(n)]


# Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a text is to this world. A story of it has ``log_prob`` in nats; any other text has ``broken`` instead."""

    log_prob: float  # of what was read: all of the story, or the sentences before it breaks
    sentences: int  # how many sentences are right
    broken: str = ""  # the first sentence that is not, and why

    @property
    def valid(self) -> bool:
        return not self.broken


def read_story(text: str) -> Reading:
    """Match a text against the rules from its first sentence to its last."""
    scene, log_prob, count, start = Scene(), 0.0, 0, 0
    while allowed := choices(scene):
        choose_from = partial(options, scene)
        found = next(
            ((rule, p, match) for rule, p in allowed if (match := _match(rule, text, start, choose_from))), None
        )
        if found is None:
            return Reading(log_prob, count, _complain(text[start:], scene, count))
        rule, probability, (said, end, nats) = found
        log_prob += log(probability) - nats
        count += 1
        scene, start = after(scene, rule, said), end + 1  # past the space
    if start <= len(text):
        return Reading(log_prob, count, f"the story is over, but goes on: {text[start:]!r}")
    return Reading(log_prob, count)


def is_sentence(text: str) -> bool:
    """Is there a story of this world that contains this sentence?"""
    return any((match := _match(rule, text, 0, _anywhere)) and match[1] == len(text) for rule in RULES)


def sentences(text: str) -> list[str]:
    """Cut a text into sentences: in this world a full stop stands nowhere but at their ends."""
    return re.findall(r"\S[^.]*\.?", text)


def _anywhere(slot: str, said: Said) -> Options:
    # What holds inside a sentence whatever the scene: a sister is a girl, and nobody gives themselves a thing.
    if slot == "friend":
        return ROLES[said["role"]]
    if slot == "girl":
        return ["girl" if said["She"] == "She" else "boy"]
    return [option for option in WORDS[slot] if option not in said.values()]


def _match(
    rule: Rule, text: str, start: int, choose_from: Callable[[str, Said], Options]
) -> tuple[Said, int, float] | None:
    """Read one sentence with one rule: what stands in the slots, where it ends, the nats its slots took."""
    said: Said = {}
    nats = 0.0
    if not text.startswith(rule.pieces[0], start):
        return None
    start += len(rule.pieces[0])
    for slot, literal in zip(rule.pieces[1::2], rule.pieces[2::2], strict=True):
        allowed = choose_from(slot, said)
        word = next((option for option in allowed if text.startswith(option + literal, start)), None)
        if word is None:
            return None
        said[slot] = word
        nats += log(len(allowed))
        start += len(word) + len(literal)
    return said, start, nats


def _complain(rest: str, scene: Scene, count: int) -> str:
    sentence = next(iter(sentences(rest)), "")
    if not sentence:
        return f"the story stops after {count} sentences"
    if not is_sentence(sentence):
        return f"sentence {count + 1} is not of this world: {sentence!r}"
    people = ", ".join(f"{person} is in the {place}" for person, place in scene.at.items())
    where = f"the {scene.thing} is with {scene.holder or 'nobody'}, in the {scene.thing_place}" if scene.thing else ""
    facts = "; ".join(fact for fact in (people, where) if fact) or "nothing has been told yet"
    return f"sentence {count + 1} does not follow: {sentence!r} ({facts})"


def best_loss(documents: Sequence[str], n_tokens: int) -> float:
    """The loss of a model that knows the rules, in nats per token, on stories that make ``n_tokens`` tokens.

    A text has one tokenization, so the probability of the tokens is that of the text. Raises ``ValueError`` for a text
    that is no story: it has no probability here.
    """
    readings = [read_story(document) for document in documents]
    if broken := next((reading.broken for reading in readings if reading.broken), ""):
        raise ValueError(f"expected stories of tinyworld, but {broken}")
    return -sum(reading.log_prob for reading in readings) / n_tokens
