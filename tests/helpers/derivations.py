"""Derivations of tinyworld stories: a second parser, independent of the one under test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from mlx_gpt.tinyworld.rules import Rule, Scene, Slots, allowed_words, apply_rule, next_rules
from mlx_gpt.tinyworld.stories import split_sentences


class Step(NamedTuple):
    """One sentence of a story: the scene before it, the rule, and the words in its slots."""

    scene: Scene
    rule: Rule
    slots: Slots


def derive(text: str) -> Iterator[Step]:
    """Parse a story with regular expressions, trying every rule; assert that each sentence has one derivation."""
    scene = Scene()
    for sentence in split_sentences(text):
        fitting = [(rule, slots) for rule, _ in next_rules(scene) for slots in _fits(rule, scene, sentence)]
        assert len(fitting) == 1, f"{len(fitting)} ways to derive {sentence!r}"
        rule, slots = fitting[0]
        yield Step(scene, rule, slots)
        scene = apply_rule(scene, rule, slots)
    assert not next_rules(scene)


def _fits(rule: Rule, scene: Scene, sentence: str) -> list[Slots]:
    literals = [re.escape(literal) for literal in rule.pieces[::2]]
    found = re.fullmatch(r"(\w+)".join(literals), sentence)
    slots: Slots = {}
    for slot, word in zip(rule.pieces[1::2], found.groups() if found else (), strict=False):
        if word not in allowed_words(scene, slot, slots):
            return []
        slots[slot] = word
    return [slots] if found else []
