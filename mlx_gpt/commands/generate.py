"""``mlx-gpt generate``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from mlx_gpt.commands.generation_flags import (
    Flag,
    GenerationFlags,
    SpeedFlags,
    as_json,
    as_row,
    legend,
    note,
    surprise_style,
    watched,
    write,
)
from mlx_gpt.commands.given import refuse_idle
from mlx_gpt.errors import DataError, UsageError
from mlx_gpt.files import check_replaceable, expand_user, hidden_folder
from mlx_gpt.generate.settings import SLIDE, BeamSearch, GenerationSettings, Number
from mlx_gpt.text.pipes import STDIN
from mlx_gpt.text.sources import read_text
from mlx_gpt.text.token_settings import EOT

if TYPE_CHECKING:
    from mlx_gpt.generate.generation import Generation
    from mlx_gpt.generate.writer import Piece
    from mlx_gpt.text.tokenizer import Tokenizer

File = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class SpeedAndCacheFlags(SpeedFlags):
    """Memory and speed."""

    save_prompt_cache: File = None
    """save the keys and values of the prompt to this file"""
    prompt_cache: File = None
    """load such a file of the same model; the prompt follows its text"""


@dataclass(frozen=True)
class Output:
    """Text and JSON go to stdout, everything else to stderr."""

    samples: int = 1
    """generate so many texts in one batch, separated by a line ---"""
    logprobs: Number = None
    """print a line per token, with its probability and those of the N most probable"""
    colour: Flag = False
    """colour each token by its surprise"""
    json: Flag = False
    """print lines of JSON: each token, then each text, then the figures"""
    figures: Flag = True
    """print no line of figures at the end: speed, memory, share of the memory's speed"""


