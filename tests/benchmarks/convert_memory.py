"""Measure the memory of a conversion: ``python tests/benchmarks/convert_memory.py gpt2-xl --dir FOLDER``.

Writes a model folder with random weights of a preset's shape into ``FOLDER``, converts it in new processes (which
inherit the memory of this one, so it stays small), and removes it. Reports the peak resident memory of each process,
mapped files included, next to the size of the weights: a conversion may take the weights once, plus one tensor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from mlx_gpt.config import PRESETS
from mlx_gpt.store.convert import hub_shapes
from mlx_gpt.store.model_config import config_json
from mlx_gpt.store.safetensors import write_safetensors
from mlx_gpt.text.tokenizer import Tokenizer

IMPORTS = "nothing but the imports"  # refused: there is nothing to convert
RUNS = {  # name -> arguments of mlx-gpt; later runs read the files of earlier ones
    IMPORTS: "convert nothing nowhere",
    "hub float32 -> float32": "convert hub a",
    "hub float32 -> float16": "convert hub b --dtype float16",
    "hub float32 -> 4 bits": "convert hub c --quantize 4",
    "hub float32 -> llm.c float32": "export hub d.bin --to llm.c",
    "llm.c float32 -> bfloat16": "convert d.bin e --dtype bfloat16",
}


def make_model(folder: Path, preset: str) -> None:
    """Write a model folder with random weights."""
    config = PRESETS[preset]
    weights = {name: 0.02 * mx.random.normal(shape) for name, shape in hub_shapes(config).items()}
    tokenizer = Tokenizer.bytes()
    tokenizer.save(folder)
    tokenizer.save(folder.parent)  # next to the llm.c file
    (folder / "config.json").write_text(config_json(config, tokenizer.end_ids, tokenizer.start_id, mx.float32))
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})


def peak(arguments: list[str], cwd: Path) -> tuple[int, float, float]:
    """Run mlx-gpt; return its exit code, its peak resident memory in MB, and its duration in seconds."""
    began = time.perf_counter()
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_gpt", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--dir", help="the folder to work in; needs five times the weights' size")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make, options.preset)
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        place = Path(name)
        subprocess.run([sys.executable, __file__, options.preset, "--make", place / "hub"], check=True)
        size = (place / "hub" / "model.safetensors").stat().st_size / 1e6
        shapes = hub_shapes(PRESETS[options.preset])
        largest = 4 * max(rows * (columns or [1])[0] for rows, *columns in shapes.values()) / 1e6
        print(f"{options.preset}: weights {size:,.0f} MB in float32, the largest tensor {largest:,.0f} MB", flush=True)
        for what, arguments in RUNS.items():
            code, resident, seconds = peak(arguments.split(), place)
            if code != (what == IMPORTS):
                sys.exit(f"{what}: mlx-gpt {arguments} ended with exit code {code}")
            print(f"{what:32} peak {resident:7,.0f} MB   {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
