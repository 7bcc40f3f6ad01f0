"""LAMBADA (Paperno et al. 2016): predict the last word of a passage, which takes the whole passage to guess."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_gpt.check.datasets import rows, text_field
from mlx_gpt.check.scoring import OnScored, continuation, mean_and_error, perplexity_and_error, score
from mlx_gpt.check.task import Evaluation, Task
from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


def read_passages(file: Path) -> list[tuple[str, str]]:
    """Return the place (file and line) and text of each passage."""
    return [(where, text_field(row, "text", where)) for where, row in rows(file)]


def lambada(
    model: GPT, tokenizer: Tokenizer, passages: Sequence[tuple[str, str]], on_scored: OnScored | None = None
) -> Evaluation:
    """Measure accuracy and perplexity of the last word and of the last token, over (place, text) pairs.

    The word metrics are those of lm-evaluation-harness's ``lambada_openai``: a word is right if all its tokens are, and
    its probability is their product. The token metrics are those of the GPT-2 paper, table 3.
    """
    texts = [continuation(tokenizer, *split(text, where), model.config.n_positions, where) for where, text in passages]
    scores = score(model, texts, on_scored)
    metrics = {
        "acc": mean_and_error([float(one.is_greedy.all()) for one in scores]),
        "perplexity": perplexity_and_error([one.logprobs.sum() for one in scores]),
        "acc_last_token": mean_and_error([float(one.is_greedy[-1]) for one in scores]),
        "perplexity_last_token": perplexity_and_error([one.logprobs[-1] for one in scores]),
    }
    return Evaluation(metrics, len(passages))


def split(text: str, where: str) -> tuple[str, str]:
    """Split a passage into its context and its last word with the space before it."""
    context, _, word = text.rpartition(" ")
    if not word.strip():
        raise DataError(f"{where}: expected a passage that ends with a word, found {text[-20:]!r}")
    return context, f" {word}"


TASK = Task("EleutherAI/lambada_openai", "data/lambada_test_en.jsonl", read_passages, lambada)
