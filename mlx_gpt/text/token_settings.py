"""The token settings of a model folder, as transformers 5 applies them to GPT-2.

``weights/README.md``, "Token settings", lists the files and keys. A setting that would give other ids than
transformers' is refused by name. The order in which tokens are added, and so their ids, is that of transformers
(``tokenization_utils_base.py``, ``_from_pretrained``; ``tokenization_utils_tokenizers.py``, ``__init__``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_gpt.errors import TokenizerError
from mlx_gpt.text.added_tokens import FLAGS, AddedToken
from mlx_gpt.text.post_processor import Around, ids_around
from mlx_gpt.text.settings_files import (
    ADDED,
    CONFIG,
    FAST,
    GENERATION,
    MODEL,
    SPECIALS,
    Files,
    damaged,
    is_text,
    refused,
)

EOT = "<|endoftext|>"
OTHER_ENDS = ("</s>", "<|end|>", "<eos>", "[EOS]", "<|im_end|>")  # looked for where no file names an end token

NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA = ("extra_special_tokens", "additional_special_tokens")
DEFAULTS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)  # of transformers' GPT2Tokenizer


@dataclass(frozen=True)
class TokenSettings:
    """Added tokens by id, the text of each named token, the ids at which a text ends, the best first, and more.

    ``start`` begins an empty text. ``prefix`` and ``suffix`` are put around a prompt; ``add_prefix_space`` puts a space
    before a text that begins without one.
    """

    added: tuple[AddedToken, ...]
    named: Mapping[str, str | None]
    ends: tuple[int, ...]
    start: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    add_prefix_space: bool = False

    @classmethod
    def of(cls, specials: Mapping[str, int]) -> TokenSettings:
        """The settings of special tokens of which ``<|endoftext|>`` is the end token."""
        added = sorted((AddedToken(text, i) for text, i in specials.items()), key=lambda token: token.id)
        return cls(tuple(added), DEFAULTS, (specials[EOT],), specials[EOT])

    @property
    def of_text(self) -> str:
        """What changes the ids of a text beside its vocabulary, as JSON; "" for GPT-2's settings."""
        always = [asdict(token) for token in self.added if not token.special]
        return json.dumps([self.add_prefix_space, always]) if self.add_prefix_space or always else ""


def settings_of(
    files: Files, vocab: Mapping[str, int], fast: Mapping[str, Any] | None, limit: int | None = None
) -> TokenSettings:
    """Return the settings of a folder with this vocabulary and, if it has one, this ``tokenizer.json``.

    A token that a file names but that has no id follows the vocabulary, as in transformers, unless the ``limit`` of
    ids, those of the model, leaves no room. Raises ``TokenizerError``.
    """
    files.check_class()
    is_rebuilt = fast is None or files.is_rebuilt
    named = _named(files, DEFAULTS if is_rebuilt else {})
    added = _added(files, vocab, fast, named, is_rebuilt, limit)
    ids = {**vocab, **{token.text: token.id for token in added}}
    texts = {name: token["content"] if token else None for name, token in named.items()}
    ends, start = _ends_and_start(files, ids, texts)
    prefix, suffix = _around(files, fast, ids, texts)
    settings = TokenSettings(tuple(added), texts, ends, start, prefix, suffix)
    if is_rebuilt or fast is None:
        return replace(settings, add_prefix_space=_boolean(files, "add_prefix_space"))
    return replace(settings, add_prefix_space=bool((fast.get("pre_tokenizer") or {}).get("add_prefix_space", True)))


# Parts ----------------------------------------------------------------------------------------------------------------


def _named(files: Files, defaults: Mapping[str, str]) -> dict[str, dict[str, Any] | None]:
    """Return each named token: its text as ``content``, and flags."""
    found = {**defaults, **files.config}
    file = CONFIG
    if "added_tokens_decoder" not in files.config and files.specials:
        found, file = found | files.specials, SPECIALS
    own = [name for name, value in found.items() if name.endswith("_token") and isinstance(value, (str, dict))]
    names = [*(name for name in NAMES if name in found), *(name for name in own if name not in NAMES)]
    return {name: _token(files.folder / file, name, found[name]) if found[name] else None for name in names}


def _extra(files: Files) -> Iterable[tuple[str, Any]]:
    """Yield the special tokens without a name of their own, and the key they are under."""
    for content in (files.config, {} if "added_tokens_decoder" in files.config else files.specials):
        for key in EXTRA:
            if value := content.get(key):
                tokens = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [None]
                yield from ((key, token) for token in tokens)
                return


def _token(file: Path, key: str, value: Any) -> dict[str, Any]:
    """Return a token, given as text or as an object, as ``AddedToken`` of the tokenizers library reads it."""
    token = {"content": value, "special": True} if isinstance(value, str) else value
    if not isinstance(token, dict) or not is_text(token.get("content")):
        raise refused(file, key, value, "the text of a token")
    flags = {flag: token[flag] for flag in FLAGS if flag in token}
    if any(not isinstance(flag, bool) for flag in flags.values()):
        raise refused(file, key, value, f"true or false for {', '.join(FLAGS)}")
    return {"content": token["content"], "normalized": not flags.get("special", False), **flags}


