"""What weights/tinyworld loses without each of its heads: loss, valid stories, an object introduced twice.

    python tests/benchmarks/bundled_head.py [--stories 200]

The loss is that of validation stories, in nats per token. Stories are generated at temperature 0.7 from an empty prompt
(valid) and from one sentence (object introduced twice, friend introduced).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import mlx_gpt  # isort: skip  # before MLX: it links OpenBLAS on Linux
import mlx.core as mx

from mlx_gpt.lens import generate, trace
from mlx_gpt.lens.components import without
from mlx_gpt.tinyworld.stories import generate_stories, parse_story
from mlx_gpt.train.loss import next_token_losses

PROMPT = "One sunny morning, Lily went to the garden."
OBJECT = re.compile(r"\b(?:had a|Somebody took a) ")
FRIEND = re.compile(r"\. (?:Her|His) (?:sister|brother|friend|cousin|neighbour) ")
MODEL, TOKENIZER = mlx_gpt.load(Path(__file__).parents[2] / "weights/tinyworld")


def loss(parts: list[str], stories: list[str]) -> float:
    """Return the mean loss of the tokens of stories, computed in one padded batch for each 50."""
    total, count = 0.0, 0
    for start in range(0, len(stories), 50):
        rows = [TOKENIZER.encode(story)[: MODEL.config.n_positions] for story in stories[start : start + 50]]
        longest = max(map(len, rows))
        ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
        logits, _ = trace(MODEL, ids, without(MODEL, parts), ())
        is_text = mx.arange(1, longest) < mx.array([[len(row)] for row in rows])
        total += (next_token_losses(logits[:, :-1], ids[:, 1:]) * is_text).sum().item()
        count += is_text.sum().item()
    return total / count


def write(parts: list[str], prompt: str, n: int) -> list[str]:
    """Generate n stories."""
    start = TOKENIZER.encode(prompt) or [TOKENIZER.start_id]
    new = generate(
        MODEL,
        [start] * n,
        MODEL.config.n_positions,
        edits=without(MODEL, parts),
        temperature=0.7,
        seed=1,
        end_id=TOKENIZER.eot_id,
    )
    return [prompt + TOKENIZER.decode(row).partition("<|endoftext|>")[0] for row in new.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=200)
    n = parser.parse_args().stories
    heads = [f"L{layer}H{head}" for layer in range(MODEL.config.n_layer) for head in range(MODEL.config.n_head)]
    stories = generate_stories(n, seed=1)
    print(f"{'without':8} {'loss':>6} {'valid':>6} {'object twice':>13} {'friend':>7}   of {n} stories")
    for parts in [[], *([head] for head in heads)]:
        valid = sum(parse_story(text).valid for text in write(parts, "", n))
        told = write(parts, PROMPT, n)
        twice = sum(len(OBJECT.findall(text)) > 1 for text in told)
        friend = sum(bool(FRIEND.search(text)) for text in told)
        print(f"{''.join(parts):8} {loss(parts, stories):6.3f} {valid:6} {twice:13} {friend:7}", flush=True)


if __name__ == "__main__":
    main()