@dataclass(frozen=True)
class Generate(GenerationFlags):
    """Continue a prompt with a model folder or a GPT-2 from the Hugging Face hub.

    The prompt is --prompt, a file or standard input from a pipe; without one a new text begins.
    """

    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """the text to continue"""
    prompt_file: File = None
    """a file with the text to continue, - for stdin; a newline at its end is removed"""
    special: bool = True
    """read special tokens in the prompt, such as <|endoftext|>, as tokens, not as text"""
    output: Output = field(default_factory=Output)
    search: BeamSearch = field(default_factory=BeamSearch)
    speed: SpeedAndCacheFlags = field(default_factory=SpeedAndCacheFlags)

    def __call__(self) -> None:
        settings = self.settings()
        from mlx_gpt.generate.generation import Generation
        from mlx_gpt.generate.memory import memory_limits
        from mlx_gpt.generate.prompt_cache import load_prompt_cache, save_prompt_cache
        from mlx_gpt.generate.speculative import id_list
        from mlx_gpt.generate.writer import CONTEXT

        model, tokenizer, draft = self.load()
        ids = self._ids(tokenizer)
        file, saved = self.speed.prompt_cache, self.speed.save_prompt_cache
        ids = tokenizer.as_prompt(ids) if file is None else ids
        prefix = load_prompt_cache(expand_user(file), model, tokenizer) if file is not None else None
        n, P = len(ids) + len(prefix.ids if prefix else ()), model.config.n_positions
        if saved is not None and n >= P:
            raise UsageError(f"--save-prompt-cache takes a prompt of at most {P - 1} tokens, not {n}; shorten it")
        run = Generation(model, tokenizer, [ids] * self.output.samples, settings, draft, prefix)
        if run.n_dropped:
            note(f"the prompt does not fit into the model's context of {P} tokens: its last {P - 1} are read")
        with memory_limits(model, self.output.samples):
            self._show(run, tokenizer)
        if CONTEXT in run.reasons and not self.output.json:
            remedy = "; --context slide continues" if saved is None else ""
            note(f"the text ends where the model's context of {P} tokens is full{remedy}")
        if saved is not None:
            run.read_prompt()
            save_prompt_cache(expand_user(saved), run.decoder, tokenizer, id_list(run.prompts[0]))

    def settings(self) -> GenerationSettings:
        """Return the settings of the flags; ``UsageError`` for flags that contradict each other."""
        out = self.output
        if out.samples < 1:
            raise UsageError(f"--samples must be 1 or above, not {out.samples}")
        if out.colour and (out.json or out.logprobs is not None):
            raise UsageError("--colour shows the text, --logprobs and --json show each token; take one of them")
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("--prompt and --prompt-file both give the prompt; take one of them")
        logprobs = 0 if out.colour and out.logprobs is None else out.logprobs
        settings = GenerationSettings.of(
            self.length, self.constraints, self.drawing, self.search, self.speed, logprobs=logprobs
        )
        refuse_idle(self.given, idle(settings))
        if self.speed.save_prompt_cache is not None:
            if settings.context == SLIDE:
                raise UsageError("--save-prompt-cache saves what --context slide drops; leave out one")
            check_writable("--save-prompt-cache", self.speed.save_prompt_cache)
        return settings

    def _ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the prompt."""
        return prompt_ids(tokenizer, prompt_text(self.prompt, self.prompt_file), self.special)

    def _show(self, run: Generation, tokenizer: Tokenizer) -> None:
        from mlx_gpt.generate.stats import memory_speed

        out, text = self.output, ""
        rows = out.logprobs is not None
        for row, piece in watched(in_order(run, out.samples)):
            if piece is not None:
                text += piece.text
                if out.json:
                    write(json.dumps({"sample": row} | as_json(piece, tokenizer)) + "\n")
                else:
                    style = surprise_style(piece) if out.colour else ""
                    write(as_row(piece, tokenizer) if rows else piece.text, style)
            else:
                if out.json:
                    write(json.dumps({"sample": row, "end": run.reasons[row], "text": text}) + "\n")
                else:
                    write(("" if rows else "\n") + ("---\n" if row < out.samples - 1 else ""))
                text = ""
        if out.colour:
            print(legend(), file=sys.stderr)
        if out.figures and out.json:
            write(json.dumps({"figures": run.stats.as_dict(memory_speed())}) + "\n")
        elif out.figures:
            note(run.stats.summary(memory_speed()))


def idle(settings: GenerationSettings) -> dict[str, str]:
    """Return the settings that have no effect beside the others, with the reason."""
    if settings.beams > 1:
        drawing = {"seed", "top_k", "top_p", "min_p", "typical_p", *(["temperature"] if settings.temperature else [])}
        return dict.fromkeys(drawing, "with --beams, which draws nothing")
    drawing = {"top_k", "top_p", "min_p", "typical_p"} if settings.temperature == 0 else set()
    return dict.fromkeys(drawing, "with --temperature 0") | {"length_penalty": "without --beams above 1"}


def check_writable(flag: str, file: str) -> None:
    """Raise ``UsageError`` unless the file of a flag can be written; this is tried beside it."""
    path = Path(os.path.realpath(expand_user(file)))
    try:
        if path.is_dir() or not file:
            raise UsageError(f"{flag} {file!r}: expected a file, found a folder; give a name in it")
        if not path.parent.is_dir():
            raise UsageError(f"{flag} {file}: there is no folder {Path(file).parent}; create it")
        check_replaceable(expand_user(file))
        with hidden_folder(path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {file}: cannot be written ({error.strerror}); choose another path") from error


def in_order(run: Generation, n: int) -> Iterator[tuple[int, Piece | None]]:
    """Yield the pieces of each of n rows in order, None after each row; those of the first as they are generated."""
    held: list[list[Piece]] = [[] for _ in range(n)]
    for row, piece in run:
        if row:
            held[row].append(piece)
        else:
            yield 0, piece
    for row in range(n):
        yield from ((row, piece) for piece in held[row])
        yield row, None


def prompt_ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """Return the ids of a prompt, with ``special`` tokens in it as such."""
    if not special:
        return tokenizer.encode(text)
    if EOT in text:
        note(f"{EOT} in the prompt separates documents, as in training; --no-special reads it as text")
    return tokenizer.encode_documents(text, allow_special=True)


def prompt_text(prompt: str | None, file: str | None) -> str:
    """Return the prompt of the flags, or of a pipe, or "".

    One newline at the end of a file is removed, which editors and ``echo`` add. Raises ``DataError`` for a file that
    cannot be read, and for a flag that is not UTF-8.
    """
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # Python's surrogates for bytes that are not UTF-8
            raise DataError(
                "the prompt: expected text in UTF-8, found other bytes; convert it, as with iconv"
            ) from None
        return prompt
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    text, changes = read_text(STDIN if file is None else file, as_text=True)
    if str(changes):
        note(str(changes))
    return text.removesuffix("\n")
