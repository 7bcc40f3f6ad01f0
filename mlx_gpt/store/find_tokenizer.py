"""Find the tokenizer that a flag names: that of a model in any layout, or of a folder without a model."""

from __future__ import annotations

from mlx_gpt.files import expand_user
from mlx_gpt.store.folder import tokenizer_of
from mlx_gpt.store.layouts import find_source
from mlx_gpt.text.characters import read_characters
from mlx_gpt.text.tokenizer import Tokenizer, is_made, make_tokenizer
from mlx_gpt.text.vocab_files import has_vocabulary


def find_tokenizer(spec: str) -> Tokenizer | str:
    """Return the tokenizer for training text; ``spec`` itself if it is to be made (``is_made``).

    Raises ``UsageError`` if there is none, ``TokenizerError`` if it has no end token or cannot be read, and
    ``ModelFolderError`` for what is no model either.
    """
    path = expand_user(spec)
    if is_made(spec):
        return spec
    tokenizer: Tokenizer
    if spec and path.exists() and (characters := read_characters(path if path.is_dir() else path.parent)):
        tokenizer = characters
    elif not spec or not path.exists() or path.suffix in (".json", ".txt", ".bpe"):
        tokenizer = make_tokenizer(spec, [])
    elif path.is_dir() and has_vocabulary(path):
        tokenizer = Tokenizer.from_folder(path)
    else:
        tokenizer = tokenizer_of(find_source(spec))
    _ = tokenizer.eot_id  # raises for characters
    return tokenizer
