"""The tokenizer of nanoGPT's character models: an id for each character of the text it was trained on, and no others.

nanoGPT keeps it as a pickle, ``meta.pkl``, of ``stoi`` and ``itos`` (its ``data/shakespeare_char/prepare.py``). In a
model folder it is a ``tokenizer.json`` without words and merges, which transformers and mlx-lm read.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_gpt.errors import TokenizerError
from mlx_gpt.files import read_small
from mlx_gpt.text.settings_files import CONFIG, FAST, LIMIT, read_object
from mlx_gpt.text.token_settings import TokenSettings
from mlx_gpt.text.tokenizer import Tokenizer

META = "meta.pkl"
SMALL = 2_000_000  # bytes of a tokenizer.json; 60 thousand characters take half of it
KIND = {"type": "BPE", "merges": []}  # of the model in tokenizer.json: the characters are not merged


class CharacterTokenizer(Tokenizer):
    """A tokenizer whose ids are those of characters. It has no end token, so that no model can be trained with it."""

    def __init__(self, ids: dict[str, int]):
        self.ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        start = self.ids.get("\n", 0)  # with which nanoGPT's sample.py begins
        super().__init__({c.encode(): i for c, i in self.ids.items()}, {}, TokenSettings((), {}, (), start))

    @property
    def vocab_size(self) -> int:
        """V: the number of characters."""
        return len(self.ids)

    @property
    def eot_id(self) -> int:
        """Raise ``TokenizerError``: there is none."""
        raise TokenizerError(
            "a model of nanoGPT's characters has no end token to put between documents; "
            "train a new model, with --tokenizer bytes for one of characters"
        )

    def encode(self, text: str, *, allow_special: bool = False, is_start: bool = True) -> list[int]:
        """Encode a text. Raises ``TokenizerError`` for a character that has no id."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            known = "".join(self.ids)
            raise TokenizerError(
                f"the model knows {len(self.ids)} characters, and {error.args[0]!r} is none of them: {known!r:.200}"
            ) from None

    def encode_batch(self, texts: Sequence[str], starts: Sequence[bool] | None = None) -> list[list[int]]:
        """Encode each text like ``encode``."""
        return [self.encode(text) for text in texts]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files that transformers, mlx-lm and ``read_characters`` read. Creates the folder."""
        model = {**KIND, "vocab": self.ids}
        # Without words and merges BPE gives each character its id; Fuse joins them again.
        fast = {"version": "1.0", "added_tokens": [], "model": model, "decoder": {"type": "Fuse"}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in ((FAST, fast), (CONFIG, config)):
            (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")


def read_characters(folder: Path) -> CharacterTokenizer | None:
    """Return the tokenizer that ``save`` wrote, None for another kind. Raises ``TokenizerError``."""
    file = folder / FAST
    if not file.exists() or file.stat().st_size > SMALL:
        return None
    fast = read_object(file)
    model: Any = fast.get("model")
    if not isinstance(model, dict) or any(fast.get(part) for part in ("pre_tokenizer", "normalizer", "added_tokens")):
        return None
    vocab: Any = model.get("vocab")
    is_ours = {name: model.get(name) for name in KIND} == KIND and fast.get("decoder") == {"type": "Fuse"}
    return CharacterTokenizer(vocab) if is_ours and _are_characters(vocab) else None


def read_meta(file: Path) -> CharacterTokenizer:
    """Return the tokenizer in a ``meta.pkl``, running no code in it. Raises ``TokenizerError``."""
    try:
        meta = _DataOnly(io.BytesIO(read_small(file, LIMIT))).load()
        ids = meta["stoi"]
    except Exception as error:  # a pickle can raise anything
        raise TokenizerError(
            f"{file}: expected nanoGPT's characters, a pickle of dicts, text and numbers, found something else "
            f"({type(error).__name__}: {error}); no code in it was run; copy it again"
        ) from error
    if not _are_characters(ids):
        raise TokenizerError(f"{file}: expected in stoi characters with the ids from 0 on, found others; copy it again")
    return CharacterTokenizer(ids)


class _DataOnly(pickle._Unpickler):  # in Python: the one in C takes the memory that a damaged file asks for
    """Reads dicts, lists, text and numbers, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"an object of {module}.{name}")


def _are_characters(ids: Any) -> bool:
    if not isinstance(ids, dict) or not ids or any(type(i) is not int for i in ids.values()):
        return False
    is_text = all(isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in ids)
    return is_text and sorted(ids.values()) == list(range(len(ids)))
