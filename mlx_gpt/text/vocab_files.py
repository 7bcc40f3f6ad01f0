"""The files of a tokenizer: GPT-2's vocab.json and merges.txt, and the tokenizer.json of the tokenizers library.

They are validated when read: a damaged vocabulary, or one of another kind, would silently give wrong ids.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_gpt.errors import TokenizerError
from mlx_gpt.files import parse_json, read_small

Token = bytes  # the bytes of one id
EOT = "<|endoftext|>"
LIMIT = 20_000_000  # bytes; GPT-2's tokenizer.json has 1.4 million

# In GPT-2's files each byte is one visible character: itself if printable, else the next of chr(256), chr(257), ...
# The bytes' ids follow that order: byte BYTES[i] has id i and is written CHARACTERS[i].
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]
CHARACTERS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
WRITE = dict(zip(BYTES, CHARACTERS, strict=True))
READ = str.maketrans(dict(zip(CHARACTERS, map(chr, BYTES), strict=True)))


class Parts(NamedTuple):
    """The contents of a folder's files: each name's id, the merges in order, and the ids of added tokens."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]


def read_vocabulary(folder: str | os.PathLike[str]) -> tuple[dict[Token, int], dict[str, int]]:
    """Read the ids of tokens and of special tokens from ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``.

    Raises ``TokenizerError`` for files that are missing, damaged, inconsistent, or of another kind of tokenizer.
    """
    vocab_file, merges_file, fast_file, added_file = (
        Path(folder) / name for name in ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
    )
    if not vocab_file.exists() and not merges_file.exists():  # OpenAI's own names for the two
        vocab_file, merges_file = (
            there if (there := Path(folder) / name).exists() else file
            for name, file in (("encoder.json", vocab_file), ("vocab.bpe", merges_file))
        )
    fast = _read_fast(fast_file) if fast_file.exists() else None
    added = fast.added if fast else {}
    if vocab_file.exists() and merges_file.exists():
        added = added | (_read_object(added_file) if added_file.exists() else {})
        parts, file = Parts(_read_object(vocab_file), _read_merges(merges_file), added), merges_file
    elif fast:
        parts, file = fast, fast_file
    else:
        found = next((f"only {file.name}" for file in (vocab_file, merges_file) if file.exists()), "neither")
        raise TokenizerError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found {found}; "
            f"copy them from the model this folder was made from"
        )
    return build_vocabulary(parts, file)


def build_vocabulary(parts: Parts, file: Path) -> tuple[dict[Token, int], dict[str, int]]:
    """Return the ids of tokens and of special tokens that a file means. Raises ``TokenizerError``."""
    _check_ids(parts, file)
    ranks = _ranks(parts, file)
    return ranks, _specials(parts, ranks, file)


def write_vocabulary(
    folder: str | os.PathLike[str], vocab: dict[str, int], merges: list[tuple[Token, Token]], specials: dict[str, int]
) -> None:
    """Write the four files that transformers and mlx-lm read. Creates the folder."""
    lines = [f"{write_name(left)} {write_name(right)}" for left, right in merges]
    files = {
        "vocab.json": json.dumps(vocab),  # for GPT-2, byte for byte OpenAI's encoder.json
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),  # and its vocab.bpe
        "tokenizer.json": json.dumps(_fast_tokenizer(vocab, lines, specials), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_tokenizer_config(specials), indent=2),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (Path(folder) / name).write_bytes(text.encode())


def write_name(token: Token) -> str:
    """Return a token's name in the files: a visible character for each byte."""
    return "".join(WRITE[b] for b in token)


def read_name(name: str) -> Token:
    """Return the token with this name in the files."""
    return name.translate(READ).encode("latin-1")


def pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """Split the merges of a tokenizer.json: "a b" in old files, ["a", "b"] in new ones."""
    halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in halves]


# Reading --------------------------------------------------------------------------------------------------------------


def _damaged(file: Path, expected: str, found: str) -> TokenizerError:
    return TokenizerError(f"{file}: expected {expected}, found {found}; download the file again")


