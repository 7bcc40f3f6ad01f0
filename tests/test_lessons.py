"""Exercises in who is where: every question has its answer in the text, and a lesson is over when it is learned."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text import tinyworld
from mlx_gpt.text.lessons import IDLE, LESSONS, Lesson, long_stories, long_story, pairs, questions
from mlx_gpt.text.tinyworld_rules import FEWEST_EVENTS, WORDS
from mlx_gpt.text.tinyworld_words import NAMES, PLACES
from mlx_gpt.text.tokenizer import Tokenizer, make_tokenizer
from mlx_gpt.train import head_start
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.head_start import EXAM, Exam, practise, roll_positions, share_right
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step

EVERY = pytest.mark.parametrize("lesson", LESSONS, ids=range(len(LESSONS)))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every word is one token."""
    texts = [text for lesson in LESSONS for text in lesson.documents(300, seed=0)]
    return make_tokenizer("bpe:870", lambda: texts)


def test_a_question_is_a_place_told_again_and_not_just_before() -> None:
    text = 'Tom ran to the mill. Tom sang in the mill. Mia ran to the park. Tom said, "I am in the mill".'
    assert questions(text) == [(text[: text.rindex(" mill")], "mill")]
    assert questions("Tom mill Mia park Mia mill Tom mill") == []  # Mia has moved; twice in a row
    assert questions("Tom mill Mia park Tom mill Mia park") == [
        ("Tom mill Mia park Tom", "mill"),
        ("Tom mill Mia park Tom mill Mia", "park"),
    ]


@EVERY
def test_a_lesson_asks_what_it_has_told_and_fills_its_window(lesson: Lesson, tokenizer: Tokenizer) -> None:
    documents = lesson.documents(40, seed=3)
    assert documents == lesson.documents(40, seed=3)
    assert documents != lesson.documents(40, seed=4)
    for text in documents:
        assert len(tokenizer.encode(text)) > lesson.window
        for before, place in questions(text):
            assert place in words(before)
            assert text[len(before) :].startswith(f" {place}")
    fitting = [q for text in documents for q in questions(text) if len(tokenizer.encode(q[0])) < lesson.window]
    assert len(fitting) > 20


def test_the_same_person_has_the_same_place_until_it_moves() -> None:
    *still, moving = LESSONS
    for lesson in still:
        for text in lesson.documents(20, seed=1):
            told = [word for word in words(text) if word in NAMES + PLACES]
            at: dict[str, str] = {}
            for who, place in pairwise(told):
                if who in NAMES and place in PLACES:
                    assert at.setdefault(who, place) == place
    places = [{word for word in words(text) if word in PLACES} for text in moving.documents(20, seed=1)]
    assert max(map(len, places)) > 4  # and three people


def test_a_long_story_is_tinyworld_without_an_end_and_nothing_idle() -> None:
    idle = {word for slot in IDLE for word in WORDS[slot]}
    for text in Lesson(long_story, 1, 144, 1, 1.0, 1).documents(30, seed=1):
        assert not idle & set(words(text))
        reading = tinyworld.read_story(text)  # it goes on after as many events as a story has, and no further
        assert reading.sentences > FEWEST_EVENTS + 4
        assert "does not follow" in reading.broken
        assert len(set(PLACES) & set(words(text))) <= 4
        assert len(set(NAMES) & set(words(text))) <= 3


