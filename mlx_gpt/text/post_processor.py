"""The ids that the post-processor of a ``tokenizer.json`` puts around a text (tokenizers, ``processors``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_gpt.text.settings_files import damaged, refused

Around = tuple[tuple[int, ...], tuple[int, ...]]  # ids before and after a text


def ids_around(file: Path, processor: Any, known: set[int]) -> Around:
    """Return the ids that a post-processor puts before and after a text."""
    try:
        kind = processor["type"] if processor else "ByteLevel"
        if kind == "Sequence":
            around = [ids_around(file, part, known) for part in processor["processors"]]
            adding = [part for part in around if any(part)]
            if len(adding) > 1:
                raise refused(file, "post_processor", kind, "one that adds tokens")
            return adding[0] if adding else ((), ())
        if kind == "ByteLevel":
            return (), ()
        if kind in ("BertProcessing", "RobertaProcessing"):
            template: Around = (processor["cls"][1],), (processor["sep"][1],)
        elif kind == "TemplateProcessing":
            template = _template(processor)
        else:
            raise refused(file, "post_processor", kind, "ByteLevel, TemplateProcessing or RobertaProcessing")
        before, after = template
        if unknown := [i for i in before + after if i not in known]:
            raise refused(file, "post_processor", unknown[0], "ids of the vocabulary")
        return before, after
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise damaged(file, "a post_processor of the tokenizers library", f"{processor!r:.100}") from error


def _template(processor: dict[str, Any]) -> Around:
    """Return the ids before and after the one text of a template."""
    parts: list[tuple[int, ...]] = [()]
    for piece in processor["single"]:
        if "Sequence" in piece:
            parts.append(())
        else:
            parts[-1] += tuple(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    before, after = parts
    return before, after
