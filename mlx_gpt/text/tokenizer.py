"""Byte-level byte-pair encoding (BPE): text to token ids and back.

The algorithm (Sennrich et al. 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2):

1. Text is UTF-8 bytes, and each of the 256 bytes is a token. So no text is out of vocabulary.
2. Training merges the most frequent pair of adjacent tokens into a new token, and repeats. The list of these
   merges, in order, *is* the vocabulary.
3. Encoding splits text into words (``SPLIT``), then applies the merges inside each word, the earliest first.
   ``merge_bytes`` below does so in a dozen lines; tiktoken does it fast.
4. Decoding joins the tokens' bytes. A character may span several tokens, so a stream decoder buffers bytes.

Ids as in GPT-2: the 256 bytes, then the merges in order, then the special token ``<|endoftext|>``, which separates
documents. A loaded folder keeps its ids, since a model's weights depend on them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from mlx_gpt.errors import HubError, TokenizerError, UsageError
from mlx_gpt.files import expand_user
from mlx_gpt.hub import fetch
from mlx_gpt.text.added_tokens import NO_SPACE, SPACE, split_at_tokens
from mlx_gpt.text.settings_files import Files
from mlx_gpt.text.token_settings import EOT, TokenSettings, settings_of
from mlx_gpt.text.vocab_files import (
    BYTES,
    TOKENIZER_FILES,
    Token,
    pairs,
    read_name,
    read_vocabulary,
    write_name,
    write_vocabulary,
)

# GPT-2's words: contractions, letters, digits, punctuation (each with at most one leading space), and white space.
# The possessive `++` and the `\s++$` are tiktoken's: the same words, without backtracking over long runs.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONG_WORD = re.compile(r"\S{1000}|\s{1000}")  # training is quadratic in a word's length: longer words are split
MANY_SPACES = 500_000  # tiktoken goes back over a run of white space, a million characters at most
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|gpt2-(medium|large|xl)|distilgpt2")
MADE = re.compile(r"gpt2|bytes|bpe:([0-9]{1,7})")
MOST_IDS = 9_999_999  # that ``MADE`` allows
TRAINING_TEXT = 5_000_000  # characters that ``make_tokenizer`` learns a vocabulary from


class Tokenizer:
    """A byte-level BPE tokenizer: ``ranks`` maps a token's bytes to its id, ``specials`` any other token's text.

    Usually created by a class method: ``gpt2``, ``bytes``, ``train``, ``from_folder``. Ids must increase in the order
    of the merges (tiktoken uses them as the merges' ranks). ``settings`` are those of a model folder; by default all
    ``specials`` are special tokens, and ``<|endoftext|>`` is the end token.
    """

    def __init__(self, ranks: dict[Token, int], specials: dict[str, int], settings: TokenSettings | None = None):
        self.ranks = ranks
        self.specials = dict(sorted(specials.items(), key=lambda item: item[1]))
        self.settings = settings or TokenSettings.of(specials)

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """Load GPT-2's vocabulary of 50,257 ids from tiktoken, which downloads it once (1.5 MB).

        Raises ``TokenizerError`` if it is neither cached nor can be downloaded.
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
        """Create a tokenizer without merges: 256 bytes and ``<|endoftext|>``, 257 ids."""
        return cls._from_merges([])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of exactly ``vocab_size`` ids (bytes, merges and ``<|endoftext|>``) from ``texts``.

        Deterministic. Raises ``UsageError`` for a ``vocab_size`` below 257, or above what the texts support: a pair
        that occurs only once is not merged.
        """
        if vocab_size < 257:
            raise UsageError(f"a vocabulary needs at least 257 ids (256 bytes and {EOT}), not {vocab_size}")
        from tokenizers import Tokenizer as Trainee
        from tokenizers import models, pre_tokenizers, trainers

        trainee = Trainee(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # <|endoftext|> is added below, after the merges
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256, including those not in the texts
            show_progress=False,
        )
        texts = [texts] if isinstance(texts, str) else texts
        with _panics_reported():
            trainee.train_from_iterator(_with_short_words(texts), trainer)
        tokenizer = cls._from_merges(pairs(json.loads(trainee.to_str())["model"]["merges"]))
        if tokenizer.vocab_size < vocab_size:
            raise UsageError(
                f"the text is too small for a vocabulary of {vocab_size} ids: after {tokenizer.vocab_size} no pair of "
                f"tokens occurs twice; ask for bpe:{tokenizer.vocab_size} or less, or use more text"
            )
        return tokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], limit: int | None = None) -> Tokenizer:
        """Load the tokenizer of a model folder: ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``.

        Its settings are applied as transformers does (``token_settings.py``); ``limit`` is the number of the model's
        ids. Raises ``TokenizerError`` for files that are missing, damaged, inconsistent, or of another kind.
        """
        return cls(*read_vocabulary(folder, limit))

    def with_settings(self, folder: Path, limit: int | None = None) -> Tokenizer:
        """The same vocabulary with the settings of a folder that has none of its own."""
        settings = settings_of(Files.read(folder), self._vocab, None, limit)
        added = {token.text: token.id for token in settings.added}
        return self if settings == self.settings else Tokenizer(self.ranks, self.specials | added, settings)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the four files that transformers, mlx-lm and ``from_folder`` read. Creates the folder."""
        write_vocabulary(folder, self._vocab, merges_of(self.ranks), self.settings)

    @property
    def vocab_size(self) -> int:
        """V: one more than the highest id."""
        return max(*self.ranks.values(), *self.specials.values()) + 1

    @property
    def eot_id(self) -> int:
        """The id of the end token, such as ``<|endoftext|>``: the first of ``end_ids``. It separates documents."""
        return self.settings.ends[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which a generated text ends."""
        return self.settings.ends

    @property
    def start_id(self) -> int:
        """The id that begins an empty text; for GPT-2 that of ``<|endoftext|>``."""
        return self.settings.start

    @cached_property
    def hash(self) -> str:
        """The sha256, in hex, of its ``vocab.json`` (for GPT-2 that of OpenAI's file) and of settings unlike GPT-2's.

        Equal hashes mean equal ids of every text.
        """
        return hashlib.sha256((json.dumps(self._vocab) + self.settings.of_text).encode()).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False, is_start: bool = True) -> list[int]:
        """Encode a text. ``<|endoftext|>`` in it is plain text, or with ``allow_special`` the special token.

        The text continues another, so that no space is put before it, unless ``is_start``.
        """
        ids: list[int] = []
        for part in split_at_tokens(text, self.settings.added, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                space = (
                    " " if self.settings.add_prefix_space and (is_start or ids) and part[:1] not in ("", " ") else ""
                )
                with _panics_reported():
                    ids += chain(*map(self._encoding.encode_ordinary, _pieces(space + part)))
        return ids

    def encode_documents(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode documents with ``eot_id`` between them, for ``<|endoftext|>`` and the line ends after it."""
        first, *others = text.split(EOT)
        ids = self.encode(first, allow_special=allow_special)
        for document in others:
            ids += [self.eot_id, *self.opening, *self.encode(document.lstrip("\n"), allow_special=allow_special)]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encode documents with their special tokens, and add the tokens that the model expects around a prompt."""
        return self.as_prompt(self.encode_documents(text, allow_special=True))

    def as_prompt(self, ids: Iterable[int]) -> list[int]:
        """Add the tokens that the model expects around a text."""
        return [*self.settings.prefix, *ids, *self.settings.suffix]

    @property
    def opening(self) -> tuple[int, ...]:
        """The ids between ``eot_id`` and a document in training: those before a prompt, unless they are ``eot_id``."""
        return () if self.settings.prefix == (self.eot_id,) else self.settings.prefix

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] | None = None) -> list[list[int]]:
        """Encode each text like ``encode``, on all cores. ``starts`` are the ``is_start`` of each."""
        if self.settings.of_text:
            starts = [True] * len(texts) if starts is None else starts
            return [self.encode(text, is_start=start) for text, start in zip(texts, starts, strict=True)]
        pieces = [_pieces(text) for text in texts]
        with _panics_reported():
            ids = self._encoding.encode_ordinary_batch([*chain(*pieces)], num_threads=os.cpu_count() or 1)
        found = iter(ids)
        return [next(found) if len(part) == 1 else [*chain(*islice(found, len(part)))] for part in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD. Raises ``ValueError`` for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> Token:
        """Decode ids to bytes. Raises ``ValueError`` for an unknown id."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> Token:
        """Return the bytes of one id. Raises ``ValueError`` for an unknown id."""
        try:
            return self._tokens[token_id]
        except KeyError:
            raise ValueError(
                f"no token has id {token_id}: the vocabulary's ids are 0 to {self.vocab_size - 1}; "
                f"were these ids made with another tokenizer?"
            ) from None

    def stream(self) -> StreamDecoder:
        """Return a decoder for a stream of ids."""
        return StreamDecoder(self)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:8]})"

    @classmethod
    def _from_merges(cls, merges: Iterable[tuple[str, str]]) -> Tokenizer:
        tokens = [Token([b]) for b in BYTES] + [read_name(left + right) for left, right in merges]
        ranks = {token: i for i, token in enumerate(tokens)}
        assert len(ranks) == len(tokens), "two merges made the same token"
        return cls(ranks, {EOT: len(ranks)})

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding("mlx_gpt", pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens={})

    @cached_property
    def _tokens(self) -> dict[int, Token]:
        ordinary = {i: token for token, i in self.ranks.items()}
        return ordinary | {i: text.encode() for text, i in self.specials.items()}

    @cached_property
    def _vocab(self) -> dict[str, int]:
        names = {write_name(token): i for token, i in self.ranks.items()} | self.specials
        return dict(sorted(names.items(), key=lambda item: item[1]))


