"""What the verbs that let a model speak have in common: the model, its flags, and the ways to show what it says."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from mlx_gpt.errors import UsageError
from mlx_gpt.generate.settings import Constraints, Drawing, Length, Number, Speed

if TYPE_CHECKING:
    from mlx_gpt.generate.writer import Piece
    from mlx_gpt.model.gpt import GPT
    from mlx_gpt.text.tokenizer import Tokenizer

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
SURPRISES = ((2, ""), (4, "30;48;5;230"), (7, "30;48;5;222"), (10, "30;48;5;209"), (float("inf"), "97;48;5;125"))
"""Bits of surprise, up to so many, and how the terminal shows them: the more surprised, the darker."""


@dataclass(frozen=True)
class Faster(Speed):
    """Less memory, less time."""

    quantize: Number = None
    """keep the weights in so many bits, 8 or 4"""
    draft_model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """a smaller model with the same tokenizer that guesses ahead; what is said stays the model's own"""
    prompt_lookup: Flag = False
    """guess that the text goes on as when its last words were said before"""


@dataclass(frozen=True)
class Speaker:
    """A model and the rules by which it speaks."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, or a hub id such as openai-community/gpt2"""
    revision: Name = None
    """a branch, tag or commit of the hub's"""
    length: Length = field(default_factory=Length)
    constraints: Constraints = field(default_factory=Constraints)
    drawing: Drawing = field(default_factory=Drawing)
    speed: Faster = field(default_factory=Faster)

    def load(self) -> tuple[GPT, Tokenizer, GPT | str | None]:
        """The model as the flags want it, its tokenizer, and what guesses ahead."""
        from mlx_gpt.generate.generation import LOOKUP
        from mlx_gpt.store.folder import load

        given = self.speed
        if given.draft_model and given.prompt_lookup:
            raise UsageError("--draft-model and --prompt-lookup both guess ahead; take one of them")
        model, tokenizer = load_in(given.quantize, self.model, self.revision)
        if not given.draft_model:
            return model, tokenizer, LOOKUP if given.prompt_lookup else None
        draft, its = load(given.draft_model)
        if its.hash != tokenizer.hash:
            raise UsageError(
                f"--draft-model {given.draft_model} speaks another vocabulary ({its.vocab_size} ids) than {self.model} "
                f"({tokenizer.vocab_size}); take a smaller model with the same tokenizer"
            )
        return model, tokenizer, draft


def load_in(bits: int | None, name: str, revision: str | None) -> tuple[GPT, Tokenizer]:
    """A model, its weights in so many bits if any are given, and its tokenizer."""
    from mlx_gpt.model.quantize import quantize
    from mlx_gpt.store.folder import load

    model, tokenizer = load(name, revision)
    return model if bits is None else quantize(model, bits), tokenizer


def say(text: str) -> None:
    """Print at once, without an end of line; what the terminal's encoding lacks as ``?``."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def note(text: str) -> None:
    """A line for the reader, beside what the model says."""
    print(f"mlx-gpt: {text}", file=sys.stderr, flush=True)


def surprise(logprob: float) -> float:
    """How surprised the model was by a token, in bits: -log2 p, from its log-probability in nats."""
    return -logprob / log(2)


def painted(piece: Piece) -> str:
    """The text of a piece with a background that says how surprised the model was."""
    if piece.token is None or piece.token.logprob is None:
        return piece.text
    bits = surprise(piece.token.logprob)
    style = next(style for limit, style in SURPRISES if bits <= limit)
    return "\n".join(_coloured(line, style) for line in piece.text.split("\n"))  # no colour to the end of a line


def _coloured(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def legend() -> str:
    """What the colours mean."""
    limits = [limit for limit, _ in SURPRISES[:-1]]
    names = [f"up to {limits[0]} bits", *(f"{a} to {b}" for a, b in pairwise(limits))]
    names.append(f"above {limits[-1]}")
    shown = (_coloured(f" {name} ", style) for (_, style), name in zip(SURPRISES, names, strict=True))
    return f"surprise of the model, -log2 p:{' '.join(shown)}"


def as_row(piece: Piece, tokenizer: Tokenizer) -> str:
    """A token with its probability, and the alternatives, as a line."""
    if piece.token is None or piece.token.logprob is None:
        return ""
    top = "  ".join(f"{exp(logprob):.1%} {name_of(i, tokenizer)}" for i, logprob in piece.token.top)
    return f"{exp(piece.token.logprob):7.2%}  {name_of(piece.token.id, tokenizer):16}  {top}".rstrip() + "\n"


def as_json(piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token and the text that it set free, for programs. Log-probabilities are in nats."""
    found: dict[str, Any] = {"text": piece.text}
    if piece.token is not None:
        found["id"] = piece.token.id
        if piece.token.logprob is not None:
            found["logprob"] = piece.token.logprob
            found["top"] = [{"id": i, "token": token_of(i, tokenizer), "logprob": p} for i, p in piece.token.top]
    return found


def token_of(token_id: int, tokenizer: Tokenizer) -> str | None:
    """The text of an id; None for one of a padded vocabulary, which means nothing."""
    try:
        return tokenizer.decode([token_id])
    except ValueError:
        return None


def name_of(token_id: int, tokenizer: Tokenizer) -> str:
    """An id's text as it fits a line, so that a space is seen; its bytes where they are no whole characters."""
    try:
        token = tokenizer.token_bytes(token_id)
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(token)
    except ValueError:
        return f"id {token_id}"
