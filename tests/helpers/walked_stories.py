"""A story of tinyworld, taken apart step by step, for the tests that go through stories."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from mlx_gpt.tinyworld.rules import Rule, Said, Scene, after, choices, options
from mlx_gpt.tinyworld.stories import sentences


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
