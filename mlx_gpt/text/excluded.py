"""What cannot come: beside each token of a story, those in whose place it stands that the rules of its world exclude.

A text says what came. Whoever knows its rules can also say what could not have: nobody goes where they are already, or
is their own friend. From text alone that is hard to learn, for to leave one word of twenty out is worth a twentieth
of a nat. ``train/loss.py`` says what a step makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_gpt.text.shards import TokenStream
from mlx_gpt.text.tinyworld import Told
from mlx_gpt.text.tokenizer import Tokenizer


def excluded_ids(stream: TokenStream, told: Sequence[Told], tokenizer: Tokenizer) -> np.ndarray:
    """Ids (N, K) that cannot stand in place of each of the N in the stream of these stories, -1 where they are fewer.

    Words of one token only: of others the first token may be another word's too.
    """
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    lengths[tokenizer.eot_id] = 0  # it is not in the text
    begins = np.concatenate([[0], lengths[stream.ids].cumsum()[:-1]])  # (N,) each token, in bytes of all stories
    words = sorted({word for one in told for _, words in one.excluded for word in words})
    ids = {word: tokens[0] for word in words if len(tokens := tokenizer.encode(f" {word}")) == 1}
    marks = [
        (story + at - 1, [ids[word] for word in words if word in ids])  # from the space before the word
        for story, one in zip(begins[stream.starts[:-1]], told, strict=True)
        for at, words in one.excluded
    ]
    excluded = np.full((len(stream.ids), max((len(those) for _, those in marks), default=1)), -1, np.int32)
    at_tokens = np.searchsorted(begins, [at for at, _ in marks], "right") - 1
    for token, (at, those) in zip(at_tokens, marks, strict=True):
        if begins[token] == at:
            excluded[token, : len(those)] = those
    return excluded
