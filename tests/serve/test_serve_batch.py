"""The server's batches, without HTTP: rows that join and leave at any turn have the text they have alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt import device
from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.generate.writer import Token
from mlx_gpt.model.gpt import GPT
from mlx_gpt.serve.batch import MAX_GROUP, Batch, similar_lengths
from mlx_gpt.serve.engine import Engine, Event
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
P = 48
CONFIG = GPTConfig(vocab_size=260, n_positions=P, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
ENDLESS: dict[str, Any] = {"logit_bias": {TOKENIZER.eot_id: -100.0}}

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 20},
    {"temperature": 1.0, "max_tokens": 30},
    {"temperature": 0.7, "top_p": 0.8, "max_tokens": 9},
    {"temperature": 0.0, "max_tokens": 40, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 1.3, "max_tokens": 25, "frequency_penalty": -0.5} | ENDLESS,
    {"temperature": 1.0, "max_tokens": 12, "logit_bias": {65: 100.0}},
    {"temperature": 1.0, "max_tokens": 1},
    {"temperature": 0.9, "max_tokens": 1000} | ENDLESS,
    {"temperature": 1.2, "top_k": 7, "min_p": 0.02, "max_tokens": 20},
    {"temperature": 1.0, "typical_p": 0.6, "min_tokens": 9, "max_tokens": 20},
    {"temperature": 0.0, "repetition_penalty": 1.4, "no_repeat_ngram": 2, "max_tokens": 20},
    {"temperature": 1.1, "top_k": 3, "ban": ("a", "e"), "force": ("ox",), "max_tokens": 15},
]
PROMPTS = ["a somewhat longer prompt", "a", ""]


@pytest.fixture(scope="module")
def model() -> GPT:
    mx.random.seed(0)
    return GPT(CONFIG).eval()


def row(prompt: str = "ab", seed: int = 0, index: int = 0, **settings: Any) -> Row:
    return Row(TOKENIZER, P, TOKENIZER.encode(prompt), GenerationSettings(**settings), seed, index)


def run(batch: Batch, arrivals: dict[int, list[Row]]) -> dict[Row, list[int]]:
    """Return the ids of each row's text; ``arrivals`` maps turns to the rows that join."""
    texts: dict[Row, list[int]] = {}
    turn = 0
    while arrivals or batch.rows:
        if new := arrivals.pop(turn, []):
            texts |= {row: [] for row in new}
            batch.add(new)
        if batch.rows:
            for row, token in batch.turn():
                texts[row] += [piece.token.id for piece in row.push(token) if piece.token]
            batch.keep([row for row in batch.rows if not row.reason])
        turn += 1
    return texts


def generated(model: GPT, prompts: list[str], seed: int, **settings: Any) -> list[list[int]]:
    """Return the ids of ``generate`` for each prompt."""
    generation = Generation(
        model, TOKENIZER, [TOKENIZER.encode(p) for p in prompts], GenerationSettings(seed=seed, **settings)
    )
    ids: list[list[int]] = [[] for _ in prompts]
    for i, piece in generation:
        ids[i] += [piece.token.id] if piece.token else []
    return ids


# Rows


def test_each_row_has_the_text_of_generate_whenever_it_joins_and_beside_any_settings(model: GPT) -> None:
    turns = iter(np.random.default_rng(0).integers(40, size=len(PROMPTS) * len(KINDS)))
    arrivals: dict[int, list[Row]] = {}
    rows = []
    for i, prompt in enumerate(PROMPTS):
        for kind, settings in enumerate(KINDS):
            rows.append((kind, i, row(prompt, seed=kind, index=i, **settings)))
            arrivals.setdefault(int(next(turns)), []).append(rows[-1][-1])
    texts = run(Batch(model, TOKENIZER), arrivals)
    expected = [generated(model, PROMPTS, kind, **settings) for kind, settings in enumerate(KINDS)]
    for kind, i, new in rows:
        assert texts[new] == expected[kind][i]
    assert {new.reason for *_, new in rows} >= {"length", "context"}
    assert len({tuple(ids) for ids in texts.values()}) > 18


def test_rows_of_one_prompt_differ_by_their_index(model: GPT) -> None:
    rows = [row("ab", 5, index, temperature=1.0, max_tokens=12) for index in range(4)]
    texts = run(Batch(model, TOKENIZER), {0: rows})
    assert [texts[one] for one in rows] == generated(model, ["ab"] * 4, 5, temperature=1.0, max_tokens=12)
    assert len({tuple(ids) for ids in texts.values()}) == 4


