"""The files of a model folder that hold token settings, read and checked for their kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mlx_gpt.errors import TokenizerError
from mlx_gpt.files import parse_json, read_small

LIMIT = 20_000_000  # bytes; GPT-2's tokenizer.json has 1.4 million
CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL, GENERATION, FAST = "config.json", "generation_config.json", "tokenizer.json"
GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
CLASSES = (*GPT2, "PreTrainedTokenizerFast", "TokenizersBackend")  # the last two take tokenizer.json as it is
REFUSED = (  # settings that would give other ids or other text
    "auto_map",  # code of the repository
    "fast_tokenizer_files",  # another tokenizer.json for each version of transformers
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)


class Files(NamedTuple):
    """The settings files of a folder, as objects; {} for one that is missing."""

    folder: Path
    config: dict[str, Any]
    specials: dict[str, Any]
    added: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any]) -> Files:
        """The files of a folder that has only ``tokenizer_config.json``."""
        return cls(folder, config, {}, {}, {}, {})

    @classmethod
    def read(cls, folder: Path | None) -> Files:
        """Read the files of a folder; None is that of a ``tokenizer.json`` alone."""
        if folder is None:
            return cls.of(Path(), {})
        files = (folder / name for name in (CONFIG, SPECIALS, ADDED, MODEL, GENERATION))
        return cls(folder, *(read_object(file) if file.exists() else {} for file in files))

    @property
    def class_name(self) -> Any:
        """The class that transformers takes, None if no file names one."""
        return self.config.get("tokenizer_class") or self.model.get("tokenizer_class")

    def check_class(self) -> None:
        """Raise ``TokenizerError`` for a class of another kind than GPT-2's, and for code of a repository."""
        if self.class_name not in (None, *CLASSES):
            file = CONFIG if self.config.get("tokenizer_class") else MODEL
            raise refused(self.folder / file, "tokenizer_class", self.class_name, f"one of {', '.join(CLASSES)}")
        for key in REFUSED:
            if self.config.get(key):
                raise refused(self.folder / CONFIG, key, self.config[key], "no such setting")

    @property
    def is_rebuilt(self) -> bool:
        """True if transformers takes only vocabulary, added tokens and post-processor of ``tokenizer.json``."""
        if self.class_name is None:
            return bool(self.config or self.model)
        return self.class_name in GPT2


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ``TokenizerError``."""
    try:
        value = parse_json(read_text(file))
    except json.JSONDecodeError as error:
        raise damaged(file, "JSON", f"{error.msg} in line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise damaged(file, "JSON", f"invalid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(file, "a JSON object", type(value).__name__)
    return value


def read_text(file: Path) -> str:
    """Return the text of a file, line ends as ``\\n``. Raises ``TokenizerError``."""
    try:
        return read_small(file, LIMIT).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise damaged(file, "UTF-8 text", f"the byte {error.object[error.start]:#04x} at {error.start}") from error
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from error


def is_text(name: Any) -> bool:
    """Return True for a non-empty name that UTF-8 can encode: JSON may contain lone surrogates."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def damaged(file: Path | str, expected: str, found: str) -> TokenizerError:
    return TokenizerError(f"{file}: expected {expected}, found {found}; download the file again")


def refused(file: Path, key: str, found: Any, expected: str) -> TokenizerError:
    return TokenizerError(
        f"{file}: {key}: expected {expected}, found {json.dumps(found)[:100]}; this folder belongs to another kind of "
        f"model, or correct the file"
    )
