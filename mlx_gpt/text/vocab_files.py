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
from mlx_gpt.text.settings_files import CONFIG, FAST, Files, damaged, is_text, read_object, read_text
from mlx_gpt.text.token_settings import TokenSettings, settings_of

Token = bytes  # the bytes of one id
VOCAB, MERGES = "vocab.json", "merges.txt"
OPENAI = {"encoder.json": VOCAB, "vocab.bpe": MERGES}  # OpenAI's own names for the two
TOKENIZER_FILES = [VOCAB, MERGES, FAST, CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "*.model"]
FOREIGN = ("vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")  # WordPiece, SentencePiece and others

# In GPT-2's files each byte is one visible character: itself if printable, else the next of chr(256), chr(257), ...
# The bytes' ids follow that order: byte BYTES[i] has id i and is written CHARACTERS[i].
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]
CHARACTERS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
WRITE = dict(zip(BYTES, CHARACTERS, strict=True))
SPECIAL = re.compile(r"<\S+>|\[[A-Z]+\]")  # the form of a token that no merge makes
READ = str.maketrans(dict(zip(CHARACTERS, map(chr, BYTES), strict=True)))


class Parts(NamedTuple):
    """The contents of a vocabulary's files: each name's id, and the merges in order; and the two files."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    vocab_file: Path
    merges_file: Path


def has_vocabulary(folder: Path) -> bool:
    """Return True for a folder with files of a GPT-2 vocabulary. ``TokenizerError`` if it has another kind's only."""
    if any((folder / name).exists() for name in (VOCAB, MERGES, FAST, *OPENAI)):
        return True
    Files.read(folder).check_class()
    if foreign := sorted(file for pattern in FOREIGN for file in folder.glob(pattern)):
        raise TokenizerError(
            f"{foreign[0]}: expected a tokenizer of GPT-2's kind (vocab.json and merges.txt, or tokenizer.json), found "
            f"one of another kind (WordPiece, SentencePiece, ...); this folder belongs to another kind of model"
        )
    return False


