"""Measure requests per second of sixteen concurrent clients and of one client that sends them in sequence.

    python tests/benchmarks/serving.py --n-layer 4 --n-embd 256

The model has random weights and is served on loopback. Runs alternate; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.server import Client, serving

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer


def requests_per_second(client: Client, n: int, n_clients: int, max_tokens: int) -> float:
    def ask(i: int) -> None:
        answer = client.complete(f"Once upon a time {i}", seed=i, max_tokens=max_tokens, logit_bias={"256": -100})
        assert answer.body["usage"]["completion_tokens"] == max_tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(n_clients) as pool:
        list(pool.map(ask, range(n)))
    return n / (time.perf_counter() - started)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--n-layer", type=int, default=4)
    flags.add_argument("--n-embd", type=int, default=256)
    flags.add_argument("--max-tokens", type=int, default=64)
    flags.add_argument("--requests", type=int, default=32)
    flags.add_argument("--runs", type=int, default=5)
    given = flags.parse_args()
    config = GPTConfig(
        vocab_size=257, n_positions=256, n_embd=given.n_embd, n_layer=given.n_layer, n_head=given.n_embd // 64
    )
    with tempfile.TemporaryDirectory() as temporary:
        save(GPT(config), Tokenizer.bytes(), Path(temporary) / "tiny")
        with serving(Path(temporary) / "tiny") as client:
            speeds: dict[int, list[float]] = {1: [], 16: []}
            for run in range(given.runs + 1):  # the first warms up
                for n_clients, found in speeds.items():
                    speed = requests_per_second(client, given.requests, n_clients, given.max_tokens)
                    found += [speed] if run else []
    one, many = (statistics.median(found) for found in speeds.values())
    print(
        f"{given.max_tokens} tokens each: {one:.1f} requests/s in sequence, {many:.1f} from sixteen clients:", end=" "
    )
    print(f"{many / one:.1f} times as many ({given.runs} runs, medians)")


if __name__ == "__main__":
    main()
