"""Attention heads: find one by its score, see its pattern, take it out; then the model without scale and without mask.

Run it:  python examples/04_heads.py  (offline, in seconds)
Read it beside mlx_gpt/lens/heads.py and ablation.py. The example before this one is 03_residual_stream.py, the next
is 05_gibberish.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 products, so that the numbers are those of the text

import re
from collections.abc import Mapping
from math import exp, sqrt
from pathlib import Path
from textwrap import fill
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_gpt import GPT, GPTConfig, load
from mlx_gpt.lens import Edit, attention_entropy, generate, head_scores, trace
from mlx_gpt.tinyworld.stories import generate_stories
from mlx_gpt.train.loss import mean_loss

model, tokenizer = load(Path(__file__).parent.parent / "weights/tinyworld")
n_layer, n_head, D = model.config.n_layer, model.config.n_head, model.config.head_dim
Edits = Mapping[str, Edit]  # name of an activation -> a function of it that returns what the model goes on with


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def plain(array: mx.array) -> Any:
    """Convert an MLX array to Python numbers."""
    return array.tolist()


def word(i: int) -> str:
    return tokenizer.decode([i])


title("1. Find heads by score: known kinds, on random tokens that are repeated once")

scores = head_scores(model, length=25)  # kind -> (n_layer, H), as in mlx-gpt lens --view heads
for kind, score in scores.items():
    best = plain(score.argmax())
    print(f"{kind:<16} best: L{best // n_head}H{best % n_head} with {plain(score.max()):.3f} of its attention")
print("A head of a kind gives most of its attention there; one that looks everywhere alike 0.07, 0.03,")
print("0.03. Stories that never repeat random words have taught this small model none of the three.")

title("2. Find a head by a question of our own: who notices that the story's object was introduced?")

# "Lily had a red kite." or "Somebody took a red kite to the park." comes once in a story, and then a friend comes. At
# the full stop the model must know that it has been. A score: the attention from there to " had" or " Somebody".
stories = [tokenizer.encode(story) for story in generate_stories(24, seed=99)]
INTRODUCE = {tokenizer.encode(text)[0] for text in (" had", " Somebody")}
STOP = tokenizer.encode(".")[0]
total = mx.zeros((n_layer, n_head))
for ids in stories:
    key = next(i for i, token in enumerate(ids) if token in INTRODUCE)
    query = ids.index(STOP, key)
    _, activations = trace(model, [ids[: query + 1]], names="blocks.*.attn.hook_pattern")
    total += mx.stack([pattern[0, :, query, key] for pattern in activations.values()])  # (n_layer, H)
score = total / len(stories)
best = plain(score.argmax())
LAYER, HEAD = best // n_head, best % n_head
NAME = f"L{LAYER}H{HEAD}"
for layer, row in enumerate(plain(score)):
    print(
        f"block {layer}  ",
        *(f"head {head} {value:4.0%} {'█' * round(20 * value):<20}" for head, value in enumerate(row)),
    )
print(f"{NAME} is that head: {plain(score.max()):.1%}, the mean of {len(stories)} stories.")

title(f"3. The pattern of {NAME}")

TEXT = "One sunny morning, Lily went to the garden. She was kind. Lily had a red kite."
ids = tokenizer.encode(TEXT + " Her brother Tom went to the mill.")
_, activations = trace(model, [ids], names=f"blocks.{LAYER}.attn.hook_pattern")
pattern = activations[f"blocks.{LAYER}.attn.hook_pattern"][0, HEAD]  # (T, T)
for i, row in zip(ids, plain(pattern), strict=True):
    line = "".join(2 * " ░▒▓█"[round(4 * weight)] for weight in row)
    top = max(range(len(row)), key=row.__getitem__)
    print(f"{word(i):>8} {line}│ {word(ids[top])} {row[top]:.0%}")
print("A row is a query, the columns are the same tokens, darker is more. From ' had' on, each token looks")
print("at ' had', until a friend comes: the head tells the rest of the model how far the story is.")

title(f"4. Take {NAME} out: the loss, and the text")

WINDOW = 64  # tokens
windows = mx.array([ids[: WINDOW + 1] for ids in stories if len(ids) > WINDOW][:12])


def loss(edits: Edits) -> float:
    logits, _ = trace(model, windows[:, :-1], edits, names=())
    return plain(mean_loss(logits, windows[:, 1:]))


def story(edits: Edits, cache: bool = True) -> str:
    """Return the most likely continuation of TEXT."""
    ids = generate(model, [tokenizer.encode(TEXT)], 36, edits=edits, cache=cache)
    return fill(f"… {tokenizer.decode(plain(ids[0]))} …", 96, initial_indent="    ", subsequent_indent="    ")


def second_objects(edits: Edits) -> int:
    """Count the stories of 16, drawn at temperature 0.7, that soon introduce a second object."""
    prompts = [tokenizer.encode(TEXT)] * 16
    texts = map(tokenizer.decode, plain(generate(model, prompts, 24, edits=edits, temperature=0.7, seed=0)))
    return sum(bool(re.search("had a |Somebody took a ", text)) for text in texts)


def report(name: str, edits: Edits, cache: bool = True) -> None:
    print(f"{name}: loss {loss(edits):.2f}\n{story(edits, cache)}")


def without_head(z: mx.array, name: str) -> mx.array:
    z[:, :, HEAD] = 0  # what the head collected: (B, T, H, D)
    return z


ABLATED: Edits = {f"blocks.{LAYER}.attn.hook_z": without_head}
print(TEXT)
report("The model as it is", {})
report(f"Without {NAME}", ABLATED)
with_head, without = second_objects({}), second_objects(ABLATED)
print(f"Stories that introduce a second object: {with_head} of 16, without {NAME} {without} of 16.")

title("5. Take the scale 1/√D out of all heads: softmax saturates")


def unscaled(scores: mx.array, name: str) -> mx.array:
    return scores * sqrt(D)


UNSCALED: Edits = {"blocks.*.attn.hook_attn_scores": unscaled}
for name, edits in (("with 1/√D", {}), ("without", UNSCALED)):
    _, activations = trace(model, windows, edits, names="blocks.*.attn.hook_pattern")
    entropy = plain(attention_entropy(activations).mean())
    print(
        f"{name:>10}: entropy of a query's attention {entropy:.2f}, that of {exp(entropy):.1f} keys with equal weights"
    )
report("Without the scale", UNSCALED)

title("6. Take the causal mask out: a lower loss, and gibberish")

kept: dict[str, mx.array] = {}


def keep(x: mx.array, name: str) -> mx.array:
    kept[name[-1]] = x  # of hook_q and hook_k: (B, T, H, D)
    return x


def unmasked(scores: mx.array, name: str) -> mx.array:
    """Return the scores without -inf for the keys of the future."""
    q, k = (kept[letter].swapaxes(1, 2) for letter in "qk")
    return q @ k.swapaxes(-1, -2) / sqrt(q.shape[-1])


ATTENTION = "blocks.*.attn.hook_"
UNMASKED: Edits = {f"{ATTENTION}q": keep, f"{ATTENTION}k": keep, f"{ATTENTION}attn_scores": unmasked}
report("Trained with the mask, used without", UNMASKED, cache=False)
print("The last token sees no more than before, so the text is not the worst of it.\n")

# A model that is trained without the mask sees the token that it should predict, and learns to copy it. When it writes,
# there is nothing to copy. Two tiny models, one layer of one head, learn to predict the next character:
text = " ".join(generate_stories(100, seed=1))
characters = sorted(set(text))
data = mx.array([characters.index(c) for c in text])
SIZES = GPTConfig(vocab_size=len(characters), n_positions=8, n_embd=32, n_layer=1, n_head=1, initializer_range=0.5)


def trained(edits: Edits, steps: int = 150) -> tuple[list[float], str]:
    """Return the losses of a training run, and what the model then writes."""
    mx.random.seed(2)
    tiny, T = GPT(SIZES), SIZES.n_positions
    optimizer = optim.Adam(0.007)
    loss_and_gradient = nn.value_and_grad(tiny, lambda x, y: mean_loss(trace(tiny, x, edits, names=())[0], y))
    losses = []
    for _ in range(steps + 1):
        rows = data[mx.random.randint(0, len(data) - T, (32, 1)) + mx.arange(T + 1)]  # (B, T + 1)
        value, gradient = loss_and_gradient(rows[:, :-1], rows[:, 1:])
        optimizer.update(tiny, gradient)
        mx.eval(tiny.parameters(), optimizer.state)
        losses.append(plain(value))
    ids = plain(data[:4])
    for _ in range(28):
        logits, _ = trace(tiny, [ids[-T:]], edits, names=())
        ids.append(plain(mx.random.categorical(logits[0, -1] / 0.7)))
    return losses, "".join(characters[i] for i in ids)


for name, edits in (("with the mask", {}), ("without", UNMASKED)):
    losses, written = trained(edits)
    print(f"Trained {name:<13} loss", " -> ".join(f"{losses[i]:.2f}" for i in (0, 50, 100, 150)), f" {written!r}")
print("It says gibberish, and its loss is the lower one: it has learned to look at the answer.")
print("Would you have noticed? Next: examples/05_gibberish.py")
