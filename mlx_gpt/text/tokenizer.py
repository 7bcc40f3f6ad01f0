"""Text to token ids and back: byte-level byte-pair encoding, one kind of tokenizer for every vocabulary.

How it works (Sennrich et al. 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2):

1. Text is UTF-8 bytes, and each of the 256 bytes is a token. So nothing is ever unknown.
2. Training finds the pair of neighbouring tokens that occurs most often, makes it one new token, and starts over.
   The list of these merges, in order, *is* the vocabulary.
3. Encoding cuts text into words (``SPLIT``), then replays the merges inside each word, the earliest first.
   ``merge_bytes`` below is that in a dozen lines; tiktoken does the same, fast.
4. Decoding joins the tokens' bytes. A character may span several tokens, so a stream must hold bytes back.

Ids as in GPT-2: the 256 bytes, then the merges in order, then ``<|endoftext|>``, which is no text but a mark
between documents. A loaded folder keeps the ids it came with, since a model's weights are bound to them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mlx_gpt.errors import TokenizerError, UsageError

Token = bytes  # what one id stands for
EOT = "<|endoftext|>"

# GPT-2's words: contractions, letters, digits, signs (each with at most one space before it), and white space. The
# possessive `++` and the `\s++$` are tiktoken's: the same words, without backtracking over long runs.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# In GPT-2's files each byte is one visible character: itself where it is printable, else the next of chr(256), ...
# The bytes' ids follow that order, so byte BYTES[i] has id i and is written CHARACTERS[i].
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]
CHARACTERS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
WRITE = dict(zip(BYTES, CHARACTERS, strict=True))
READ = dict(zip(CHARACTERS, BYTES, strict=True))


class Tokenizer:
    """Byte-level BPE: ``ranks`` maps each token's bytes to its id, ``specials`` each mark such as ``<|endoftext|>``.

    Usually made by one of the class methods: ``gpt2``, ``bytes``, ``train``, ``from_folder``. Ids must rise in the
    order of the merges (tiktoken takes them as the merges' ranks).
    """

    def __init__(self, ranks: dict[Token, int], specials: dict[str, int]):
        self.ranks = ranks
        self.specials = dict(sorted(specials.items(), key=lambda item: item[1]))

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's own 50,257 ids, as tiktoken has them. The first use downloads two files, 1.5 MB, and keeps them.

        Raises ``TokenizerError`` where they are neither here nor to be had.
        """
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; a download with the wrong hash
            raise TokenizerError(
                f"expected GPT-2's vocabulary, but it could not be downloaded ({type(error).__name__}): connect to the "
                f"internet once, or load a GPT-2 folder that holds vocab.json and merges.txt"
            ) from error
        ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
        tokenizer = cls(ranks, {EOT: encoding.eot_token})
        tokenizer._encoding = encoding
        return tokenizer

    @classmethod
    def bytes(cls) -> Tokenizer:
        """No merges at all: 256 bytes and ``<|endoftext|>``, 257 ids."""
        return cls._from_merges([])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A vocabulary of exactly ``vocab_size`` ids (bytes, merges and ``<|endoftext|>``), learned from ``texts``.

        The same texts give the same vocabulary, always. Raises ``UsageError`` where ``vocab_size`` is below 257, or
        above what the texts give: a pair that occurs only once is no pattern and is not merged.
        """
        if vocab_size < 257:
            raise UsageError(f"a vocabulary needs at least 257 ids (256 bytes and {EOT}), not {vocab_size}")
        from tokenizers import Tokenizer as Trainee
        from tokenizers import models, pre_tokenizers, trainers

        trainee = Trainee(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # <|endoftext|> is added below, behind the merges
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256, also those the texts lack
            show_progress=False,
        )
        trainee.train_from_iterator([texts] if isinstance(texts, str) else texts, trainer)
        tokenizer = cls._from_merges(_pairs(json.loads(trainee.to_str())["model"]["merges"]))
        if tokenizer.vocab_size < vocab_size:
            raise UsageError(
                f"the text is too small for a vocabulary of {vocab_size} ids: after {tokenizer.vocab_size} no pair of "
                f"tokens occurs twice; ask for bpe:{tokenizer.vocab_size} or less, or bring more text"
            )
        return tokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a model folder: ``vocab.json`` and ``merges.txt``, or else ``tokenizer.json``.

        Tokens added beside ``<|endoftext|>`` keep their ids and decode to their text. Raises ``TokenizerError`` where
        files are missing, damaged, disagree, or hold another kind of tokenizer.
        """
        vocab_file, merges_file, fast_file, added_file = (
            Path(folder) / name for name in ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
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
        _check_ids(parts, file)
        ranks = _ranks(parts, file)
        return cls(ranks, _specials(parts, ranks, file))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the four files that transformers, mlx-lm and ``from_folder`` read. Creates the folder."""
        merges = [f"{_write(left)} {_write(right)}" for left, right in merges_of(self.ranks)]
        files = {
            "vocab.json": self._vocab_json,  # for GPT-2, byte for byte OpenAI's encoder.json
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),  # and its vocab.bpe
            "tokenizer.json": json.dumps(_fast_tokenizer(self._vocab, merges, self.specials), ensure_ascii=False),
            "tokenizer_config.json": json.dumps(_tokenizer_config(self.specials), indent=2),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (Path(folder) / name).write_bytes(text.encode())

    @property
    def vocab_size(self) -> int:
        """V: one more than the highest id."""
        return max(*self.ranks.values(), *self.specials.values()) + 1

    @property
    def eot_id(self) -> int:
        """The id of ``<|endoftext|>``."""
        return self.specials[EOT]

    @cached_property
    def hash(self) -> str:
        """What identifies this tokenizer: the sha256, in hex, of its ``vocab.json`` (for GPT-2 that of OpenAI's)."""
        return hashlib.sha256(self._vocab_json.encode()).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of a text. ``<|endoftext|>`` written in it is plain text, or its id with ``allow_special``."""
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as ``encode`` gives them, on all cores."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no whole character become U+FFFD. ``ValueError`` for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> Token:
        """The bytes of some ids, joined. Raises ``ValueError`` for an id that the vocabulary lacks."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> Token:
        """The bytes one id stands for. Raises ``ValueError`` for an id that the vocabulary lacks."""
        try:
            return self._tokens[token_id]
        except KeyError:
            raise ValueError(
                f"no token has id {token_id}: the vocabulary's ids are 0 to {self.vocab_size - 1}; "
                f"were these ids made with another tokenizer?"
            ) from None

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:8]})"

    @classmethod
    def _from_merges(cls, merges: Iterable[tuple[str, str]]) -> Tokenizer:
        tokens = [Token([b]) for b in BYTES] + [_read(left + right) for left, right in merges]
        ranks = {token: i for i, token in enumerate(tokens)}
        assert len(ranks) == len(tokens), "two merges made the same token"
        return cls(ranks, {EOT: len(ranks)})

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding("mlx_gpt", pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens=self.specials)

    @cached_property
    def _tokens(self) -> dict[int, Token]:
        ordinary = {i: token for token, i in self.ranks.items()}
        return ordinary | {i: text.encode() for text, i in self.specials.items()}

    @cached_property
    def _vocab(self) -> dict[str, int]:
        names = {_write(token): i for token, i in self.ranks.items()} | self.specials
        return dict(sorted(names.items(), key=lambda item: item[1]))

    @cached_property
    def _vocab_json(self) -> str:
        return json.dumps(self._vocab)


