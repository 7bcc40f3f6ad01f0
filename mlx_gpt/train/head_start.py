"""What a small model has before it sees its first story: weights that are no noise, and lessons in who is where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.lessons import LESSONS, Lesson, questions
from mlx_gpt.text.shards import TokenStream, endless_batches
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.loop import optimizer_of
from mlx_gpt.train.optimizer import Schedule
from mlx_gpt.train.step import make_train_step

EXAM = 4_800  # tokens that an exam looks at: of short texts 200, or luck would end a lesson
STEPS_BETWEEN = 60  # two exams


def head_start(model: GPT, seed: int) -> None:
    """Weights to start from, in place of noise: a head looks for what is like its own token, and moves it whole.

    Positions are sinusoids, so that neighbours look alike (Vaswani et al. 2017, section 3.5). Queries are equal to keys
    (Trockman and Kolter 2023, "Mimetic initialization of self-attention layers"), values and outputs orthogonal. From
    the third block on, the later half of the heads has its keys turned round and looks for what is unlike: who is not
    the one just named. The last block takes away what it finds: what is about to be said and has been said, as heads of
    GPT-2 do (McDougall et al. 2023, "Copy suppression: comprehensively understanding an attention head"). The scales
    were chosen by trial on runs of 1.6 M tokens. All of it is trained like any other weight.
    """
    C, D, rng = model.config.n_embd, model.config.head_dim, np.random.default_rng(seed)
    later = model.config.n_head // 2 * D  # rows of the later heads: whole ones, and never of the only one
    frequencies = 10000.0 ** (-2 * mx.arange(C // 2) / C)  # (C/2,)
    angles = mx.arange(model.config.n_positions)[:, None] * frequencies  # (T, C/2)
    model.wpe.weight = 0.01 * mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)
    for layer, block in enumerate(model.h):
        query = rng.normal(scale=0.1, size=(C, C))
        key = query.copy()
        value, output = (0.4 * np.linalg.qr(rng.normal(size=(C, C)))[0] for _ in range(2))
        if layer == len(model.h) - 1:
            output = -value.T
        elif layer >= 2:
            key[C - later :] *= -1
        block.attn.c_attn.weight = mx.array(np.concatenate([query, key, value]).astype(np.float32))
        block.attn.c_proj.weight = mx.array(output.astype(np.float32))


def practise(model: GPT, tokenizer: Tokenizer, config: TrainConfig, lessons: Sequence[Lesson] = LESSONS) -> None:
    """Train on lessons, one after the other, each until it is learned, with the optimizer of ``config``.

    A lesson that is not learned in its number of tokens is left: the stories have to do then. Windows begin at any of
    the model's positions, or what is learned in a short one would hold at its positions only (Kiyono et al. 2021,
    "SHAPE: Shifted Absolute Position Embedding for Transformers").
    """
    optimizer = optimizer_of(config, model.config.n_head)
    schedule = Schedule(optimizer)
    rng = random.Random(config.seed)
    for lesson in lessons:
        T, B = lesson.window, lesson.rows
        documents = lesson.documents(1 + lesson.tokens // (2 * T), config.seed)
        batches = endless_batches(TokenStream.from_documents(documents, tokenizer), T, B, config.seed)
        schedule.scale(lesson.rate)
        step = make_train_step(model, optimizer, config.grad_clip, B)
        exam = Exam.of(lesson, tokenizer, config.seed + 1) if lesson.goal < 1 else None
        for n, (x, y) in enumerate(islice(batches, lesson.tokens // (B * T)), start=1):
            start = rng.randrange(model.config.n_positions - T + 1)
            roll_positions(model, optimizer, -start)
            mx.eval(step(x, y), step.state)
            roll_positions(model, optimizer, start)
            if exam and n % STEPS_BETWEEN == 0 and share_right(model, exam) >= lesson.goal:
                break
    model.eval()


def roll_positions(model: GPT, optimizer: optim.MultiOptimizer, by: int) -> None:
    """Let each position have the vector of the one so many before it, with what the optimizer keeps of that."""

    def rolled(rows: mx.array) -> mx.array:
        return mx.roll(rows, by, 0)

    model.wpe.weight = rolled(model.wpe.weight)
    for one in optimizer.optimizers:
        if "wpe" in one.state:
            one.state["wpe"]["weight"] = tree_map(rolled, one.state["wpe"]["weight"])


class Exam(NamedTuple):
    """Texts (N, T) that ask for a place after token ``last`` (N,), where ``answers`` (N,) has to come."""

    texts: np.ndarray
    last: mx.array
    answers: mx.array

    @classmethod
    def of(cls, lesson: Lesson, tokenizer: Tokenizer, seed: int) -> Exam:
        """Questions that fit into the window, as many as ``EXAM`` has room for, each of another document."""
        T, rng = lesson.window, random.Random(seed)
        n = EXAM // T
        prompts, answers = [], []
        for text in lesson.documents(4 * n, seed):
            asked = [([tokenizer.eot_id, *tokenizer.encode(before)], place) for before, place in questions(text)]
            if fitting := [(ids, place) for ids, place in asked if len(ids) <= T]:
                prompt, place = rng.choice(fitting)
                prompts.append(prompt)
                answers.append(tokenizer.encode(f" {place}")[0])
            if len(prompts) == n:
                break
        texts = np.full((len(prompts), T), tokenizer.eot_id, np.int32)
        for row, prompt in zip(texts, prompts, strict=True):
            row[: len(prompt)] = prompt  # what follows, an earlier position does not see
        return cls(texts, mx.array([len(prompt) - 1 for prompt in prompts]), mx.array(answers))


def share_right(model: GPT, exam: Exam) -> float:
    """How many of the places that an exam asks for the model knows. Chance is one in three and less."""
    model.eval()
    asked = model.hidden(exam.texts)[mx.arange(len(exam.texts)), exam.last]  # (N, C)
    said = model.logits(asked).argmax(axis=-1)
    model.train()
    return float(mx.mean(said == exam.answers))
