"""Exercises before the stories: who is where, with ever more words between the name and the place.

To tell where somebody is, a model must have kept the name where the place was told, keep it again where the place is
asked for, and match the two. Two of these without the third are worth nothing, so that a small model does not find the
three in stories (10 million tokens were not enough). Next to each other, name and place are soon matched; from there
the distance can grow, until the lessons are stories in which nearly every sentence asks for something told before.
First the short sequence, then the long one: Bengio et al. 2009, "Curriculum learning".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mlx_gpt.text.tinyworld import tell
from mlx_gpt.text.tinyworld_rules import WORDS, Scene, choices
from mlx_gpt.text.tinyworld_words import BOYS, GIRLS, NAMES, PLACES

N_PAIRS = 24
N_SENTENCES = 24

OTHER_WORDS = tuple(
    word
    for slot in ("weather", "time", "trait", "feeling", "do", "did", "how", "nice", "look", "thing", "animal", "went")
    for word in WORDS[slot]
)
GOES = "{who} {went} {how} to the {place}."
IS = (
    "{who} {did} in the {place}.",
    "{who} was in the {place} too.",
    '{who} said, "Let us {do} in the {place}".',
    '{who} said, "I am in the {place}".',
    '"Where are you, {who}?" asked {other}. {who} said, "I am in the {place}".',
    "{who} was {feeling}. {She} {did} in the {place}.",
)
IDLE = {"feeling", "food", "animal", "nice"}  # slots of the sentences of a story that ask nothing of what was told


@dataclass(frozen=True)
class Lesson:
    """Documents to learn one thing from: ``write`` makes one. ``rows`` B and ``window`` T are what a step looks at.

    The lesson is over when the share ``goal`` of the places asked for is right, or after ``tokens``; with a goal of 1
    nobody asks. ``rate`` is what the learning rates are multiplied by.
    """

    write: Callable[[random.Random], str]
    rows: int
    window: int
    tokens: int
    goal: float
    rate: float

    def documents(self, n: int, seed: int) -> list[str]:
        """The first n documents of a seed: the same ones every time."""
        rng = random.Random(seed)
        return [self.write(rng) for _ in range(n)]


def questions(text: str) -> list[tuple[str, str]]:
    """The places that a text tells for the second time of the same person, and not twice in a row: text before, place.

    What a model says after the text before them shows whether it knows who is where.
    """
    found: list[tuple[str, str]] = []
    at: dict[str, str] = {}
    who = last = ""
    for word in re.finditer(r"\w+", text):
        if word[0] in NAMES:
            who = word[0]
        elif word[0] in PLACES:
            if at.get(who) == word[0] != last:
                found.append((text[: word.start() - 1], word[0]))
            at[who] = last = word[0]
    return found


def pairs(rng: random.Random, apart: float, between: int = 0) -> str:
    """Names of four people, each with its place, always the same: ``"Nora mill Tom shy in the park Nora mill"``.

    A share ``apart`` of the pairs has up to ``between`` other words, and then "in the", between name and place.
    """
    people, at = rng.sample(NAMES, 4), rng.sample(PLACES, 4)
    words: list[str] = []
    for who in rng.choices(range(4), k=N_PAIRS):
        far = [*rng.choices(OTHER_WORDS, k=rng.randint(0, between)), "in", "the"] if rng.random() < apart else []
        words += [people[who], *far, at[who]]
    return " ".join(words)


def sentences(rng: random.Random, n_people: int, moves: float) -> str:
    """So many people go about, and say where they are: ``"Tom ran gladly to the mill. Tom said, "I am in the mill"."``

    ``moves`` is the share of the sentences in which somebody goes somewhere else. Where nobody does, they go where they
    are.
    """
    people = rng.sample(NAMES, n_people)
    at: dict[str, str] = {}
    told: list[str] = []
    for _ in range(N_SENTENCES):
        who, other = rng.sample(people, 2)
        form = rng.choice(IS if moves else (*IS, GOES))
        if who not in at or rng.random() < moves:
            form, at[who] = GOES, rng.choice([place for place in PLACES if place != at.get(who)])
        words = {slot: rng.choice(WORDS[slot]) for slot in ("went", "how", "do", "did", "feeling")}
        she = "She" if who in GIRLS else "He"
        told.append(form.format(who=who, other=other, place=at[who], She=she, **words))
    return " ".join(told)


def long_story(rng: random.Random) -> str:
    """A story of tinyworld that does not end, without the sentences that ask nothing of what was told.

    It has few people and places, so that to know who and what it is not is worth more: whoever goes somewhere goes to
    one of three places, not of nineteen.
    """
    few = {*rng.sample(PLACES, 4), *rng.sample(GIRLS, 2), *rng.sample(BOYS, 2)}
    others = {*NAMES, *PLACES} - few
    scene, told = Scene(), []
    for _ in range(N_SENTENCES):
        allowed = [(rule, share) for rule, share in choices(scene) if not IDLE & set(rule.pieces[1::2])]
        sentence, scene = tell(rng, scene, allowed, without=others)
        told.append(sentence.text)
        scene = replace(scene, events=0)  # a story ends after so many
    return " ".join(told)


# Windows grow with the distance: in a long one a match is a needle in a haystack, and is not found. Once it is found,
# smaller steps: with larger ones it stays a match in three of four cases, or is lost again. While half of the pairs
# stay side by side, a place can be looked up there before the name is found at a distance. That lesson may take long:
# without six right of ten, and that not by luck, some seeds learn nothing more.
FINER = 0.3
LESSONS = (
    Lesson(partial(pairs, apart=0), rows=20, window=24, tokens=600_000, goal=0.7, rate=1),
    Lesson(partial(pairs, apart=0.5, between=1), rows=20, window=24, tokens=900_000, goal=0.65, rate=FINER),
    Lesson(partial(pairs, apart=1, between=1), rows=16, window=30, tokens=500_000, goal=0.85, rate=FINER),
    Lesson(partial(pairs, apart=1, between=6), rows=8, window=60, tokens=300_000, goal=0.9, rate=FINER),
    Lesson(partial(sentences, n_people=4, moves=0), rows=8, window=60, tokens=200_000, goal=0.9, rate=FINER),
    Lesson(partial(sentences, n_people=3, moves=0.35), rows=6, window=80, tokens=200_000, goal=0.9, rate=FINER),
)


def long_stories(rows: int, window: int, tokens: int) -> Lesson:
    """What comes between the lessons and the stories, for as many tokens as there are."""
    return Lesson(long_story, rows, window, tokens, goal=1, rate=FINER)
