"""Requests to OpenAI's completions API, with every field checked.

Names, defaults and ranges are those of OpenAI's "Create completion"
(platform.openai.com/docs/api-reference/completions/create), and for the fields that OpenAI does not have those of
vLLM's ``SamplingParams``. An unknown field is refused by name, as OpenAI does.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mlx_gpt.errors import TokenizerError
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.serve.fields import APIError, boolean, fields, integer, is_id, number, refuse, shown, stops, valid_text
from mlx_gpt.serve.limits import Limits
from mlx_gpt.serve.row import MAX_LOGPROBS
from mlx_gpt.text.tokenizer import Tokenizer

FIELDS = (
    *("model", "prompt", "suffix", "max_tokens", "stop", "stream", "stream_options", "n", "best_of", "echo", "seed"),
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos"),  # vLLM's
    "user",  # for OpenAI's accounting; ignored
)


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
        given = fields(body, FIELDS, "/v1/completions")
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
            top_k=max(0, integer(given, "top_k", 0, -1, 2**31 - 1)),  # in vLLM both -1 and 0 are off
            min_p=number(given, "min_p", 0.0, 0, 1),
            repetition_penalty=number(given, "repetition_penalty", 1.0, 0.01, 100),
            stop_token_ids=self._stop_ids(given.get("stop_token_ids", [])),
            ignore_eos=boolean(given, "ignore_eos"),
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
            return self.tokenizer.as_prompt(self.encode(prompt))
        if not prompt:
            refuse("prompt", 'is an empty list of ids; "" starts a new text')
        return self.ids("prompt", prompt)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, its special tokens included."""
        try:
            return self.tokenizer.encode_documents(valid_text("prompt", prompt), allow_special=True)
        except TokenizerError as error:  # such as a character that a model of characters does not know
            raise APIError(400, str(error), "prompt") from error

    def ids(self, param: str, ids: Any) -> list[int]:
        """Return a list of ids of the vocabulary."""
        if not isinstance(ids, list):
            refuse(param, f"must be a list of ids, not {shown(ids)}")
        for token_id in ids:
            self._check_id(param, token_id, is_id(token_id))
        return ids

    def _stop_ids(self, ids: Any) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.ids("stop_token_ids", ids)))

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