def read_vocabulary(
    path: str | os.PathLike[str], limit: int | None = None
) -> tuple[dict[Token, int], dict[str, int], TokenSettings]:
    """Read the ids of tokens, those of the tokens that no merge makes, and the settings.

    ``path`` is a folder, or a file like ``tokenizer.json``, which precedes ``vocab.json`` and ``merges.txt`` as in
    transformers. For ``limit``, see ``read_settings``. Raises ``TokenizerError`` for files that are missing, damaged,
    inconsistent, or of another kind of tokenizer.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".json" and path.name not in (MERGES, *OPENAI):
        raise TokenizerError(f"{path}: expected a folder or a tokenizer.json, found another file")
    folder = path.parent if path.is_file() else path
    fast_file = path if path.is_file() and path.name not in (VOCAB, MERGES, *OPENAI) else folder / FAST
    files = Files.read(folder if fast_file == folder / FAST else None)
    if not fast_file.exists():
        has_vocabulary(folder)
        return build_vocabulary(_of_two_files(folder), files, None, limit)
    fast = read_object(fast_file)
    parts = _of_fast(fast_file, fast)
    ranks, specials, settings = build_vocabulary(parts, files, fast, limit)
    if (folder / VOCAB).exists() and (folder / MERGES).exists():
        other = _of_two_files(folder)
        if other[:2] != parts[:2]:  # not used, but a damaged folder is reported
            _check_ids(other)
            _specials(other, _ranks(other), settings)
    return ranks, specials, settings


def build_vocabulary(
    parts: Parts, files: Files, fast: dict[str, Any] | None = None, limit: int | None = None
) -> tuple[dict[Token, int], dict[str, int], TokenSettings]:
    """Return what ``read_vocabulary`` does from the contents of the files. Raises ``TokenizerError``."""
    _check_ids(parts)
    settings = settings_of(files, parts.vocab, fast, limit)
    ranks = _ranks(parts)
    return ranks, _specials(parts, ranks, settings), settings


def write_vocabulary(
    folder: str | os.PathLike[str], vocab: dict[str, int], merges: list[tuple[Token, Token]], settings: TokenSettings
) -> None:
    """Write the four files that transformers and mlx-lm read. Creates the folder."""
    lines = [f"{write_name(left)} {write_name(right)}" for left, right in merges]
    files = {
        VOCAB: json.dumps(vocab),  # for GPT-2, byte for byte OpenAI's encoder.json
        MERGES: "\n".join(["#version: 0.2", *lines, ""]),  # and its vocab.bpe
        FAST: json.dumps(_fast_tokenizer(vocab, lines, settings), ensure_ascii=False),
        CONFIG: json.dumps(_tokenizer_config(settings), indent=2),
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


def _of_two_files(folder: Path) -> Parts:
    names = (VOCAB, MERGES) if (folder / VOCAB).exists() or (folder / MERGES).exists() else tuple(OPENAI)
    vocab_file, merges_file = (folder / name for name in names)
    if not vocab_file.exists() or not merges_file.exists():
        found = next((f"only {file.name}" for file in (vocab_file, merges_file) if file.exists()), "neither")
        raise TokenizerError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found {found}; "
            f"copy them from the model this folder was made from"
        )
    return Parts(read_object(vocab_file), _read_merges(merges_file), vocab_file, merges_file)


def _read_merges(file: Path) -> list[tuple[str, str]]:
    lines = read_text(file).rstrip("\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if number == 1 and (line.startswith("#version") or not line):
            continue
        halves = line.split(" ")
        if len(halves) != 2 or not all(halves):
            raise damaged(file, f"two tokens and a space between them in line {number}", repr(line))
        merges.append((halves[0], halves[1]))
    return merges


def _of_fast(file: Path, fast: dict[str, Any]) -> Parts:
    """Return the vocabulary of a tokenizer.json. What would give other ids than GPT-2's algorithm is refused."""
    try:
        model, words = fast["model"], fast.get("pre_tokenizer") or {}
        if words.get("type") == "Sequence" and len(words["pretokenizers"]) == 1:
            words = fast["pre_tokenizer"] = words["pretokenizers"][0]
        normalizer = fast.get("normalizer") or {}
        if (model["type"], words.get("type"), words.get("use_regex", True)) != ("BPE", "ByteLevel", True):
            raise TokenizerError(
                f"{file}: expected GPT-2's kind, BPE on the words of ByteLevel, found {model['type']} on "
                f"{words.get('type')}, or with another regex; this folder belongs to another kind of model"
            )
        others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        wrong = [f"{key} {model[key]!r:.40}" for key in others if model.get(key)]
        if normalizer.get("normalizers", normalizer):  # an empty sequence changes nothing
            wrong.append(f"the normalizer {normalizer.get('type')}")
        if wrong:
            raise TokenizerError(
                f"{file}: expected GPT-2's kind, without {wrong[0]}; this folder belongs to another kind of model"
            )
        return Parts(dict(model["vocab"]), pairs(model["merges"]), file, file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(file, "the format of the tokenizers library", f"{type(error).__name__}: {error}") from error


def _check_ids(parts: Parts) -> None:
    file, ids = parts.vocab_file, parts.vocab
    if wrong := [name for name, i in ids.items() if type(i) is not int or not 0 <= i < 2**31]:
        raise damaged(file, "whole numbers as ids", f"{wrong[0]!r} with id {ids[wrong[0]]!r}")
    if wrong := [name for name in ids if not is_text(name)]:
        raise damaged(file, "text as tokens", repr(wrong[0]))
    if len(set(ids.values())) < len(ids):
        raise damaged(file, "a different id for each token", f"{len(ids)} tokens with {len(set(ids.values()))} ids")


def _ranks(parts: Parts) -> dict[Token, int]:
    """Return the mergeable tokens: all bytes, then the result of each merge: new, in the vocabulary, ids increasing."""
    if lacking := [c for c in CHARACTERS if c not in parts.vocab]:
        found = f"{256 - len(lacking)}, without {lacking[0]!r}"
        raise damaged(parts.vocab_file, "all 256 bytes in the vocabulary", found)
    known = dict.fromkeys(CHARACTERS)
    last = -1
    for left, right in parts.merges:
        token = left + right
        if left not in known or right not in known or token not in parts.vocab:
            raise damaged(
                _suspect(parts), "merges of two earlier tokens into one of the vocabulary", f"{left!r} {right!r}"
            )
        if parts.vocab[token] <= last:
            found = f"{token!r} with id {parts.vocab[token]}"
            raise damaged(_suspect(parts), "ids that increase in the order of the merges", found)
        known[token], last = None, parts.vocab[token]
    return {read_name(name): parts.vocab[name] for name in known}


def _suspect(parts: Parts) -> str:
    """Return the file to blame for a merge that does not fit its token: both, where either may be damaged."""
    vocab, merged = parts.vocab, [left + right for left, right in parts.merges]
    if len(set(merged)) < len(merged):
        return str(parts.merges_file)
    strays = [name for name in vocab.keys() - {*merged, *CHARACTERS} if not SPECIAL.fullmatch(name)]
    lacking = [token for token in merged if token not in vocab]
    if max(vocab.values()) >= len(vocab):  # an id is missing
        return str(parts.vocab_file)
    if strays == lacking == [] or (strays and lacking):
        return str(parts.merges_file) if parts.vocab_file == parts.merges_file else f"{parts.vocab_file} or merges.txt"
    return str(parts.merges_file)


def _specials(parts: Parts, ranks: dict[Token, int], settings: TokenSettings) -> dict[str, int]:
    """Return the tokens that no merge makes, such as ``<|endoftext|>``. Any other one means that merges are missing."""
    merged, added = set(ranks.values()), {token.text: token.id for token in settings.added}
    specials = {name: i for name, i in (parts.vocab | added).items() if i not in merged}
    if strays := [name for name in specials if name not in added and not SPECIAL.fullmatch(name)]:
        found = f"none for {len(strays)}, the first {strays[0]!r}"
        raise damaged(parts.merges_file, "a merge for each token", found)
    return specials


# Writing --------------------------------------------------------------------------------------------------------------


def _fast_tokenizer(vocab: dict[str, int], merges: list[str], settings: TokenSettings) -> dict[str, Any]:
    # The format of the tokenizers library, with merges as "a b", which its old and new versions read.
    words = {"type": "ByteLevel", "add_prefix_space": settings.add_prefix_space, "trim_offsets": False}
    words |= {"use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token.id, "content": token.text, **token.flags} for token in settings.added],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": _post_processor(vocab, settings) or words,
        "decoder": words,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _post_processor(vocab: dict[str, int], settings: TokenSettings) -> dict[str, Any] | None:
    """Return the template that puts ids around a text, or None."""
    if not settings.prefix and not settings.suffix:
        return None
    names = {i: name for name, i in vocab.items()}
    before, after = ([_piece("SpecialToken", names[i]) for i in ids] for ids in (settings.prefix, settings.suffix))
    around = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in settings.prefix + settings.suffix}
    text, other = ([*before, _piece("Sequence", text, i), *after] for i, text in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": text, "pair": text + other, "special_tokens": around}


def _piece(kind: str, name: str, type_id: int = 0) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": type_id}}


def _end_name(settings: TokenSettings) -> dict[str, str | None]:
    """Return the name of the end token, None for a word, if the one in ``named`` does not end a text."""
    texts = {token.id: token.text for token in settings.added}
    is_end = settings.named.get("eos_token") in [texts.get(i) for i in settings.ends]
    return {} if is_end else {"eos_token": texts.get(settings.ends[0])}


def _tokenizer_config(settings: TokenSettings) -> dict[str, Any]:
    named = [text for text in settings.named.values() if text]
    extra = [token.text for token in settings.added if token.special and token.text not in named]
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": settings.add_prefix_space,
        "add_bos_token": bool(settings.prefix),  # read where tokenizer.json is not
        "add_eos_token": bool(settings.suffix),
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token")),
        **settings.named,
        **_end_name(settings),
        **({"additional_special_tokens": extra} if extra else {}),
        "added_tokens_decoder": {str(token.id): {"content": token.text, **token.flags} for token in settings.added},
    }
