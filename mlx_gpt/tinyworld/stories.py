"""tinyworld: a corpus of short stories whose best possible loss is known.

The rules of ``tinyworld/rules.py`` are used in three ways:

    ``generate_stories``  draws from them: the corpus,
    ``parse_story``       matches a text against them: its exact log-probability, or its first error,
    ``is_sentence``       tests if a single sentence occurs in some story.

Every choice has a stated probability, so the entropy of the corpus is known, and with it the loss of a perfect model
(``best_loss``): no model can do better on average. Names, pronouns, the owner of the thing and all places must be
carried over twenty words and more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import log
from multiprocessing import get_context

from mlx_gpt.tinyworld.rules import RULES, WORDS, Options, Rule, Scene, Slots, allowed_words, apply_rule, next_rules
from mlx_gpt.tinyworld.words import ROLES

CHUNK = 20_000  # stories that one random generator draws

# Generating -----------------------------------------------------------------------------------------------------------


def generate_story(rng: random.Random) -> str:
    """Draw one story from the rules."""
    scene, sentences = Scene(), []
    while choices := next_rules(scene):
        rule = rng.choices(*zip(*choices, strict=True))[0]
        slots: Slots = {}
        text = rule.pieces[0]
        for slot, literal in rule.slots:
            slots[slot] = rng.choice(allowed_words(scene, slot, slots))
            text += slots[slot] + literal
        sentences.append(text)
        scene = apply_rule(scene, rule, slots)
    return " ".join(sentences)


def generate_stories(n: int, seed: int, processes: int = 1) -> list[str]:
    """Return the first n stories of a seed, the same for any number of processes.

    Each chunk of ``CHUNK`` stories has its own random generator. More than one process starts only for more than one
    chunk. They are spawned, so a script that asks for them needs an ``if __name__ == "__main__"`` guard.
    """
    sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
    generate = partial(_generate_chunk, seed)
    processes = min(processes, len(sizes))
    if processes <= 1:
        return list(chain.from_iterable(map(generate, range(len(sizes)), sizes)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(generate, range(len(sizes)), sizes)))


def _generate_chunk(seed: int, chunk: int, n: int) -> list[str]:
    rng = random.Random(f"{seed} {chunk}" if chunk else seed)
    return [generate_story(rng) for _ in range(n)]


# Parsing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parse:
    """The result of ``parse_story``: ``log_prob`` for a story, ``error`` for any other text."""

    log_prob: float  # in nats, of the valid sentences at the beginning
    n_sentences: int  # how many these are
    error: str = ""  # the first invalid sentence, and the reason

    @property
    def valid(self) -> bool:
        return not self.error


def parse_story(text: str) -> Parse:
    """Match a text against the rules, sentence by sentence."""
    scene, log_prob, count, start = Scene(), 0.0, 0, 0
    while choices := next_rules(scene):
        allowed = partial(allowed_words, scene)
        found = next(((rule, p, match) for rule, p in choices if (match := _match(rule, text, start, allowed))), None)
        if found is None:
            return Parse(log_prob, count, _error(text[start:], scene, count))
        rule, probability, (slots, end, nats) = found
        log_prob += log(probability) - nats
        count += 1
        scene, start = apply_rule(scene, rule, slots), end + 1  # past the space
    if start <= len(text):
        return Parse(log_prob, count, f"text after the end of the story: {text[start:]!r}")
    return Parse(log_prob, count)


def is_sentence(text: str) -> bool:
    """Return True if some story contains this sentence."""
    return any((match := _match(rule, text, 0, _allowed_anywhere)) and match[1] == len(text) for rule in RULES)


def split_sentences(text: str) -> list[str]:
    """Split a text after each full stop; tinyworld has none inside a sentence."""
    return re.findall(r"\S[^.]*\.?", text)


def _allowed_anywhere(slot: str, slots: Slots) -> Options:
    """Return the words that some scene allows in a slot: a sister is a girl, a name occurs once in a sentence."""
    if slot == "friend":
        return ROLES[slots["role"]]
    if slot == "girl":
        return ["girl" if slots["She"] == "She" else "boy"]
    return [option for option in WORDS[slot] if option not in slots.values()]


def _match(
    rule: Rule, text: str, start: int, allowed: Callable[[str, Slots], Options]
) -> tuple[Slots, int, float] | None:
    """Match a sentence at ``start``; return its slots, its end and the negative log-probability of its words."""
    if not text.startswith(rule.pieces[0], start):
        return None
    slots: Slots = {}
    nats = 0.0
    start += len(rule.pieces[0])
    for slot, literal in rule.slots:
        options = allowed(slot, slots)
        word = next((option for option in options if text.startswith(option + literal, start)), None)
        if word is None:
            return None
        slots[slot] = word
        nats += log(len(options))
        start += len(word) + len(literal)
    return slots, start, nats


def _error(rest: str, scene: Scene, count: int) -> str:
    sentence = next(iter(split_sentences(rest)), "")
    if not sentence:
        return f"the story stops after {count} sentences"
    if not is_sentence(sentence):
        return f"sentence {count + 1} is not in the grammar: {sentence!r}"
    facts = [f"{person} is in the {place}" for person, place in scene.at.items()]
    if scene.thing:
        facts.append(f"the {scene.thing} is with {scene.holder or 'no one'}, in the {scene.thing_place}")
    return f"sentence {count + 1} does not follow: {sentence!r} ({', '.join(facts) or 'at the beginning'})"


def best_loss(stories: Sequence[str], n_tokens: int) -> float:
    """Return the loss of a model that knows the rules, in nats per token, on stories of ``n_tokens`` tokens.

    A text has one tokenization, so the probability of its tokens is that of the text. Raises ``ValueError`` for a text
    that is no story, which has no probability.
    """
    parses = [parse_story(story) for story in stories]
    if error := next((parse.error for parse in parses if parse.error), ""):
        raise ValueError(f"expected stories of tinyworld, but {error}")
    return -sum(parse.log_prob for parse in parses) / n_tokens
