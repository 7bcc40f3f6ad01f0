"""Count the kernels that Metal launches for a decoded token and for a training step, beside mlx-lm's GPT-2.

    python tests/benchmarks/kernels.py [--n-layer 12]

Needs the parity extra, and no Mac: the counts are read from MLX's graphs (``tests/helpers/graph.py``), with MLX
answering as on Metal.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from helpers.as_metal import answer_as_metal, fused_inference

import mlx_gpt  # noqa: F401
from mlx_gpt.bench.graph import kernels, launches
from mlx_gpt.bench.measure import model_folder
from mlx_gpt.bench.sides import mlx_lm_model, mlx_lm_step
from mlx_gpt.config import GPTConfig
from mlx_gpt.generate.generation import Generation
from mlx_gpt.generate.history import History
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.optimizer import make_optimizer
from mlx_gpt.train.step import make_train_step


def our_token(config: GPTConfig) -> Any:
    """Return the arrays of a greedy step after a prompt, not computed."""
    run = Generation(GPT(config), Tokenizer.bytes(), [[65] * 20], GenerationSettings(temperature=0))
    mx.eval(run.read_prompt(), run.decoder.state(), run.decoder.model.parameters())
    with fused_inference():
        ids, _ = run._next(History(run.prompts, run.limits), mx.array([66]))
        return ids, run.decoder.state()


def their_token(config: GPTConfig) -> Any:
    from mlx_lm.models.cache import KVCache

    with model_folder(config) as folder:
        model = mlx_lm_model(folder)
    cache = [KVCache() for _ in range(config.n_layer)]
    mx.eval(model.parameters(), model(mx.array([[65] * 20]), cache), [part.state for part in cache])
    with fused_inference():  # as mlx_lm.generate.generate_step
        logits = model(mx.array([[66]]), cache)[:, -1]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return mx.argmax(logprobs, axis=-1), [part.keys for part in cache], [part.values for part in cache]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--names", action="store_true", help="print how many of each operation")
    flags = parser.parse_args()
    answer_as_metal()
    config = GPTConfig(vocab_size=257, n_positions=256, n_embd=128, n_layer=flags.n_layer, n_head=2)
    ids = mx.zeros((2, 256), mx.int32)
    training = TrainConfig(batch_size=2)
    ours, our_state = make_train_step(GPT(config), make_optimizer(training, config.n_head), training)
    with model_folder(config) as folder:
        theirs, their_state = mlx_lm_step(mlx_lm_model(folder))
    for what, both in {
        "a decoded token": (our_token(config), their_token(config)),
        "a training step": ((ours(ids, ids), our_state), (theirs(ids, ids), their_state)),
    }.items():
        print(f"{what}, {flags.n_layer} layers: {launches(both[0])} kernels, mlx-lm {launches(both[1])}")
        for outputs in both if flags.names else ():
            print(" ", dict(Counter(kernel.name[:60] for kernel in kernels(outputs)).most_common()))


if __name__ == "__main__":
    main()
