"""Answers in the format of OpenAI's completions API, whole or in chunks."""

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
    """One of the texts of an answer. ``logprobs`` is the number of alternatives to return for each token."""

    def __init__(self, row: Row, logprobs: int | None, tokenizer: Tokenizer):
        self.row = row
        self.reason: str | None = None
        self._logprobs, self._tokenizer = logprobs, tokenizer
        self._pieces: list[Piece] = []
        self._length = 0  # characters already taken

    def add(self, pieces: Sequence[Piece], reason: str | None) -> None:
        self._pieces += pieces
        self.reason = reason

    @property
    def is_ready(self) -> bool:
        """True if there is something to take; an incomplete character is not."""
        return bool(self.reason or any(piece.text or self._logprobs is not None for piece in self._pieces))

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, in nats, by which ``best_of`` ranks texts."""
        tokens = [piece.token for piece in self._pieces if piece.token][len(self.row.prompt) * self.row.echo :]
        found = [token.logprob for token in tokens if token.logprob is not None]
        return sum(found) / len(found) if found else 0.0

    def take(self) -> dict[str, Any]:
        """Return what is new since the last call, as a choice of the API."""
        pieces, self._pieces = self._pieces, []
        text, start = "".join(piece.text for piece in pieces), self._length
        self._length += len(text)
        n = self._logprobs
        return {
            "text": text,
            "index": self.row.index,
            "logprobs": None if n is None else logprobs(pieces, n, start, self._tokenizer),
            "finish_reason": None if self.reason is None else "stop" if self.reason in (END, STOP) else "length",
        }


def new_answer(model: str) -> dict[str, Any]:
    """Return the fields that all chunks of an answer share."""
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def event(data: dict[str, Any]) -> bytes:
    """Return an event of a stream, ``text/event-stream``."""
    return b"data: " + as_json(data) + b"\n\n"


def as_json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False).encode()


def logprobs(pieces: Sequence[Piece], n: int, start: int, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """Return each token, its log-probability (nats), n alternatives and its offset in the text."""
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
    """Return the n most probable tokens and the chosen one; None if it has no log-probability."""
    if token.logprob is None:
        return None
    shown = {token_name(i, tokenizer): logprob for i, logprob in token.top[:n]}
    return shown | {token_name(token.id, tokenizer): token.logprob}


def token_name(token_id: int, tokenizer: Tokenizer) -> str:
    r"""Return a token's text or, if it is not whole characters, its bytes in OpenAI's form: ``bytes:\xe2\x80``."""
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