def test_ids_that_pad_the_vocabulary_are_never_generated(model: GPT) -> None:
    texts = run(Batch(model, TOKENIZER), {0: [row(seed=i, temperature=2.0, max_tokens=40) for i in range(16)]})
    assert max(max(ids, default=0) for ids in texts.values()) < TOKENIZER.vocab_size < CONFIG.vocab_size


def test_unused_slots_are_freed(model: GPT) -> None:
    batch = Batch(model, TOKENIZER)
    long, short = row("x" * 40, max_tokens=2, **ENDLESS), row("y", max_tokens=30, **ENDLESS)
    used = []
    batch.add([long, short])
    while batch.rows:
        for one, token in batch.turn():
            one.push(token)
        batch.keep([one for one in batch.rows if not one.reason])
        used.append(batch._decoder.offset)
    assert max(used) >= 40
    assert used[3] < 8  # the long one has left
    assert batch._decoder.offset == 0


def test_a_batch_runs_for_longer_than_the_context(model: GPT) -> None:
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0} | ENDLESS
    rows = [row("ab", 0, i, **settings) for i in range(20)]
    batch = Batch(model, TOKENIZER)
    texts = run(batch, {7 * i: [new] for i, new in enumerate(rows)})
    assert 3 * P < 7 * 20 + 30
    assert [texts[new] for new in rows] == generated(model, ["ab"] * 20, 0, **settings)