def _read_text(file: Path) -> str:
    try:
        return read_small(file, LIMIT).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise _damaged(file, "UTF-8 text", f"the byte {error.object[error.start]:#04x} at {error.start}") from error
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(_read_text(file))
    except json.JSONDecodeError as error:
        raise _damaged(file, "JSON", f"{error.msg} in line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise _damaged(file, "JSON", f"invalid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _damaged(file, "a JSON object", type(value).__name__)
    return value


def _read_merges(file: Path) -> list[tuple[str, str]]:
    lines = _read_text(file).rstrip("\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if number == 1 and (line.startswith("#version") or not line):
            continue
        halves = line.split(" ")
        if len(halves) != 2 or not all(halves):
            raise _damaged(file, f"two tokens and a space between them in line {number}", repr(line))
        merges.append((halves[0], halves[1]))
    return merges


def _read_fast(file: Path) -> Parts:
    fast = _read_object(file)
    try:
        model, words = fast["model"], fast.get("pre_tokenizer") or {}
        kind = (model["type"], words.get("type"), words.get("add_prefix_space"), words.get("use_regex", True))
        # Another split or a normalizer would silently give other ids, so only GPT-2's own kind is accepted.
        if kind != ("BPE", "ByteLevel", False, True) or fast.get("normalizer"):
            raise TokenizerError(
                f"{file}: expected GPT-2's kind (BPE on the words of ByteLevel, no prefix space, no normalizer), "
                f"found {kind[0]} on {kind[1]}, or other settings; this folder belongs to another kind of model"
            )
        added = {token["content"]: token["id"] for token in fast.get("added_tokens") or []}
        return Parts(dict(model["vocab"]), pairs(model["merges"]), added)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, "the format of the tokenizers library", f"{type(error).__name__}: {error}") from error


def _check_ids(parts: Parts, file: Path) -> None:
    ids = parts.vocab | parts.added
    if wrong := [name for name, i in ids.items() if type(i) is not int or not 0 <= i < 2**31]:
        raise _damaged(file, "whole numbers as ids", f"{wrong[0]!r} with id {ids[wrong[0]]!r}")
    if wrong := [name for name in ids if not _is_text(name)]:
        raise _damaged(file, "text as tokens", repr(wrong[0]))
    if len(set(ids.values())) < len(ids):
        raise _damaged(file, "a different id for each token", f"{len(ids)} tokens with {len(set(ids.values()))} ids")


def _is_text(name: Any) -> bool:
    """Return True for a non-empty name that UTF-8 can encode: JSON may contain lone surrogates."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _ranks(parts: Parts, file: Path) -> dict[Token, int]:
    """Return the mergeable tokens: all bytes, then the result of each merge: new, in the vocabulary, ids increasing."""
    if lacking := [c for c in CHARACTERS if c not in parts.vocab]:
        raise _damaged(file, "all 256 bytes in the vocabulary", f"{256 - len(lacking)}, without {lacking[0]!r}")
    known = dict.fromkeys(CHARACTERS)
    last = -1
    for left, right in parts.merges:
        token = left + right
        if left not in known or right not in known or token not in parts.vocab:
            raise _damaged(file, "merges of two earlier tokens into one of the vocabulary", f"{left!r} {right!r}")
        if parts.vocab[token] <= last:
            raise _damaged(
                file, "ids that increase in the order of the merges", f"{token!r} with id {parts.vocab[token]}"
            )
        known[token], last = None, parts.vocab[token]
    return {read_name(name): parts.vocab[name] for name in known}


def _specials(parts: Parts, ranks: dict[Token, int], file: Path) -> dict[str, int]:
    """Return the tokens that no merge makes, such as ``<|endoftext|>``. Any other one means that merges are missing."""
    merged = set(ranks.values())
    specials = {name: i for name, i in (parts.vocab | parts.added).items() if i not in merged}
    special = re.compile(r"<\S+>|\[[A-Z]+\]")
    if strays := [name for name in specials if name not in parts.added and not special.fullmatch(name)]:
        raise _damaged(file, "a merge for each token", f"none for {len(strays)}, the first {strays[0]!r}")
    if EOT not in specials:
        raise _damaged(file, f"{EOT} among the tokens", "none")
    return specials


# Writing --------------------------------------------------------------------------------------------------------------


def _added_token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **flags, "special": True}


def _fast_tokenizer(vocab: dict[str, int], merges: list[str], specials: dict[str, int]) -> dict[str, Any]:
    # The format of the tokenizers library, with merges as "a b", which its old and new versions read.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **_added_token(text)} for text, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _tokenizer_config(specials: dict[str, int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT),
        "added_tokens_decoder": {str(i): _added_token(text) for text, i in specials.items()},
    }