def _stated(files: Files, fast: Mapping[str, Any] | None, specials: set[str]) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Return the tokens for which a file states an id, and that file."""
    folder = files.folder
    if "added_tokens_decoder" in files.config:
        decoder = files.config["added_tokens_decoder"]
        items = decoder.items() if isinstance(decoder, dict) else [("", decoder)]
        return _by_id(folder / CONFIG, ((int(i) if re.fullmatch("[0-9]{1,9}", i) else i, token) for i, token in items))
    legacy = ((i, {"content": text, "special": text in specials}) for text, i in files.added.items())
    return _by_id(folder / ADDED, legacy) | _fast_added(folder, fast)


def _fast_added(folder: Path, fast: Mapping[str, Any] | None) -> dict[int, tuple[Path, dict[str, Any]]]:
    tokens = (fast or {}).get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) and "id" in token for token in tokens):
        raise damaged(folder / FAST, "added_tokens with an id each", f"{tokens!r:.60}")
    return _by_id(folder / FAST, ((token["id"], token) for token in tokens))


def _by_id(file: Path, tokens: Iterable[tuple[Any, Any]]) -> dict[int, tuple[Path, dict[str, Any]]]:
    found = {}
    for key, token in tokens:
        if type(key) is not int or not 0 <= key < 2**31:
            raise damaged(file, "whole numbers as ids", f"{token!r:.60} with id {key!r:.20}")
        found[key] = file, _token(file, "an added token", token)
    return found


def _added(
    files: Files,
    vocab: Mapping[str, int],
    fast: Mapping[str, Any] | None,
    named: dict[str, dict[str, Any] | None],
    is_rebuilt: bool,
    limit: int | None,
) -> list[AddedToken]:
    """Return the added tokens by id. Raises ``TokenizerError`` for one that transformers gives another id than stated.

    A token of the vocabulary has its id there, any other the next after the vocabulary.
    """
    extra = [_token(files.folder / CONFIG, key, value) for key, value in _extra(files)]
    specials = {token["content"] for token in (*named.values(), *extra) if token}
    stated = _stated(files, fast, specials)
    tokens: list[tuple[int | None, Path, dict[str, Any]]] = []
    for known in ({} if is_rebuilt else _fast_added(files.folder, fast), stated):
        tokens += [(i, file, token) for i, (file, token) in sorted(known.items())]
    seen = {token["content"] for _, _, token in tokens}
    tokens += [(None, Path(), token) for token in (*named.values(), *extra) if token and token["content"] not in seen]
    added: dict[str, AddedToken] = {}
    for i, file, token in tokens:
        text = token["content"]
        after = max([len(vocab) - 1, *(old.id for old in added.values() if old.id >= len(vocab))]) + 1
        found = vocab.get(text, added[text].id if text in added else after)
        if i is not None and i != found:
            raise TokenizerError(
                f"{file}: the token {text!r} has id {i}, but in transformers it has {found}, the next after the "
                f"vocabulary; correct the id, or add the tokens that lie between"
            )
        if i is None and limit is not None and found >= limit:
            continue
        is_named = any(name and name["content"] == text for name in named.values())
        flags = {flag: bool(token.get(flag)) for flag in FLAGS} | ({"special": True} if is_named else {})
        added[text] = AddedToken(text, found, **flags)
    return sorted(added.values(), key=lambda token: token.id)


def _ends_and_start(
    files: Files, ids: Mapping[str, int], named: Mapping[str, str | None]
) -> tuple[tuple[int, ...], int]:
    """Return the ids at which a text ends, and that which begins an empty text.

    The ends are those of ``generation_config.json``, which replaces all others, as in transformers; or else those of
    ``config.json`` and the tokenizer's. Ids without a token are left out.
    """
    known = set(ids.values())
    contents = {GENERATION: files.generation, MODEL: files.model}
    generation, model = (
        [i for i in _ids(files.folder / file, "eos_token_id", content) if i in known]
        for file, content in contents.items()
    )
    own = [ids[end] for end in (named.get("eos_token"),) if end and end in ids]
    ends = generation or [*model, *(i for i in own if i not in model)]
    ends = ends or [ids[end] for end in (EOT, *OTHER_ENDS) if end in ids][:1]
    if not ends:
        raise TokenizerError(
            f"{files.folder}: expected an end token, found none; name it in {CONFIG}, as with "
            f'"eos_token": "</s>", and give it an id in the vocabulary'
        )
    if own and own[0] in ends:
        ends = [own[0], *(i for i in ends if i != own[0])]
    starts = [i for file, content in contents.items() for i in _ids(files.folder / file, "bos_token_id", content)]
    starts += [ids[name] for name in (named.get("bos_token"),) if name and name in ids]
    return tuple(ends), next((i for i in starts if i in known), ends[0])


def _ids(file: Path, key: str, content: Mapping[str, Any]) -> list[int]:
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise refused(file, key, value, "an id or a list of ids")
    return ids


def _around(
    files: Files, fast: Mapping[str, Any] | None, ids: Mapping[str, int], named: Mapping[str, str | None]
) -> Around:
    """Return the ids that are put before and after a prompt.

    They are those of the post-processor of ``tokenizer.json``. Without that file, ``add_bos_token`` and
    ``add_eos_token`` count.
    """
    if fast is not None:
        return ids_around(files.folder / FAST, fast.get("post_processor"), set(ids.values()))
    tokens = [named.get(name) if _boolean(files, f"add_{name}") else None for name in ("bos_token", "eos_token")]
    bos, eos = ((ids[token],) if token and token in ids else () for token in tokens)
    return bos, eos


def _boolean(files: Files, key: str) -> bool:
    value = files.config.get(key)
    if not isinstance(value, (bool, type(None))):
        raise refused(files.folder / CONFIG, key, value, "true or false")
    return bool(value)
