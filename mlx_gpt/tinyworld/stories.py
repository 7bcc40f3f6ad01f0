"""tinyworld: a corpus of short stories whose best possible loss is known.

A story is told by the rules of ``tinyworld/rules.py``. The same rules are read in three ways:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

from mlx_gpt.tinyworld.rules import RULES, WORDS, Options, Rule, Said, Scene, after, choices, options
from mlx_gpt.tinyworld.words import ROLES

# Writing ----------------------------------------------------------------------------------------------------------


def story(rng: random.Random) -> str:
    """Draw one story from the rules."""
    scene, sentences = Scene(), []
    while allowed := choices(scene):
        rule = rng.choices([rule for rule, _ in allowed], [share for _, share in allowed])[0]
        said: Said = {}
        text = rule.pieces[0]
        for slot, literal in zip(rule.pieces[1::2], rule.pieces[2::2], strict=True):
            said[slot] = rng.choice(options(scene, slot, said))
            text += said[slot] + literal
        sentences.append(text)
        scene = after(scene, rule, said)
    return " ".join(sentences)


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