def test_long_stories_fill_the_tokens_that_they_are_given(tokenizer: Tokenizer) -> None:
    lesson = long_stories(rows=16, window=144, tokens=9_216)
    assert (lesson.rows, lesson.window, lesson.tokens) == (16, 144, 9_216)
    assert lesson.goal == 1
    assert sum(len(tokenizer.encode(text)) for text in lesson.documents(1 + 9_216 // 288, seed=0)) > 9_216 / 2


@pytest.mark.parametrize("between", [0, 1, 6])
@pytest.mark.parametrize("apart", [0, 0.5, 1])
def test_the_distance_is_what_was_asked_for(apart: float, between: int) -> None:
    texts = Lesson(partial(pairs, apart=apart, between=between), 1, 24, 1, 1.0, 1).documents(30, seed=0)
    distances = []
    for text in texts:
        told = words(text)
        for i, word in enumerate(told):
            if word in NAMES:
                distances.append(next(j for j, later in enumerate(told[i:]) if later in PLACES) - 1)
    far = [distance for distance in distances if distance]
    assert set(far) == ({2 + n for n in range(between + 1)} if apart else set())  # "in the" counts
    assert len(far) / len(distances) == pytest.approx(apart, abs=0.06)


class Reader:
    """A model that reads: it says where the last person named was told to be, or just the last place."""

    def __init__(self, tokenizer: Tokenizer, knows: bool):
        self.tokenizer, self.knows = tokenizer, knows

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def hidden(self, ids: np.ndarray) -> mx.array:
        """What it will say, as one number for each word."""
        every = np.zeros((*ids.shape, self.tokenizer.vocab_size), np.float32)
        for row, said in zip(ids, every, strict=True):
            end = (*row[1:], self.tokenizer.eot_id).index(self.tokenizer.eot_id)  # of the prompt
            at, who, last = {"": "mill"}, "", "mill"
            for word in words(self.tokenizer.decode(row[1 : end + 1].tolist())):
                if word in NAMES:
                    who = word
                elif word in PLACES:
                    at[who] = last = word
            answer = at[who] if self.knows else last
            said[end, self.tokenizer.encode(f" {answer}")[0]] = 1
        return mx.array(every)

    def logits(self, x: mx.array) -> mx.array:
        return x


@EVERY
def test_an_exam_tells_who_knows_from_who_repeats_the_last_place(lesson: Lesson, tokenizer: Tokenizer) -> None:
    exam = Exam.of(lesson, tokenizer, seed=0)
    assert exam.texts.shape == (EXAM // lesson.window, lesson.window)
    assert share_right(Reader(tokenizer, knows=True), exam) == 1  # type: ignore[arg-type]
    assert share_right(Reader(tokenizer, knows=False), exam) == 0  # type: ignore[arg-type]


def practised(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, rate: float, goal: float = 0.9
) -> list[dict[str, mx.array]]:
    """Weights before and after a lesson of five steps, in half of the positions."""
    lesson = Lesson(partial(pairs, apart=0), 20, 24, 5 * 480, goal, rate)
    monkeypatch.setattr(head_start, "STEPS_BETWEEN", 2)
    mx.random.seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=48, n_embd=16, n_layer=1, n_head=2))
    before = dict(tree_flatten(model.parameters()))
    practise(model, tokenizer, TrainConfig(steps=1, optimizer="muon"), [lesson])
    return [before, dict(tree_flatten(model.parameters()))]


@pytest.mark.parametrize(("goal", "learned", "exams"), [(0.9, 1.0, 1), (0.9, 0.0, 2), (1.0, 1.0, 0)])
def test_a_lesson_ends_when_it_is_learned_or_its_tokens_are_used_up(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, goal: float, learned: float, exams: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(head_start, "share_right", lambda *_: (asked.append(1), learned)[1])
    before, after = practised(monkeypatch, tokenizer, 0.3, goal)
    assert len(asked) == exams
    assert not mx.array_equal(before["wte.weight"], after["wte.weight"])
    assert all(mx.isfinite(weight).all() for weight in after.values())


def test_the_rate_of_a_lesson_scales_every_step(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(rate: float) -> dict[str, float]:
        before, after = practised(monkeypatch, tokenizer, rate)
        return {name: float(mx.abs(after[name] - before[name]).max()) for name in before}

    whole, tenth, none = moved(1), moved(0.1), moved(0)
    for name in whole:
        assert none[name] == 0 < tenth[name] < 0.3 * whole[name]


def test_a_lesson_trains_the_positions_past_its_window_too(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = practised(monkeypatch, tokenizer, rate=1)
    moved = np.array(mx.abs(after["wpe.weight"] - before["wpe.weight"]).max(axis=1))
    assert (moved > 1e-3).mean() > 0.75  # five windows, each half as long as the context


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_position_takes_with_it_what_the_optimizer_keeps_of_it(name: str) -> None:
    model = GPT(GPTConfig(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    optimizer = make_optimizer(name, muon_embeddings=True, n_head=2)
    step = make_train_step(model, optimizer, clip=1.0, batch_size=2)
    ids = mx.array(np.random.default_rng(0).integers(0, 20, (2, 9)), mx.int32)

    def rows() -> dict[str, np.ndarray]:
        state = [value for key, value in tree_flatten(optimizer.state) if "wpe" in key and value.ndim == 2]
        return {str(i): np.array(one) for i, one in enumerate([model.wpe.weight, *state])}

    mx.eval(step(ids[:, :-1], ids[:, 1:]), step.state)
    before = rows()
    assert len(before) == 3  # the vectors, and their gradients' two moments
    roll_positions(model, optimizer, 3)
    for key, rolled in rows().items():
        np.testing.assert_array_equal(rolled, np.roll(before[key], 3, axis=0))
    roll_positions(model, optimizer, -3)
    mx.eval(step(ids[:, :-1], ids[:, 1:]), step.state)  # goes on with them
    assert not np.array_equal(rows()["0"], before["0"])
