"""Requests to OpenAI's completions API, with every field checked.

Names, defaults and ranges are those of OpenAI's "Create completion"
(platform.openai.com/docs/api-reference/completions/create). An unknown field is refused by name, as OpenAI does.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.row import MAX_LOGPROBS
from mlx_gpt.text.tokenizer import Tokenizer

FIELDS = (
    *("model", "prompt", "suffix", "max_tokens", "stop", "stream", "stream_options", "n", "best_of", "echo", "seed"),
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    "user",  # for OpenAI's accounting; ignored
)


class APIError(Exception):
    """An error to answer a request with: an HTTP status and a body in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"retry-after": "1"} if status == 429 else {}
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request: ``best_of`` continuations of each prompt, of which the best ``n`` are returned."""

    prompts: list[list[int]]
    settings: GenerationSettings
    seed: int
    n: int
    best_of: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    echo: bool


@dataclass(frozen=True)
class RequestReader:
    """Reads requests to the model called ``name``. Every method raises ``APIError`` for an invalid request."""

    name: str
    tokenizer: Tokenizer
    n_positions: int
    limits: Limits

    def read(self, body: bytes) -> CompletionRequest:
        """Read a request from its JSON body."""
        given = fields(body)
        self.check_name(given.get("model", self.name))
        if "suffix" in given:
            refuse("suffix", "is not supported: GPT-2 was not trained to fill a gap; it continues prompt")
        n = integer(given, "n", 1, 1, self.limits.max_choices)
        best_of = integer(given, "best_of", n, 1, self.limits.max_choices)
        stream, options = boolean(given, "stream"), self._stream_options(given)
        if best_of < n:
            refuse("best_of", f"must be at least n, {n}, not {best_of}")
        if stream and best_of > n:
            refuse(
                "best_of", "cannot be combined with stream: the best texts are known only at their end; leave out one"
            )
        settings = self._settings(given)
        prompts = self._prompts(given.get("prompt", ""), settings.max_tokens)
        if len(prompts) * best_of > self.limits.max_choices:
            refuse("n", f"{len(prompts)} prompts times {best_of} are more than {self.limits.max_choices} texts")
        seed = integer(given, "seed", secrets.randbits(63), -(2**63), 2**63 - 1) % 2**64
        logprobs = settings.logprobs
        if best_of > n and logprobs is None:
            settings = replace(settings, logprobs=0)  # needed to rank the texts
        return CompletionRequest(prompts, settings, seed, n, best_of, logprobs, stream, options, boolean(given, "echo"))

    def check_name(self, name: Any) -> None:
        """Refuse any other model."""
        if not isinstance(name, str):
            refuse("model", f"must be a string, not {shown(name)}")
        if name != self.name:
            raise APIError(404, f"no model {shown(name)} is served, only {self.name!r}", "model", "model_not_found")

    def _settings(self, given: Mapping[str, Any]) -> GenerationSettings:
        top_p = number(given, "top_p", 1.0, 0, 1)
        if top_p == 0:
            refuse("top_p", "must be above 0, which leaves no token, and at most 1; temperature 0 is greedy")
        return GenerationSettings(
            max_tokens=integer(given, "max_tokens", 16, 0, self.limits.max_tokens),
            stop=stops(given.get("stop", ())),
            logprobs=integer(given, "logprobs", None, 0, MAX_LOGPROBS),
            logit_bias=self._bias(given.get("logit_bias", {})),
            frequency_penalty=number(given, "frequency_penalty", 0.0, -2, 2),
            presence_penalty=number(given, "presence_penalty", 0.0, -2, 2),
            temperature=number(given, "temperature", 1.0, 0, 2),
            top_p=top_p,
        )

    def _prompts(self, prompt: Any, max_tokens: int) -> list[list[int]]:
        """Return the ids of each prompt, from a text, a list of texts, ids, or a list of lists of ids."""
        is_one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and is_id(prompt[0]))
        prompts = [prompt] if is_one else prompt
        if not (isinstance(prompts, list) and prompts and all(isinstance(item, (str, list)) for item in prompts)):
            refuse("prompt", f"must be a text, a list of texts, ids or a list of lists of ids, not {shown(prompt)}")
        if len(prompts) > self.limits.max_choices:
            refuse("prompt", f"{len(prompts)} prompts are more than {self.limits.max_choices}, the most at once")
        most = self.n_positions - 1 if max_tokens else self.n_positions
        rows = [self._ids(item) for item in prompts]
        if (longest := max(map(len, rows))) > most:
            message = (
                f"the prompt is {longest} tokens long and the model's context is {self.n_positions}; "
                f"shorten it to at most {most}"
            )
            raise APIError(400, message, "prompt", "context_length_exceeded")
        return rows

    def _ids(self, prompt: str | list[Any]) -> list[int]:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                refuse("prompt", "contains a lone surrogate (half a character); send valid Unicode")
            return self.tokenizer.encode(prompt)
        if not prompt:
            refuse("prompt", 'is an empty list of ids; "" starts a new text')
        for token_id in prompt:
            self._check_id("prompt", token_id, is_id(token_id))
        return prompt

    def _bias(self, bias: Any) -> dict[int, float]:
        if not isinstance(bias, dict):
            refuse("logit_bias", f'must be an object such as {{"50256": -100}}, not {shown(bias)}')
        for key in bias:
            self._check_id("logit_bias", key, key.isascii() and key.isdigit() and len(key) < 10)
        return {int(key): number(bias, key, 0.0, -100, 100, "logit_bias") for key in bias}

    def _check_id(self, param: str, value: Any, is_number: bool) -> None:
        with suppress(ValueError):
            if is_number:
                self.tokenizer.token_bytes(int(value))
                return
        last = self.tokenizer.vocab_size - 1
        refuse(param, f"{shown(value)} is not the id of a token; the vocabulary's are 0 to {last}")

    def _stream_options(self, given: Mapping[str, Any]) -> bool:
        """Return True if the stream is to end with its usage."""
        options = given.get("stream_options", {})
        if not isinstance(options, dict):
            refuse("stream_options", f"must be an object, not {shown(options)}")
        if options and not boolean(given, "stream"):
            refuse("stream_options", "is for streams: set stream to true")
        if unknown := options.keys() - {"include_usage", "include_obfuscation"}:  # the second is ignored
            refuse("stream_options", f"has no field {shown(min(unknown))}")
        return boolean(options, "include_usage")


def fields(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object, except those that are null."""
    try:
        given = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(given, dict):
        raise APIError(400, f"the body must be a JSON object, not {shown(given)}")
    if unknown := given.keys() - set(FIELDS):
        refuse(min(unknown)[:60], f"is not a field of /v1/completions, which are {', '.join(FIELDS)}")
    return {name: value for name, value in given.items() if value is not None}


def integer(given: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    """Return an integer field or its default."""
    value = given.get(name, default)
    if value is not default and not (is_id(value) and low <= value <= high):
        refuse(name, f"must be a whole number from {low} to {high}, not {shown(value)}")
    return value


def number(given: Mapping[str, Any], name: str, default: float, low: float, high: float, of: str = "") -> float:
    """Return a number field or its default; ``of`` names the object it is in."""
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        within = f"of {name} " if of else ""
        refuse(of or name, f"{within}must be a number from {low} to {high}, not {shown(value)}")
    return float(value)


def boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        refuse(name, f"must be true or false, not {shown(value)}")
    return value


def stops(stop: Any) -> tuple[str, ...]:
    """Return the stop strings: one, or a list of at most four."""
    texts = [stop] if isinstance(stop, str) else stop
    if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)):
        refuse("stop", f"must be a text of at least one character or a list of such, not {shown(stop)}")
    if len(texts) > 4:
        refuse("stop", f"must be at most 4 texts, not {len(texts)}")
    return tuple(texts)


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return a value of the client for a message: in JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def refuse(param: str, message: str) -> NoReturn:
    raise APIError(400, f"{param} {message}", param)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
