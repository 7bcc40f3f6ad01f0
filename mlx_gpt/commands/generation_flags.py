"""The flags that generate and talk share, and the ways to show generated text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from mlx_gpt.commands.given import refuse_idle
from mlx_gpt.errors import UsageError, one_line
from mlx_gpt.generate.settings import Constraints, Drawing, Length, Number, Speed
from mlx_gpt.terminal import shown

if TYPE_CHECKING:
    from mlx_gpt.generate.writer import Piece
    from mlx_gpt.model.gpt import GPT
    from mlx_gpt.text.tokenizer import Tokenizer

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
FloatType = Annotated[Literal["float32", "float16", "bfloat16"] | None, arg(help_behavior_hint="")]
Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
T = TypeVar("T")
SURPRISES = ((2, ""), (4, "30;48;5;230"), (7, "30;48;5;222"), (10, "30;48;5;209"), (float("inf"), "97;48;5;125"))
"""Upper bounds of surprise in bits and the terminal's style for each; higher is darker."""


@dataclass(frozen=True)
class SpeedFlags(Speed):
    """Memory and speed."""

    quantize: Number = None
    """quantize the weights to 8 or 4 bits"""
    dtype: FloatType = None
    """the type of the weights: that of the files by default, on a CPU float32"""
    draft_model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """a smaller model with the same tokenizer that proposes tokens; the distribution stays the model's"""
    prompt_lookup: Flag = False
    """propose the tokens that followed the last words at their last occurrence"""


@dataclass(frozen=True)
class GenerationFlags:
    """A model and its generation settings."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    revision: Name = None
    """a branch, tag or commit on the hub"""
    length: Length = field(default_factory=Length)
    constraints: Constraints = field(default_factory=Constraints)
    drawing: Drawing = field(default_factory=Drawing)
    speed: SpeedFlags = field(default_factory=SpeedFlags)
    given: Suppress[frozenset[str]] = field(default=frozenset(), compare=False)

    def load(self) -> tuple[GPT, Tokenizer, GPT | str | None]:
        """Load the model, its tokenizer and the draft."""
        from mlx_gpt.generate.generation import LOOKUP

        speed = self.speed
        if speed.draft_model and speed.prompt_lookup:
            raise UsageError("--draft-model and --prompt-lookup both propose tokens; take one of them")
        if not (speed.draft_model or speed.prompt_lookup):
            refuse_idle(self.given, {"guesses": "without --draft-model or --prompt-lookup"})
        model, tokenizer = load_quantized(self.model, self.revision, speed.quantize, speed.dtype)
        if not speed.draft_model:
            return model, tokenizer, LOOKUP if speed.prompt_lookup else None
        draft, draft_tokenizer = load_quantized(speed.draft_model, dtype=speed.dtype)
        if draft_tokenizer.hash != tokenizer.hash:
            raise UsageError(
                f"--draft-model {speed.draft_model} has another vocabulary ({draft_tokenizer.vocab_size} ids) than "
                f"{self.model} ({tokenizer.vocab_size}); take a smaller model with the same tokenizer"
            )
        return model, tokenizer, draft


def load_quantized(
    name: str, revision: str | None = None, bits: int | None = None, dtype: str | None = None
) -> tuple[GPT, Tokenizer]:
    """Load a model and its tokenizer; with ``bits``, quantize its weights.

    The weights keep the type of their files, or become ``dtype``. On a CPU, where half precision is slow, the default
    is float32.
    """
    import mlx.core as mx

    from mlx_gpt.device import on_cpu
    from mlx_gpt.model.quantize import quantize
    from mlx_gpt.store.folder import load_source
    from mlx_gpt.store.layouts import find_source

    source = find_source(name, revision)
    if bits is not None:
        source.require_floats("leave out --quantize, or quantize")
    kept = source.dtype
    if dtype is None and kept != mx.float32 and on_cpu():
        dtype = "float32"
        own = str(kept).removeprefix("mlx.core.")
        note(
            f"the {own} weights are computed in float32, since half precision is slow on a CPU; --dtype {own} keeps it"
        )
    model, tokenizer = load_source(source, getattr(mx, dtype) if dtype else kept)
    return model if bits is None else quantize(model, bits), tokenizer


def write(text: str, style: str = "") -> None:
    """Print to stdout at once, without a newline, in a style of the terminal.

    On a terminal control characters are escaped; characters outside the encoding become ``?``.
    """
    text = shown(text, sys.stdout)
    text = "\n".join(_styled(line, style) for line in text.split("\n"))  # a style must not reach the margin
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def watched(pieces: Iterator[T]) -> Iterator[T]:
    """Yield the pieces until Ctrl-C, which raises ``KeyboardInterrupt`` even where MLX dropped it.

    On a Mac, report a slow start: kernels are compiled in two steps, of the prompt and of a token.
    """
    from mlx_gpt.device import first_reported
    from mlx_gpt.train.signals import remembered

    with remembered() as check_ctrl_c, ExitStack() as stack:
        stack.enter_context(first_reported("text"))
        for n, piece in enumerate(pieces):
            check_ctrl_c()
            if n:
                stack.close()
            yield piece


def note(text: str) -> None:
    """Print a line for the user to stderr."""
    print(f"mlx-gpt: {one_line(text)}", file=sys.stderr, flush=True)


def surprise_style(piece: Piece) -> str:
    """Return the terminal's style that shows the surprise of a piece."""
    if piece.token is None or piece.token.logprob is None:
        return ""
    bits = -piece.token.logprob / log(2)  # from nats
    return next(style for limit, style in SURPRISES if bits <= limit)


def _styled(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def legend() -> str:
    """Return a legend of the colours."""
    limits = [limit for limit, _ in SURPRISES[:-1]]
    names = [f"up to {limits[0]} bits", *(f"{a} to {b}" for a, b in pairwise(limits))]
    names.append(f"above {limits[-1]}")
    shown = (_styled(f" {name} ", style) for (_, style), name in zip(SURPRISES, names, strict=True))
    return f"surprise of the model, -log2 p:{' '.join(shown)}"


def as_row(piece: Piece, tokenizer: Tokenizer) -> str:
    """Return a token, its probability and the alternatives as a line."""
    if piece.token is None or piece.token.logprob is None:
        return ""
    top = "  ".join(f"{exp(logprob):.1%} {token_name(i, tokenizer)}" for i, logprob in piece.token.top)
    return f"{exp(piece.token.logprob):7.2%}  {token_name(piece.token.id, tokenizer):16}  {top}".rstrip() + "\n"


def as_json(piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a piece and its token for programs. Log-probabilities are in nats."""
    found: dict[str, Any] = {"text": piece.text}
    if piece.token is not None:
        found["id"] = piece.token.id
        if piece.token.logprob is not None:
            found["logprob"] = piece.token.logprob
            found["top"] = [{"id": i, "token": token_text(i, tokenizer), "logprob": p} for i, p in piece.token.top]
    return found


def token_text(token_id: int, tokenizer: Tokenizer) -> str | None:
    """Return the text of an id; None if it is unknown, in a padded vocabulary."""
    try:
        return tokenizer.decode([token_id])
    except ValueError:
        return None


def token_name(token_id: int, tokenizer: Tokenizer) -> str:
    """Return an id's text, quoted to fit a line, or its bytes if they are not whole characters."""
    try:
        token = tokenizer.token_bytes(token_id)
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(token)
    except ValueError:
        return f"id {token_id}"
