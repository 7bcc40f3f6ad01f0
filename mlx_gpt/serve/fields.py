"""The fields of a request: a JSON object, read and checked one by one. Every function raises ``APIError``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

MAX_DIGITS = 400  # of a whole number


class APIError(Exception):
    """An error to answer a request with: an HTTP status and a body in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers or ({"retry-after": "1"} if status == 429 else {})
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def fields(body: bytes, names: Sequence[str], path: str) -> dict[str, Any]:
    """Return the fields of a JSON object, of those in ``names``, except fields that are null."""
    try:
        given = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(given, dict):
        raise APIError(400, f"the body must be a JSON object, not {shown(given)}")
    if unknown := given.keys() - set(names):
        refuse(min(unknown)[:60], f"is not a field of {path}, which are {', '.join(names)}")
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


def boolean(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a field that is true or false, or its default."""
    value = given.get(name, default)
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


def valid_text(param: str, text: str) -> str:
    """Return a text that UTF-8 can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(param, "contains a lone surrogate (half a character); send valid Unicode")
    return text


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Return a value of the client for a message: in JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def refuse(param: str, message: str) -> NoReturn:
    raise APIError(400, f"{param} {message}", param)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # Python refuses some thousand, with advice on Python
        raise ValueError(f"a number has {len(digits):,} characters, more than {MAX_DIGITS}")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
