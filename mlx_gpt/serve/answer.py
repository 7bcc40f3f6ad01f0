"""Pieces of text as OpenAI's completions API gives them: a whole completion, or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from mlx_gpt.generate.writer import END, STOP, Piece, Token
from mlx_gpt.serve.row import Row
from mlx_gpt.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


class CompletionChoice:
    """One of the texts, as far as it has come. ``logprobs`` is how many alternatives to each token are wanted."""

    def __init__(self, row: Row, index: int, logprobs: int | None, tokenizer: Tokenizer):
        self.row, self.index = row, index
        self.reason: str | None = None
        self._logprobs, self._tokenizer = logprobs, tokenizer
        self._pieces: list[Piece] = []
        self._length = 0  # characters that have been taken

    def add(self, pieces: Sequence[Piece], reason: str | None) -> None:
        self._pieces += pieces
        self.reason = reason

    @property
    def has_news(self) -> bool:
        """Whether there is anything to take: not inside a character, for one."""
        return bool(self.reason or any(piece.text or self._logprobs is not None for piece in self._pieces))

    @property
    def mean_logprob(self) -> float:
        """How probable its tokens are, in the mean, in nats: the best of several texts has most of it."""
        tokens = [piece.token for piece in self._pieces if piece.token][len(self.row.prompt) * self.row.echo :]
        found = [token.logprob for token in tokens if token.logprob is not None]
        return sum(found) / len(found) if found else 0.0

    def take(self) -> dict[str, Any]:
        """What has come since it was last asked, as a choice of the API's."""
        pieces, self._pieces = self._pieces, []
        text, start = "".join(piece.text for piece in pieces), self._length
        self._length += len(text)
        n = self._logprobs
        return {
            "text": text,
            "index": self.index,
            "logprobs": None if n is None else logprobs(pieces, n, start, self._tokenizer),
            "finish_reason": None if self.reason is None else "stop" if self.reason in (END, STOP) else "length",
        }


class Head:
    """What all parts of an answer have in common."""

    def __init__(self, model: str):
        self._fields: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def part(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        """A whole answer, or a chunk of one."""
        return self._fields | {"choices": choices} | usage


def event(data: dict[str, Any]) -> bytes:
    """An event of a stream, ``text/event-stream``."""
    return b"data: " + as_json(data) + b"\n\n"


def as_json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False).encode()


def usage(n_prompt: int, n_said: int) -> dict[str, int]:
    """What a request cost, in tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_said, "total_tokens": n_prompt + n_said}


def logprobs(pieces: Sequence[Piece], n: int, start: int, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """Each token with its log-probability (nats), n alternatives beside it, and where in the text it begins."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for piece in pieces:
        if token := piece.token:
            name = token_name(token.id, tokenizer)
            found["tokens"].append(name)
            found["token_logprobs"].append(token.logprob)
            found["top_logprobs"].append(alternatives(token, n, tokenizer))
            found["text_offset"].append(start)
        start += len(piece.text)
    return found


def alternatives(token: Token, n: int, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The n most probable tokens, and the one that was taken; None where nothing is known of it."""
    if token.logprob is None:
        return None
    shown = {token_name(i, tokenizer): logprob for i, logprob in token.top[:n]}
    return shown | {token_name(token.id, tokenizer): token.logprob}


def token_name(token_id: int, tokenizer: Tokenizer) -> str:
    r"""A token's text; where it is no whole character, its bytes, as OpenAI's API writes them: ``bytes:\xe2\x80``."""
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