class StreamDecoder:
    """Decodes ids one at a time to whole characters. The joined results equal those of ``Tokenizer.decode``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes; "" inside a character of several tokens."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD for an incomplete character at the end, else "", and reset the decoder."""
        return self._utf8.decode(b"", final=True)


def make_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Create the tokenizer ``gpt2``, ``bytes``, or ``bpe:N`` with N ids learned from the beginning of ``texts``.

    Any other ``spec`` is a folder or a ``tokenizer.json`` to load, or a model of the hub. ``texts`` is read only for
    ``bpe:N``. Raises ``UsageError`` if there is no such tokenizer, ``TokenizerError`` if it cannot be read.
    """
    if spec == "gpt2":
        return Tokenizer.gpt2()
    if spec == "bytes":
        return Tokenizer.bytes()
    if made := MADE.fullmatch(spec):
        return Tokenizer.train(_beginning(texts, TRAINING_TEXT), int(made[1]))
    if spec and (path := expand_user(spec)).exists():
        return Tokenizer.from_folder(path)
    if HUB_ID.fullmatch(spec):
        try:
            return Tokenizer.from_folder(fetch(spec, [*TOKENIZER_FILES, "config.json", "generation_config.json"]))
        except HubError as error:
            raise UsageError(f"--tokenizer {spec}: no such file or folder here, and from the hub: {error}") from error
    raise UsageError(
        f"unknown tokenizer {spec!r}; choose gpt2, bytes, or bpe:N with N ids from 257 to {MOST_IDS:,}, such as "
        f"bpe:4096, or the folder or hub id of a model"
    )


def is_made(spec: str) -> bool:
    """Return True for a tokenizer that is named or learned, False for one to load from a file."""
    return bool(MADE.fullmatch(spec))


def _pieces(text: str, many: int = MANY_SPACES) -> list[str]:
    """Cut a text inside runs of ``many`` white spaces: before the last one, as ``SPLIT`` does."""
    runs = re.finditer(rf"(?<!{SPACE}){SPACE}{{{many},}}(?={NO_SPACE})", text) if len(text) > many else ()
    ends = [run.end() - 1 for run in runs]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


def _with_short_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in pieces that end inside each long word."""
    for text in texts:
        ends = [word.end() for word in LONG_WORD.finditer(text)]
        yield from (text[start:end] for start, end in pairwise([0, *ends, len(text)]))


