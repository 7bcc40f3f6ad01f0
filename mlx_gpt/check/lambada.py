"""LAMBADA (Paperno et al. 2016): can the model guess the last word, for which one must have read the whole passage?"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_gpt.check.perplexity import Figures
from mlx_gpt.check.scoring import Progress, continuation, mean_and_error, perplexity_and_error, score
from mlx_gpt.errors import DataError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer


def lambada(
    model: GPT, tokenizer: Tokenizer, passages: Sequence[tuple[str, str]], progress: Progress | None = None
) -> Figures:
    """Accuracy and perplexity of passages (where they stand, text): of the last word, and of the last token.

    The word, all its tokens right and their probabilities multiplied, is lm-evaluation-harness's ``lambada_openai``;
    the token is what the GPT-2 paper's figures are of.
    """
    texts = [continuation(tokenizer, *split(text, where), model.config.n_positions, where) for where, text in passages]
    scores = score(model, texts, progress)
    return {
        "acc": mean_and_error([float(one.is_greedy.all()) for one in scores]),
        "perplexity": perplexity_and_error([one.log_probs.sum() for one in scores]),
        "acc_last_token": mean_and_error([float(one.is_greedy[-1]) for one in scores]),
        "perplexity_last_token": perplexity_and_error([one.log_probs[-1] for one in scores]),
    }


def split(text: str, where: str) -> tuple[str, str]:
    """The passage without its last word, and the last word with the space before it."""
    context, _, word = text.rpartition(" ")
    if not word.strip():
        raise DataError(f"{where}: expected a passage that ends with a word, found {text[-20:]!r}")
    return context, f" {word}"