def test_prompt_logprobs_are_those_of_the_model(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gpt.serve.batch.POSITIONS", 4)
    ids = list(b"a prompt of some length")
    tokens = Batch(model, TOKENIZER).prompt_tokens(Row(TOKENIZER, P, ids, GenerationSettings(logprobs=2)))
    logits = np.array(model([ids])[0]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert tokens[0] == Token(ids[0])
    for i in range(1, len(ids)):
        assert tokens[i].id == ids[i]
        assert tokens[i].logprob == pytest.approx(expected[i - 1, ids[i]], abs=1e-4)
        assert tokens[i].top[0][0] == expected[i - 1].argmax()


def test_prompts_of_similar_length_are_read_together() -> None:
    def lengths(*prompts: int) -> list[list[int]]:
        return [
            [len(prompt) for prompt in group] for group in similar_lengths([(i,) * n for i, n in enumerate(prompts)])
        ]

    assert lengths(5, 6, 7) == [[5, 6, 7]]
    assert lengths(1000, 3, 4) == [[3, 4], [1000]]
    assert lengths(*[MAX_GROUP // 2] * 3) == [[MAX_GROUP // 2] * 2, [MAX_GROUP // 2]]
    assert lengths(2 * MAX_GROUP) == [[2 * MAX_GROUP]]


# The engine


class Recorder:
    """Records the events of an engine and stops it when n rows have ended."""

    def __init__(self, model: GPT, n: int, max_rows: int = 4):
        self.events: list[Event] = []
        self.n = n
        self.most = 0
        self.engine = Engine(model, TOKENIZER, max_rows, self.take)

    def take(self, events: list[Event]) -> None:
        self.events += events
        self.most = max(self.most, len({event.row for event in events}))
        if sum(bool(event.reason or event.error) for event in self.events) >= self.n:
            self.engine.stop()

    def text(self, row: Row) -> str:
        return "".join(piece.text for event in self.events if event.row is row for piece in event.pieces)


def test_rows_beyond_the_maximum_wait(model: GPT) -> None:
    recorder = Recorder(model, 11)
    rows = [row("ab", i, max_tokens=5 + i, **ENDLESS) for i in range(11)]
    recorder.engine.submit(rows)
    recorder.engine.run()
    assert recorder.most == 4
    assert [one.n_tokens for one in rows] == [5 + i for i in range(11)]
    assert {one.reason for one in rows} == {"length"}


def test_a_slow_start_is_reported_for_the_first_prompt_and_the_first_token(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "begun", set())
    recorder = Recorder(model, 1)
    recorder.engine.submit([row("ab", 0, max_tokens=3, **ENDLESS)])
    recorder.engine.run()
    assert device.begun == {"prompt", "token"}


def test_a_cancelled_row_frees_its_place(model: GPT) -> None:
    recorder = Recorder(model, 3, max_rows=1)
    first, second, third, fourth = rows = [row("ab", i, max_tokens=30, **ENDLESS) for i in range(4)]
    recorder.n = 2
    take = recorder.take

    def cancel_on_the_way(events: list[Event]) -> None:
        take(events)
        if first.n_tokens == 3:
            recorder.engine.cancel([first, second])

    recorder.engine._deliver = cancel_on_the_way
    recorder.engine.submit(rows)
    recorder.engine.run()
    assert (first.reason, second.n_tokens) == (None, 0)
    assert (third.reason, fourth.reason) == ("length", "length")
    assert first.n_tokens <= 5


def test_zero_tokens_and_echo(model: GPT) -> None:
    recorder = Recorder(model, 2)
    nothing = Row(TOKENIZER, P, [1, 2], GenerationSettings(max_tokens=0))
    prompt = Row(TOKENIZER, P, TOKENIZER.encode("né"), GenerationSettings(max_tokens=0), echo=True)
    recorder.engine.submit([nothing, prompt])
    recorder.engine.run()
    assert (recorder.text(nothing), recorder.text(prompt)) == ("", "né")
    assert nothing.reason == prompt.reason == "length"


def test_a_failure_is_reported_and_the_next_rows_are_served(
    model: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    turn = Batch.turn

    def fails_once(batch: Batch) -> Any:
        calls.append(len(batch.rows))
        if len(calls) == 3:
            raise RuntimeError("[metal::malloc] no memory")
        return turn(batch)

    monkeypatch.setattr(Batch, "turn", fails_once)
    recorder = Recorder(model, 3, max_rows=2)
    rows = [row("ab", i, max_tokens=8, **ENDLESS) for i in range(3)]
    recorder.engine.submit(rows)
    recorder.engine.run()
    assert [event.row for event in recorder.events if event.error] == rows[:2]
    assert rows[2].reason == "length"
    assert caplog.messages == ["RuntimeError: [metal::malloc] no memory"]


def test_a_row_whose_tokens_are_all_masked_fails_alone(model: GPT) -> None:
    recorder = Recorder(model, 3)
    masked = row("ab", max_tokens=8, logit_bias=dict.fromkeys(range(257), -inf))
    rows = [row("ab", 1, max_tokens=8, **ENDLESS), masked, row("ab", 2, max_tokens=8, **ENDLESS)]
    recorder.engine.submit(rows)
    recorder.engine.run()
    (event,) = [event for event in recorder.events if event.error]
    assert event.row is masked
    assert event.error
    assert (event.error.status, str(event.error)) == (400, "all tokens are masked by --logit-bias; relax one of them")
    assert [rows[0].reason, rows[2].reason] == ["length", "length"]


def test_a_row_whose_logits_are_not_numbers_fails_alone() -> None:
    mx.random.seed(0)
    model = GPT(CONFIG).eval()
    weight = np.array(model.wpe.weight)
    weight[5] = np.nan
    model.wpe.weight = mx.array(weight)
    recorder = Recorder(model, 2)
    short, long = row("ab", max_tokens=3, **ENDLESS), row("abcd", 1, max_tokens=8, **ENDLESS)
    recorder.engine.submit([short, long])
    recorder.engine.run()
    assert short.reason == "length"
    (event,) = [event for event in recorder.events if event.error]
    assert event.row is long
    assert event.error
    assert event.error.status == 500
    assert "logits are not numbers" in str(event.error)


def test_a_waiting_engine_stops(model: GPT) -> None:
    engine = Engine(model, TOKENIZER, 1, lambda events: None)
    threading.Timer(0.05, engine.stop).start()
    engine.run()


def test_only_the_engines_thread_calls_mlx(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    callers: set[str] = set()
    for name in ("array", "eval", "async_eval", "zeros", "concatenate"):
        known = getattr(mx, name)
        if not isinstance(known, type):
            monkeypatch.setattr(mx, name, recorded(known, callers))
    recorder = Recorder(model, 3)

    def ask() -> None:
        rows = [row("ab", i, max_tokens=5, **ENDLESS) for i in range(4)]
        recorder.engine.submit(rows)
        recorder.engine.cancel(rows[3:])

    client = threading.Thread(target=ask, name="client")
    client.start()
    recorder.engine.run()
    client.join()
    assert callers == {threading.current_thread().name}


def recorded(function: Callable[..., Any], callers: set[str]) -> Callable[..., Any]:
    """Return the function, which adds the name of its caller's thread."""

    def call(*arguments: Any, **options: Any) -> Any:
        callers.add(threading.current_thread().name)
        return function(*arguments, **options)

    return call