@contextmanager
def _panics_reported() -> Iterator[None]:
    """Raise ``TokenizerError`` for a panic of tiktoken or tokenizers, which is no ``Exception``."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the text cannot be tokenized ({error}); cut it into smaller files") from error


def _beginning(texts: Iterable[str], length: int) -> Iterator[str]:
    """Yield the first ``length`` characters of some texts."""
    for text in texts:
        yield text[:length]
        length -= len(text)
        if length <= 0:
            return


def merge_bytes(word: Token, ranks: dict[Token, int], below: int) -> list[Token]:
    """Apply BPE as in the paper: merge the adjacent pair that was learned first, until no pair is in ``ranks``.

    Only merges with a rank below ``below`` are applied. With the merges he, ll, llo in ``ranks``,
    ``merge_bytes(b"hello", ranks, below=len(ranks))`` goes h e l l o -> he l l o -> he ll o -> he llo.
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
    """Recover the merges of a vocabulary, in order: the earlier merges reduce each token's bytes to its two halves."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = merge_bytes(token, ranks, below=rank)
            if len(halves) != 2:
                raise TokenizerError(
                    f"token {write_name(token)!r} (id {rank}) should be made of two earlier tokens, found "
                    f"{len(halves)}; this vocabulary cannot be saved as merges"
                )
            merges.append((halves[0], halves[1]))
    return merges
