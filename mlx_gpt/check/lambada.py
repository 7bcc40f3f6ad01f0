"""LAMBADA (Paperno et al. 2016): predict the last word of a passage, which takes the whole passage to guess."""

from __future__ import annotations

from pathlib import Path

from mlx_gpt.check.scoring import OnScored, continuation, mean_and_error, perplexity_and_error, score
from mlx_gpt.check.task import Evaluation, Task, read_rows, text_field
from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


def lambada(model: GPT, tokenizer: Tokenizer, data: Path, on_scored: OnScored | None = None) -> Evaluation:
    """Measure accuracy and perplexity of the last word and of the last token.

    The word metrics are those of lm-evaluation-harness's ``lambada_openai``: a word is right if all its tokens are, and
    its probability is their product. The token metrics are those of the GPT-2 paper, table 3.
    """
    passages = [(where, text_field(row, "text", where)) for where, row in read_rows(data)]
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


TASK = Task("EleutherAI/lambada_openai", "data/lambada_test_en.jsonl", lambada)
