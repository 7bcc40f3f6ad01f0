"""Measure ``load`` of GPT-2 124M: the time to the first logits beyond the forward pass, and the memory.

    python tests/benchmarks/load_time.py [TOKENIZER]

Writes a model folder of that shape with random weights (with the tokenizer of a folder TOKENIZER, such as a downloaded
gpt2, whose 50,257 tokens take some time to read; else with bytes), and times, in new processes, ``load`` and the first
logits of eight tokens, against the same forward pass afterwards. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
TIMES = 5

MEASURE = """
import json, os, resource, sys, time
started = time.perf_counter()
from mlx_gpt import load
import mlx.core as mx
imported = time.perf_counter()
mx.reset_peak_memory()
model, tokenizer = load(sys.argv[1])
loaded = time.perf_counter()
ids = [list(range(8))]
mx.eval(model(ids))
first = time.perf_counter()
peak = mx.get_peak_memory()
passes = []
for _ in range(5):
    begin = time.perf_counter()
    mx.eval(model(ids))
    passes.append(time.perf_counter() - begin)
print(json.dumps({
    "import": imported - started,
    "load": loaded - imported,
    "first logits": first - loaded,
    "forward": sorted(passes)[2],
    "peak": peak,
    "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
}))
"""


def make(folder: Path, tokenizer_folder: str | None) -> int:
    """Write a folder in the hub's layout; return the size of its weights in bytes."""
    sys.path.insert(0, str(ROOT))
    import mlx.core as mx

    from mlx_gpt import GPT, GPTConfig, save
    from mlx_gpt.text.tokenizer import Tokenizer

    mx.random.seed(0)
    tokenizer = Tokenizer.from_folder(tokenizer_folder) if tokenizer_folder else Tokenizer.bytes()
    model = GPT(GPTConfig())
    save(model, tokenizer, folder)
    return model.n_parameters * 4


def measured(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", metavar="TOKENIZER", help="a folder with a tokenizer")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "gpt2"
        size = make(folder, flags.tokenizer)
        begin = time.perf_counter()
        for file in folder.iterdir():
            file.read_bytes()
        print(f"reading the files alone: {time.perf_counter() - begin:.2f} s")
        runs = [measured(folder) for _ in range(TIMES)]
    for what in runs[0]:
        values = sorted(run[what] for run in runs)
        if what in ("peak", "resident"):
            print(f"{what:14} {values[0] / size:.2f} to {values[-1] / size:.2f} times the weights' {size / 1e6:.0f} MB")
        else:
            print(f"{what:14} {median(values):.3f} s ({values[0]:.3f} to {values[-1]:.3f})")
    beyond = [run["load"] + run["first logits"] - run["forward"] for run in runs]
    span = f"({min(beyond):.3f} to {max(beyond):.3f})"
    print(f"load and first logits, beyond the forward pass: {median(beyond):.3f} s {span}")


if __name__ == "__main__":
    main()