class StreamDecoder:
    """Ids in, one at a time; whole characters out. What was pushed and flushed is, joined, what ``decode`` gives."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often "" inside an emoji or a CJK character."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """At the end: U+FFFD for bytes that never became a character, else "". The decoder is then as new."""
        return self._utf8.decode(b"", final=True)


def make_tokenizer(spec: str, texts: Iterable[str] | Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer a setting names: ``gpt2``, ``bytes``, or ``bpe:N``, trained on ``texts`` to N ids.

    ``texts`` may be a function, which is called only where it is needed. Raises ``UsageError`` for any other name.
    """
    if spec == "gpt2":
        return Tokenizer.gpt2()
    if spec == "bytes":
        return Tokenizer.bytes()
    if re.fullmatch(r"bpe:[0-9]{1,7}", spec):
        return Tokenizer.train(texts() if callable(texts) else texts, int(spec.removeprefix("bpe:")))
    raise UsageError(f"unknown tokenizer {spec!r}; choose gpt2, bytes, or bpe:N with N ids, such as bpe:4096")


def merge_bytes(word: Token, ranks: dict[Token, int], below: int) -> list[Token]:
    """BPE as the paper tells it: merge the neighbours that were learned first, until none is left to merge.

    Only merges with a rank under ``below`` count. ``merge_bytes(b"hello", ranks, below=len(ranks))``, with the merges
    he, ll, llo in ``ranks``, goes h e l l o -> he l l o -> he ll o -> he llo.
    """
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        if (first := min(pairs)) >= below:
            break
        i = pairs.index(first)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks: dict[Token, int]) -> list[tuple[Token, Token]]:
    """The merges behind a vocabulary, in order: each token's halves are what the earlier merges leave of its bytes."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = merge_bytes(token, ranks, below=rank)
            if len(halves) != 2:
                raise TokenizerError(
                    f"token {_write(token)!r} (id {rank}) should be made of two earlier tokens, found {len(halves)}; "
                    f"this vocabulary cannot be saved as merges"
                )
            merges.append((halves[0], halves[1]))
    return merges


def _write(token: Token) -> str:
    return "".join(WRITE[b] for b in token)


def _read(name: str) -> Token:
    return Token(READ[c] for c in name)


class Parts(NamedTuple):
    """What a folder's files say: each name's id, the merges in order, and the ids of tokens added afterwards."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    # tokenizer.json holds "a b" in old files, ["a", "b"] in new ones.
    halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in halves]


