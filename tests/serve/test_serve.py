"""A server on loopback: OpenAI's completions API, concurrent requests, bad input and shutdown."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.command_line import in_a_process, the_line
from helpers.server import Answer, Client, head, serving

from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import generate
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.serve.fields import APIError
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.request import RequestReader
from mlx_gpt.serve.tokenization import tokenize
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.characters import CharacterTokenizer
from mlx_gpt.text.tokenizer import Tokenizer

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

TOKENIZER = Tokenizer.bytes()
P = 2048  # of the folder; a text takes seconds
ENDLESS = {"max_tokens": 2000, "logit_bias": {"256": -100}}
IDS = TOKENIZER.ranks


def bias(characters: str) -> dict[str, int]:
    """Return a logit bias that allows these characters only."""
    return {str(IDS[character.encode()]): 100 for character in characters}


def rounded(value: Any) -> Any:
    """Round log-probabilities: rows in a batch may differ from rows alone in the last digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT:
    return load(folder)[0]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Client]:
    with serving(folder, "--rows", "4", "--max-requests", "40", "--max-body", "100000") as client:
        yield client


# Answers


def test_health_and_models(server: Client) -> None:
    health = server.get("/health").body
    assert (health["status"], health["requests"]) == ("ok", 0)
    assert health["memory_bytes"]["active"] > 0
    (model,) = server.get("/v1/models").body["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert server.get("/v1/models/tiny").body == model
    assert server.get("/v1/models/gpt-4").status == 404


def test_a_completion_is_the_text_of_generate(server: Client, model: GPT) -> None:
    for seed, settings in enumerate(
        [
            {"temperature": 0},
            {"temperature": 1.1},
            {"top_p": 0.7},
            {"presence_penalty": 1},
            {"top_k": 3},
            {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.3},
            {"temperature": 0, "repetition_penalty": 1.5},
        ]
    ):
        answer = server.complete("Once", seed=seed, max_tokens=20, **settings)
        assert answer.status == 200
        expected = "".join(
            generate(model, TOKENIZER, "Once", seed=seed, max_tokens=20, **{"temperature": 1.0} | settings)
        )
        assert answer.texts == [expected]
        assert answer.body["object"] == "text_completion"
        assert answer.body["model"] == "tiny"
        assert answer.body["id"].startswith("cmpl-")


def test_a_prompt_has_four_forms(server: Client) -> None:
    ids = TOKENIZER.encode("Once")
    for one in ("Once", ids, ["Once"], [ids]):
        assert server.complete(one, seed=1).texts == server.complete("Once", seed=1).texts
    both = server.complete(["Once", "ab"], temperature=0).texts
    assert both == server.complete([ids, TOKENIZER.encode("ab")], temperature=0).texts
    assert both == server.complete("Once", temperature=0).texts + server.complete("ab", temperature=0).texts


def test_an_empty_prompt_starts_a_new_text(server: Client, model: GPT) -> None:
    expected = "".join(generate(model, TOKENIZER, "", temperature=0, max_tokens=16))
    for body in (b'{"temperature": 0}', b'{"temperature": 0, "prompt": ""}', b'{"temperature": 0, "prompt": null}'):
        answer = server.ask("/v1/completions", body)
        assert answer.texts == [expected]
        assert answer.body["usage"]["prompt_tokens"] == 1


def test_usage_and_finish_reason_are_reported(server: Client) -> None:
    answer = server.complete(["abc", "d"], n=2, max_tokens=5, logit_bias={"256": -100})
    assert answer.body["usage"] == {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}
    assert [choice["index"] for choice in answer.body["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer.body["choices"]} == {"length"}
    (ended,) = server.complete("abc", logit_bias={"256": 100}).body["choices"]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    (full,) = server.complete("a" * (P - 1), max_tokens=50, logit_bias=bias("A")).body["choices"]
    assert (full["text"], full["finish_reason"]) == ("AA", "length")


def test_stop_strings_end_a_text_and_are_not_shown(server: Client) -> None:
    request_fields: dict[str, Any] = {"seed": 7, "max_tokens": 60, "logit_bias": bias("ABC")}
    text = server.complete(**request_fields).texts[0]
    assert set(text) <= set("ABC")
    stop = text[20:23]
    for stops in (stop, [stop, "\n"], ["xyz", stop]):
        (choice,) = server.complete(**request_fields, stop=stops).body["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_top_k_of_minus_one_or_zero_is_off(server: Client) -> None:
    texts = [server.complete(seed=4, max_tokens=30, **fields).texts for fields in ({}, {"top_k": -1}, {"top_k": 0})]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("stream", [True, False])
def test_stop_token_ids_end_a_text_and_are_not_shown(server: Client, stream: bool) -> None:
    request_fields: dict[str, Any] = {"seed": 7, "max_tokens": 60, "logit_bias": bias("ABC")}
    text = server.complete(**request_fields).texts[0]
    answer = server.complete(**request_fields, stop_token_ids=[IDS[b"C"], IDS[b"z"]], stream=stream)
    choices = [event["choices"][0] for event in answer.events] if stream else answer.body["choices"]
    assert "".join(choice["text"] for choice in choices) == text[: text.index("C")]
    assert choices[-1]["finish_reason"] == "stop"


def test_ignore_eos_continues_after_the_end_token_which_has_no_text(server: Client) -> None:
    request_fields: dict[str, Any] = {"max_tokens": 12, "logit_bias": bias("A") | {"256": 100}, "seed": 1}
    assert server.complete(**request_fields).body["usage"]["completion_tokens"] < 12
    answer = server.complete(**request_fields, ignore_eos=True, logprobs=0)
    (choice,) = answer.body["choices"]
    assert (choice["finish_reason"], answer.body["usage"]["completion_tokens"]) == ("length", 12)
    assert choice["text"] == "A" * choice["logprobs"]["tokens"].count("A")
    assert set(choice["logprobs"]["tokens"]) == {"A", "<|endoftext|>"}
    (stopped,) = server.complete(**request_fields, ignore_eos=True, stop_token_ids=[256]).body["choices"]
    assert stopped["finish_reason"] == "stop"  # as in vLLM, stop_token_ids are not ignored


def test_a_stream_is_the_same_text_in_pieces(server: Client) -> None:
    request_fields: dict[str, Any] = {"prompt": ["Once", "ab"], "n": 2, "seed": 3, "max_tokens": 30, "echo": True}
    whole = server.complete(**request_fields, logprobs=1)
    stream = server.complete(**request_fields, logprobs=1, stream=True, stream_options={"include_usage": True})
    assert stream.is_done
    *chunks, last = stream.events
    assert last["choices"] == []
    assert last["usage"] == whole.body["usage"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert len({chunk["id"] for chunk in stream.events}) == 1
    for choice in whole.body["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert len(parts) > 10
        for name, values in choice["logprobs"].items():
            found = [value for part in parts for value in part["logprobs"][name]]
            assert [rounded(value) for value in found] == [rounded(value) for value in values]
    assert "usage" not in server.complete(stream=True).events[0]


def test_logprobs_are_those_of_the_model(server: Client, model: GPT) -> None:
    (choice,) = server.complete("Once", max_tokens=6, seed=2, logprobs=3, echo=True, top_p=0.9).body["choices"]
    found = choice["logprobs"]
    assert found["tokens"][:4] == list("Once")
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    ids = [IDS[t.encode() if len(t) == 1 else bytes([int(t.removeprefix("bytes:\\x"), 16)])] for t in found["tokens"]]
    assert len(ids) == 10
    logits = np.array(model([ids])[0]).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(1, 10):
        assert found["token_logprobs"][i] == pytest.approx(logp[i - 1, ids[i]], abs=1e-4)
        best = sorted(found["top_logprobs"][i].values(), reverse=True)[:3]
        assert best == pytest.approx(np.sort(logp[i - 1])[:-4:-1], abs=1e-4)
        assert found["tokens"][i] in found["top_logprobs"][i]
    texts = [choice["text"][a:b] for a, b in zip(found["text_offset"], found["text_offset"][1:], strict=False)]
    assert texts[:4] == list("Once")


def test_a_prompt_can_be_scored_without_continuing_it(server: Client) -> None:
    (choice,) = server.complete("Once", max_tokens=0, logprobs=0, echo=True).body["choices"]
    assert choice["text"] == "Once"
    assert [len(alternatives or {}) for alternatives in choice["logprobs"]["top_logprobs"]] == [0, 1, 1, 1]


def test_best_of_returns_the_texts_of_highest_mean_logprob(server: Client) -> None:
    request_fields: dict[str, Any] = {"seed": 5, "max_tokens": 8, "logprobs": 0} | {"logit_bias": {"256": -100}}
    every = server.complete(n=6, **request_fields).body["choices"]
    by_mean = sorted(every, key=lambda choice: -float(np.mean(choice["logprobs"]["token_logprobs"])))
    best = server.complete(n=2, best_of=6, **request_fields)
    assert best.texts == [choice["text"] for choice in by_mean[:2]]
    assert [choice["index"] for choice in best.body["choices"]] == [0, 1]
    assert best.body["usage"]["completion_tokens"] == 48
    (unrequest_fields,) = server.complete(n=1, best_of=6, **request_fields | {"logprobs": None}).body["choices"]
    assert (unrequest_fields["text"], unrequest_fields["logprobs"]) == (by_mean[0]["text"], None)


def test_a_seed_gives_the_same_text_regardless_of_other_requests(server: Client) -> None:
    request_fields = [
        {"prompt": "x" * (i % 5 + 1), "seed": i, "max_tokens": 10 + i, "temperature": 0.5 + i / 10, "n": 1 + i % 3}
        | ({"frequency_penalty": 1.0} if i % 4 == 0 else {"top_p": 0.8} if i % 4 == 1 else {})
        for i in range(12)
    ]
    alone = [server.complete(**fields).texts for fields in request_fields]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda fields: server.complete(**fields).texts, request_fields))
    assert together == alone
    assert server.complete(max_tokens=12).texts != server.complete(max_tokens=12).texts  # without a seed they differ


def test_text_is_tokenized_and_detokenized_as_by_vllm(server: Client) -> None:
    ids = TOKENIZER.encode("né <|endoftext|>", allow_special=True)
    assert ids[-1] == TOKENIZER.eot_id
    body = {"prompt": "né <|endoftext|>", "model": "tiny", "add_special_tokens": False}
    expected = {"count": len(ids), "max_model_len": P, "tokens": ids, "token_strs": None}
    assert server.ask("/tokenize", json.dumps(body).encode()).body == expected
    names = server.ask("/tokenize", json.dumps(body | {"return_token_strs": True}).encode()).body["token_strs"]
    assert names[:4] == ["n", "Ã", "©", "Ġ"]  # the names in vocab.json
    assert server.ask("/detokenize", json.dumps({"tokens": ids}).encode()).body == {"prompt": "né <|endoftext|>"}
    assert server.ask("/tokenize", b'{"prompt": ""}').body["tokens"] == []
    assert server.ask("/detokenize", b'{"tokens": []}').body == {"prompt": ""}
    assert server.ask("/detokenize", b'{"tokens": [256]}').body == {"prompt": "<|endoftext|>"}


def test_a_text_that_the_tokenizer_refuses_is_answered_400() -> None:
    reader = RequestReader("tiny", CharacterTokenizer({"a": 0, "b": 1}), P, Limits())
    assert tokenize(reader, b'{"prompt": "ab"}')["tokens"] == [0, 1]
    with pytest.raises(APIError, match="'c' is none of them") as raised:
        tokenize(reader, b'{"prompt": "c"}')
    assert (raised.value.status, raised.value.body["error"]["param"]) == (400, "prompt")


def test_add_special_tokens_adds_those_of_a_prompt() -> None:
    settings = replace(TOKENIZER.settings, prefix=(256,))
    reader = RequestReader("tiny", Tokenizer(TOKENIZER.ranks, TOKENIZER.specials, settings), P, Limits())
    ids = TOKENIZER.encode("ab")
    assert tokenize(reader, b'{"prompt": "ab"}')["tokens"] == [256, *ids]
    assert tokenize(reader, b'{"prompt": "ab", "add_special_tokens": false}')["tokens"] == ids


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", "{}", "prompt must be a text, not null"),
        ("/tokenize", '{"prompt": ["a"]}', 'prompt must be a text, not ["a"]'),
        ("/tokenize", '{"prompt": "\\ud800"}', "prompt contains a lone surrogate"),
        ("/tokenize", '{"prompt": "a", "return_token_strs": 1}', "return_token_strs must be true or false"),
        ("/tokenize", '{"messages": []}', "messages is not a field of /tokenize"),
        ("/tokenize", '{"prompt": "a", "model": "gpt2"}', 'no model "gpt2" is served'),
        ("/detokenize", "{}", "tokens must be a list of ids, not null"),
        ("/detokenize", '{"tokens": "a"}', 'tokens must be a list of ids, not "a"'),
        ("/detokenize", '{"tokens": [257]}', "tokens 257 is not the id of a token"),
        ("/detokenize", '{"tokens": [1.0]}', "tokens 1.0 is not the id of a token"),
        ("/detokenize", '{"prompt": "a"}', "prompt is not a field of /detokenize"),
    ],
)
def test_bad_input_to_tokenize_is_refused_in_one_line(server: Client, path: str, body: str, message: str) -> None:
    answer = server.ask(path, body.encode())
    assert answer.status in (400, 404)
    assert message in answer.error["message"]


def test_a_large_prompt_does_not_stop_other_answers(server: Client) -> None:
    body = json.dumps({"prompt": " " * 99_000}).encode()
    with ThreadPoolExecutor(8) as pool:
        large = [pool.submit(server.ask, "/v1/completions", body) for _ in range(8)]
        assert server.get("/health").status == 200
        assert {answer.result().status for answer in large} == {400}


def test_chat_is_refused_with_the_reason(server: Client) -> None:
    answer = server.ask("/v1/chat/completions", b'{"model": "tiny", "messages": []}')
    assert answer.status == 404
    assert "GPT-2 is not a chat model" in answer.error["message"]
    assert "/v1/completions" in answer.error["message"]


def test_openais_client_works(server: Client) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    request_fields: dict[str, Any] = {"model": "tiny", "prompt": "Once", "seed": 1, "max_tokens": 12}
    whole = client.completions.create(**request_fields, logprobs=2, user="me")
    assert whole.choices[0].text == server.complete("Once", seed=1, max_tokens=12).texts[0]
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens == 12
    chunks = list(client.completions.create(**request_fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="GPT-2 is not a chat model"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.BadRequestError, match="top_p must be above 0") as refused:
        client.completions.create(**request_fields, top_p=0)
    assert (refused.value.param, refused.value.type) == ("top_p", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="no model") as unknown:
        client.completions.create(**request_fields | {"model": "gpt2"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(**request_fields | {"prompt": "x" * P})
    assert too_long.value.code == "context_length_exceeded"


def test_quantized_weights_and_cache_give_the_text_of_generate(tmp_path: Path) -> None:
    mx.random.seed(0)
    config = GPTConfig(vocab_size=260, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.3)
    save(GPT(config), TOKENIZER, tmp_path / "wider")
    model = quantize(load(tmp_path / "wider")[0], 4)
    prompts = ["Once", "upon a time", "a"]
    expected = ["".join(generate(model, TOKENIZER, p, temperature=0, max_tokens=30, cache_bits=8)) for p in prompts]
    with serving(tmp_path / "wider", "--quantize", "4", "--cache-bits", "8") as server:
        assert server.complete(prompts, temperature=0, max_tokens=30).texts == expected
        assert server.complete(prompts[0], temperature=0, max_tokens=30).texts == expected[:1]


# Bad input

LONG = "x" * (P + 1)
REFUSED: list[tuple[str, str, str]] = [
    ("", "must be JSON", "nothing"),
    ("{", "must be JSON", "cut off"),
    ("[1]", "must be a JSON object, not [1]", "a list"),
    ("[" * 50000, "must be JSON", "deep"),
    (
        '{"n": ' + "9" * 5000 + "}",
        "must be JSON in UTF-8: a number has 5,000 characters, more",
        "a number of 5000 digits",
    ),
    (
        '{"seed": -' + "9" * 399 + "}",
        "seed must be a whole number from -9223372036854775808 to",
        "a number of 399 digits",
    ),
    ('{"temperature": NaN}', "NaN is not a number in JSON", "NaN"),
    ('{"temperature": 1e999}', "temperature must be a number from 0 to 2, not Infinity", "infinity"),
    ('{"prompt": "\\ud800"}', "prompt contains a lone surrogate", "half a character"),
    ('{"\\ud800": 1}', "is not a field of /v1/completions", "half a field"),
    ('{"typical_p": 0.5}', "typical_p is not a field of /v1/completions", "typical_p"),
    ('{"suffix": "x"}', "suffix is not supported", "suffix"),
    ('{"model": 3}', "model must be a string, not 3", "model"),
    ('{"prompt": 3}', "prompt must be a text, a list of texts, ids or a list of lists of ids, not 3", "prompt"),
    ('{"prompt": {"a": 1}}', "prompt must be a text", "prompt object"),
    ('{"prompt": []}', "prompt must be a text", "no prompts"),
    ('{"prompt": [[]]}', "prompt is an empty list of ids", "no ids"),
    ('{"prompt": ["a", 1]}', "prompt must be a text", "mixed"),
    ('{"prompt": [1, "a"]}', '"a" is not the id of a token', "mixed ids"),
    ('{"prompt": [true]}', "prompt must be a text", "true"),
    ('{"prompt": [1, 257]}', "257 is not the id of a token; the vocabulary's are 0 to 256", "an id that is padding"),
    ('{"prompt": [-1]}', "-1 is not the id of a token", "a negative id"),
    ('{"prompt": [' + "9" * 100 + "]}", "is not the id of a token", "a huge id"),
    (json.dumps({"prompt": "x" * P}), f"the prompt is {P} tokens long and the model's context is {P}", "full"),
    (json.dumps({"prompt": LONG, "max_tokens": 0}), f"shorten it to at most {P}", "too long to score"),
    ('{"prompt": ["a"], "n": 129}', "n must be a whole number from 1 to 128, not 129", "n"),
    (json.dumps({"prompt": ["a"] * 65, "n": 2}), "n 65 prompts times 2 are more than 128 texts", "prompts times n"),
    (json.dumps({"prompt": ["a"] * 129}), "prompt 129 prompts are more than 128", "prompts"),
    ('{"n": 0}', "n must be a whole number from 1 to 128, not 0", "n of 0"),
    ('{"n": 2.0}', "n must be a whole number", "n of 2.0"),
    ('{"n": true}', "n must be a whole number", "n of true"),
    ('{"n": 3, "best_of": 2}', "best_of must be at least n, 3, not 2", "best_of"),
    ('{"best_of": 2, "stream": true}', "best_of cannot be combined with stream", "best_of in a stream"),
    ('{"max_tokens": -1}', "max_tokens must be a whole number from 0 to 4096, not -1", "max_tokens"),
    ('{"max_tokens": 5000}', "max_tokens must be a whole number from 0 to 4096, not 5000", "too many max_tokens"),
    ('{"temperature": "hot"}', 'temperature must be a number from 0 to 2, not "hot"', "temperature"),
    ('{"temperature": 2.1}', "temperature must be a number from 0 to 2, not 2.1", "too hot"),
    ('{"top_p": 0}', "top_p must be above 0, which leaves no token", "top_p of 0"),
    ('{"top_p": 2}', "top_p must be a number from 0 to 1, not 2", "top_p of 2"),
    ('{"presence_penalty": 3}', "presence_penalty must be a number from -2 to 2, not 3", "presence_penalty"),
    ('{"frequency_penalty": false}', "frequency_penalty must be a number from -2 to 2, not false", "frequency_penalty"),
    ('{"logit_bias": [1]}', 'logit_bias must be an object such as {"50256": -100}, not [1]', "bias list"),
    ('{"logit_bias": {"257": 1}}', '"257" is not the id of a token; the vocabulary\'s are 0 to 256', "bias id"),
    ('{"logit_bias": {"-1": 1}}', '"-1" is not the id of a token', "bias negative id"),
    ('{"logit_bias": {"a": 1}}', '"a" is not the id of a token', "bias key"),
    ('{"logit_bias": {"5": 101}}', "logit_bias of 5 must be a number from -100 to 100, not 101", "bias value"),
    ('{"logit_bias": {"5": null}}', "logit_bias of 5 must be a number from -100 to 100, not null", "bias null"),
    ('{"top_k": -2}', "top_k must be a whole number from -1 to 2147483647, not -2", "top_k"),
    ('{"top_k": 1.5}', "top_k must be a whole number", "top_k of 1.5"),
    ('{"min_p": 1.1}', "min_p must be a number from 0 to 1, not 1.1", "min_p"),
    ('{"repetition_penalty": 0}', "repetition_penalty must be a number from 0.01 to 100, not 0", "repetition_penalty"),
    ('{"stop_token_ids": 256}', "stop_token_ids must be a list of ids, not 256", "stop_token_ids"),
    ('{"stop_token_ids": [257]}', "stop_token_ids 257 is not the id of a token", "an unknown stop id"),
    ('{"stop_token_ids": [true]}', "stop_token_ids true is not the id of a token", "a stop id of true"),
    ('{"ignore_eos": 1}', "ignore_eos must be true or false, not 1", "ignore_eos"),
    ('{"logprobs": 6}', "logprobs must be a whole number from 0 to 5, not 6", "logprobs"),
    ('{"logprobs": true}', "logprobs must be a whole number from 0 to 5, not true", "logprobs of true"),
    ('{"stop": ""}', "stop must be a text of at least one character or a list of such", "stop of nothing"),
    ('{"stop": ["a", ""]}', "stop must be a text of at least one character", "a stop of nothing"),
    ('{"stop": ["a", "b", "c", "d", "e"]}', "stop must be at most 4 texts, not 5", "five stops"),
    ('{"stop": 5}', "stop must be a text", "stop of 5"),
    ('{"stream": "yes"}', 'stream must be true or false, not "yes"', "stream"),
    ('{"echo": 1}', "echo must be true or false, not 1", "echo"),
    ('{"seed": 1.5}', "seed must be a whole number", "seed"),
    ('{"seed": 9223372036854775808}', "seed must be a whole number", "a seed of 65 bits"),
    ('{"stream_options": {}, "stream_options": {"include_usage": true}}', "is for streams", "options without a stream"),
    ('{"stream": true, "stream_options": 1}', "stream_options must be an object, not 1", "options"),
    ('{"stream": true, "stream_options": {"a": 1}}', 'stream_options has no field "a"', "unknown option"),
]


@pytest.mark.parametrize(("body", "message"), [case[:2] for case in REFUSED], ids=[case[2] for case in REFUSED])
def test_bad_input_is_refused_in_one_line(server: Client, body: str, message: str) -> None:
    answer = server.ask("/v1/completions", body.encode())
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert message in answer.error["message"]
    assert len(answer.error["message"].splitlines()) == 1
    assert len(answer.error["message"]) < 400


@pytest.mark.parametrize(
    "kind", ["Application/JSON; Charset=UTF-8", "APPLICATION/JSON;charset=utf-8", "application/json ;"]
)
def test_a_media_type_has_no_case_and_may_have_parameters(server: Client, kind: str) -> None:
    assert server.ask("/v1/completions", b'{"max_tokens": 1}', kind=kind).status == 200


def test_a_byte_order_mark_before_the_body_is_ignored(server: Client) -> None:
    assert server.ask("/v1/completions", b'\xef\xbb\xbf{"max_tokens": 1}').status == 200


def test_a_body_not_in_utf_8_is_refused(server: Client) -> None:
    assert server.ask("/v1/completions", b'{"prompt": "\xff"}').status == 400


def test_a_request_after_bad_input_is_served(server: Client) -> None:
    assert server.complete(max_tokens=3).status == 200
    assert server.get("/health").body["requests"] == 0


@pytest.mark.parametrize(
    ("method", "path", "kind", "status"),
    [
        ("POST", "/v1/completions", "text/plain", 415),
        ("POST", "/v1/completions", "", 415),
        ("POST", "/v1/completions", "application/jsonx", 415),
        ("POST", "/v1/completions", "application/json, text/plain", 415),
        ("GET", "/tokenize", "application/json", 405),
        ("GET", "/v1/completions", "application/json", 405),
        ("PUT", "/v1/models", "application/json", 405),
        ("POST", "/v1/embeddings", "application/json", 404),
        ("GET", "/", "application/json", 404),
    ],
)
def test_an_unknown_path_or_method_is_refused_in_the_same_format(
    server: Client, method: str, path: str, kind: str, status: int
) -> None:
    answer = server.ask(path, b"{}", method, kind)
    assert answer.status == status
    assert set(answer.error) == {"message", "type", "param", "code"}


def test_a_body_of_100_mb_is_refused_without_being_kept(server: Client) -> None:
    before = memory_of(server.process.pid)
    answer = server.ask("/v1/completions", b'{"prompt": "' + b"x" * 100_000_000 + b'"}')
    assert answer.status == 413
    assert "at most 100000 bytes" in answer.error["message"]
    in_parts = server.ask("/v1/completions", (b"x" * 1_000_000 for _ in range(20)))  # without a content-length
    assert in_parts.status == 413
    if before:
        assert memory_of(server.process.pid) - before < 30_000
    assert server.complete(max_tokens=3).status == 200


def memory_of(pid: int) -> int:
    """Return the resident memory of a process in KiB; 0 if unknown."""
    if not shutil.which("ps"):
        return 0
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)


def test_a_client_that_expects_100_continue_is_refused_at_once(server: Client) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head(100_000_000, "expect: 100-continue"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_rows(server: Client, stream: bool) -> None:
    connections = []
    for _ in range(4):  # as many as there are rows
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        body = json.dumps({"prompt": "ab", "stream": stream} | ENDLESS).encode()
        connection.sendall(head(len(body)) + body)
        connections.append(connection)
    while server.get("/health").body["requests"] < 4:
        time.sleep(0.01)
    for connection in connections:
        if stream:
            connection.recv(500)
        connection.close()
    assert server.complete(max_tokens=3).status == 200
    server.wait_until_idle()


def test_a_client_may_disconnect_before_its_body_is_complete(server: Client) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head(100) + b"{")
        time.sleep(0.05)
    server.wait_until_idle()
    assert server.complete(max_tokens=3).status == 200


def test_a_thousand_concurrent_requests_are_all_answered(server: Client) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 3}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    request = head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body

    async def one() -> tuple[int, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        headers, _, text = answer.partition(b"\r\n\r\n")
        return int(headers.split()[1]), json.loads(text)

    async def all_of_them() -> list[tuple[int, Any]]:
        return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(1000))), 60)

    with ThreadPoolExecutor(1) as thread:  # playwright's browser, of other tests, keeps this thread's event loop
        answers = thread.submit(asyncio.run, all_of_them()).result()
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 40
    for status, answer in answers:
        assert "choices" in answer if status == 200 else answer["error"]["type"] == "rate_limit_error"
    assert server.complete(max_tokens=3).status == 200


# Start and shutdown


def test_a_request_past_the_timeout_is_answered_504(folder: Path) -> None:
    with serving(folder, "--timeout", "0.5", "--rows", "1") as server:
        stream = server.stream(**ENDLESS)
        waiting = server.complete(**ENDLESS)
        assert waiting.status == 504
        assert "longer than 0.5 seconds" in waiting.error["message"]
        assert "longer than 0.5 seconds" in Answer(stream).events[-1]["error"]["message"]
        assert server.complete(max_tokens=1).status == 200


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopping_server_finishes_requests_in_progress(folder: Path, signal_number: int) -> None:
    with serving(folder) as server:
        stream = server.stream(max_tokens=300, logit_bias={"256": -100})
        server.process.send_signal(signal_number)
        answer = Answer(stream)
        assert answer.is_done
        assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert server.process.stderr
        assert server.process.stderr.read() == ""


def test_a_stopping_server_answers_503_after_the_grace_period(folder: Path) -> None:
    with serving(folder, "--grace", "0", "--rows", "1") as server:
        stream = server.stream(**ENDLESS)
        whole: list[Answer] = []
        thread = threading.Thread(target=lambda: whole.append(server.complete(**ENDLESS)))
        thread.start()
        while server.get("/health").body["requests"] < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert Answer(stream).events[-1]["error"]["message"] == "the server is stopping"
        thread.join()
        assert (whole[0].status, whole[0].error["type"]) == (503, "server_error")
        assert server.process.wait(20) == 0


def test_an_address_in_use_is_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = in_a_process("serve", str(folder), "--port", str(taken.getsockname()[1]), cwd=folder.parent)
    assert run.returncode == 2
    assert re.search(r"cannot serve at 127.0.0.1 port \d+: .*; choose another --host or --port", the_line(run.stderr))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port must be from 0 (any free port) to 65535, not 70000"),
        (["--rows", "0"], "--rows must be 1 or above, not 0"),
        (["--timeout", "0"], "--timeout must be above 0 seconds, not 0.0"),
        (["--grace", "nan"], "--grace must be 0 seconds or above, not nan"),
        (["--port", "0", "--quantize", "3"], "weights can be quantized to 8 or 4 bits, not 3"),
        (["--port", "0", "--cache-bits", "7"], "cache-bits must be 16 (half precision), 8 or 4 (quantized), not 7"),
        (
            ["--port", "0", "--cache-bits", "8"],
            "--cache-bits 8 needs heads whose width is a multiple of 32, and this model's is 16",
        ),
    ],
)
def test_invalid_flags_are_refused(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_gpt.cli import main

    assert main(["serve", str(folder), *flags]) == 2
    assert the_line(capsys.readouterr().err) == message


def test_without_the_serve_extra_the_error_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_gpt.commands.serve import Serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlx_gpt.serve.server", raising=False)
    with pytest.raises(
        ValueError, match=r"serve needs uvicorn, which is not installed: pip install 'mlx-gpt\[serve\]'"
    ):
        Serve(str(folder))()