def _damaged(file: Path, expected: str, found: str) -> TokenizerError:
    return TokenizerError(f"{file}: expected {expected}, found {found}; fetch the file again from where it came")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(file, "UTF-8 text", f"the byte {error.object[error.start]:#04x} at {error.start}") from error
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise _damaged(file, "JSON", f"{error.msg} in line {error.lineno}, column {error.colno}") from error
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
        # Another split or a normalizer would give other ids without a word, so only GPT-2's own kind is let in.
        if kind != ("BPE", "ByteLevel", False, True) or fast.get("normalizer"):
            raise TokenizerError(
                f"{file}: expected GPT-2's kind (BPE on the words of ByteLevel, no prefix space, no normalizer), "
                f"found {kind[0]} on {kind[1]}, or other settings; this folder belongs to another kind of model"
            )
        added = {token["content"]: token["id"] for token in fast.get("added_tokens") or []}
        return Parts(dict(model["vocab"]), _pairs(model["merges"]), added)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, "what the tokenizers library writes", f"{type(error).__name__}: {error}") from error


def _check_ids(parts: Parts, file: Path) -> None:
    ids = parts.vocab | parts.added
    if wrong := [name for name, i in ids.items() if type(i) is not int or i < 0]:
        raise _damaged(file, "whole numbers as ids", f"{wrong[0]!r} with id {ids[wrong[0]]!r}")
    if len(set(ids.values())) < len(ids):
        raise _damaged(file, "an id of its own for each token", f"{len(ids)} tokens with {len(set(ids.values()))} ids")


def _ranks(parts: Parts, file: Path) -> dict[Token, int]:
    """The mergeable tokens: all bytes, then what each merge makes, which must be new, in the vocabulary, and rising."""
    if lacking := [c for c in CHARACTERS if c not in parts.vocab]:
        raise _damaged(file, "all 256 bytes in the vocabulary", f"{256 - len(lacking)}, without {lacking[0]!r}")
    known = dict.fromkeys(CHARACTERS)
    last = -1
    for left, right in parts.merges:
        token = left + right
        if left not in known or right not in known or token not in parts.vocab:
            raise _damaged(file, "merges of two earlier tokens into one of the vocabulary", f"{left!r} {right!r}")
        if parts.vocab[token] <= last:
            raise _damaged(file, "ids that rise in the order of the merges", f"{token!r} with id {parts.vocab[token]}")
        known[token], last = None, parts.vocab[token]
    return {_read(name): parts.vocab[name] for name in known}


def _specials(parts: Parts, ranks: dict[Token, int], file: Path) -> dict[str, int]:
    """What no merge makes: ``<|endoftext|>`` and its like. Anything else there means that merges are missing."""
    made = set(ranks.values())
    specials = {name: i for name, i in (parts.vocab | parts.added).items() if i not in made}
    marks = re.compile(r"<\S+>|\[[A-Z]+\]")
    if strays := [name for name in specials if name not in parts.added and not marks.fullmatch(name)]:
        raise _damaged(file, "a merge for each token", f"none for {len(strays)}, the first {strays[0]!r}")
    if EOT not in specials:
        raise _damaged(file, f"{EOT} among the tokens", "none")
    return specials


def _added_token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **flags, "special": True}


def _fast_tokenizer(vocab: dict[str, int], merges: list[str], specials: dict[str, int]) -> dict[str, Any]:
    # The format of the tokenizers library, with merges as "a b", which its old and new releases both read.
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
