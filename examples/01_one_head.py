"""One attention head, step by step: how "tree" comes to know that it is ancient and an oak.

Run it:  python examples/01_one_head.py  (offline, in a second)
Read it from top to bottom beside mlx_gpt/model/attention.py. What follows is 02_many_heads_one_block.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # whole float32 products, so that four ways can agree to 1e-5

from math import cos, exp, pi, sin, sqrt
from typing import Any

import mlx.core as mx

from mlx_gpt.model.attention import (
    AttentionHead,
    attention_pattern,
    attention_scores,
    causal_mask,
    weighted_values,
)

mx.random.seed(5)


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def plain(array: mx.array) -> Any:
    """MLX's numbers as Python's own."""
    return array.tolist()


def numbers(row: mx.array) -> str:
    return " ".join(f"{round(value, 1) + 0.0:5.1f}" for value in plain(row))  # + 0.0 turns -0.0 into 0.0


def table(rows: dict[str, list[str]]) -> None:
    """A named row below another, with a column for each word."""
    widths = [max(len(word), 5) for word in WORDS]
    for name, cells in {"": WORDS, **rows}.items():
        print(f"{name:>8}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def decimals(row: mx.array, digits: int = 1) -> list[str]:
    return [f"{value:.{digits}f}" for value in plain(row)]


def shaded(weight: float) -> str:
    """A weight as a shade and in percent; a dot where it is exactly zero."""
    return f"{' ░▒▓█'[round(4 * weight)] * 2}{100 * weight:3.0f}" if weight else "·"


title("1. Words become tokens, tokens become numbers")

# GPT-2's tokenizer cuts the sentence just so, with these ids; the space belongs to the word that follows it.
WORDS = ["The", "ancient", "oak", "tree", "provided", "cool", "shade", "on", "the", "hot", "summer", "day", "."]
IDS = [464, 6156, 26210, 5509, 2810, 3608, 17979, 319, 262, 3024, 3931, 1110, 13]
table({"id": [str(i) for i in IDS]})

T, C, D = len(WORDS), 16, 8  # tokens, width of the stream of numbers, width of the head
ANCIENT, OAK, TREE, PROVIDED = 1, 2, 3, 4

title("2. Each token is a vector: what it is, plus where it stands")

# A trained model finds its own vectors. Here they are random, but for four numbers that we set by hand, so that the
# picture means something: 0 "is a thing", 1 "describes a thing", and 2, 3 its place, as the hand of a clock that
# moves on with every token. (In a trained model such features are directions, seldom single coordinates.)
things, describing = {"tree", "shade", "day"}, {"ancient", "oak", "cool", "hot", "summer"}
TICK = 2 * pi / 16

what = mx.random.normal((T, C))
what[:, 0] = mx.array([float(word in things) for word in WORDS])
what[:, 1] = mx.array([float(word in describing) for word in WORDS])
what[:, 2:4] = 0
where = mx.zeros((T, C))
where[:, 2:4] = mx.array([[cos(TICK * t), sin(TICK * t)] for t in range(T)])
x = what + where  # the residual stream, (T, C)

print(f"x, the residual stream: {T} tokens, {C} numbers each {x.shape}   (GPT-2: 768 numbers)")
print(f"            {'thing':>5} {'descr':>5} {'place':>11} │ whatever else it means, 12 numbers")
for t in (ANCIENT, OAK, TREE):
    print(f"{WORDS[t]:>8} =  {numbers(x[t, :4])} │{numbers(x[t, 4:12])}  …")

title("3. Queries ask, keys answer")

# Training would have found such weights; we set them by hand. Number 0 of a query: "I am a thing. Who describes me?"
# Number 0 of a key: "I describe." Numbers 1, 2: "Who stands a step or two before me?" and "I stand here."
# The rest is small noise, which every head has. (GPT-2 brings each vector to one size first: ln_1, in example 02.)
head = AttentionHead(C, D)
BACK = -1.5 * TICK
query, key = 0.2 * mx.random.normal((2, D, C))
query[:3] = 0
key[:3] = 0
query[0, 0] = key[0, 1] = 3.4
query[1:3, 2:4] = 2.6 * mx.array([[cos(BACK), -sin(BACK)], [sin(BACK), cos(BACK)]])  # turn the clock's hand back
key[1:3, 2:4] = 2.6 * mx.eye(2)
head.query.weight, head.query.bias = query, mx.zeros(D)
head.key.weight, head.key.bias = key, mx.zeros(D)

q = head.query(x)  # (T, C) -> (T, D)
k = head.key(x)  # (T, C) -> (T, D)
print(f"q, what each token asks for {q.shape}; k, what each token answers to {k.shape}\n")
print(f"                 {'descr':>5} {'place':>11} │ noise")
print(f"    tree asks    {numbers(q[TREE, :3])} │{numbers(q[TREE, 3:])}    how well does it match?")
for j in (ANCIENT, OAK, PROVIDED):
    print(f"{WORDS[j]:>8} answers {numbers(k[j, :3])} │{numbers(k[j, 3:])}    q · k = {(q[TREE] @ k[j]).item():4.1f}")

title("4. Every query meets every key: the grid of scores, q @ k.T / √D")

scores = attention_scores(q, k, scale=1 / sqrt(D))  # (T, T)
table({word: decimals(scores[i]) for i, word in enumerate(WORDS)})

title("5. Why √D: the longer the vectors, the larger the scores, and softmax stops listening")

# A dot product of D random terms has a spread of √D. With 13 keys to choose from, what does the favourite get?
print("    D   spread of q · k     √D   favourite's weight: as it is   divided by √D")
for width in (16, 64, 256):
    some_q, some_k = mx.random.normal((2, 1000, T, width))
    products = attention_scores(some_q, some_k, scale=1.0)
    raw, scaled = (mx.softmax(products * scale, axis=-1).max(axis=-1).mean().item() for scale in (1, 1 / sqrt(width)))
    print(f"{width:5} {mx.std(products).item():17.1f} {sqrt(width):6.1f} {raw:30.0%} {scaled:15.0%}")
print("Where one token has nearly all the weight, the gradient is next to nothing: the head cannot learn.")

title("6. Nobody looks ahead: the mask, then softmax. The row of tree:")

mask = causal_mask(T, T)  # (T, T), True where one may look
pattern = attention_pattern(scores, mask)  # (T, T)
row = scores[TREE]
allowed = mx.where(mask[TREE], row, -mx.inf)
powers = mx.exp(allowed)
table(
    {
        "q · k": decimals(q[TREE] @ k.T),
        "/ √D": decimals(row),
        "masked": decimals(allowed),
        "exp": decimals(powers),
        "/ sum": decimals(powers / powers.sum(), 2),
    }
)

title("7. The pattern: who listens to whom, in percent (a row is a query, the future is ·)")

table({word: [shaded(weight) for weight in plain(pattern[i])] for i, word in enumerate(WORDS)})
sums = pattern.sum(axis=-1)
print(f"Each row sums to one: {sums.min().item():.6f} to {sums.max().item():.6f}")

title("8. Values move: what tree receives is added to what it was")

# What a token gives need not be what it answers to. This head passes on eight of the numbers of meaning, as they are.
head.value.weight, head.value.bias = mx.eye(D, C, k=4), mx.zeros(D)
head.output.weight = mx.eye(C, D, k=-4)

v = head.value(x)  # what each token has to give, (T, D)
moved = weighted_values(pattern, v)  # what each token receives, (T, D)
added = head.output(moved)  # the same at full width, (T, C)
after = x + added  # added to the stream, nothing is overwritten, (T, C)

for j in (ANCIENT, OAK):
    print(f"{pattern[TREE, j].item():6.2f} × {WORDS[j]:<8}{numbers(v[j])}")
print(f"   and a little of the rest\n       = moved   {numbers(moved[TREE])}      {v.shape} -> {moved.shape}\n")


def likeness(a: mx.array, b: mx.array) -> float:
    """The cosine of two tokens' meanings: 1 is alike, 0 unrelated."""
    a, b = a[4:], b[4:]
    return plain((a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum()))


for j in (ANCIENT, OAK, PROVIDED):
    before, now = likeness(x[TREE], x[j]), likeness(after[TREE], x[j])
    heard = "" if mask[TREE, j].item() else "   (still to come, so not heard)"
    print(f"How much tree is like {WORDS[j]:<8} before {before:5.2f}, after {now:5.2f}{heard}")

title("9. The same head in four ways")


def by_loops(x: list[list[float]]) -> list[list[float]]:
    """Token by token, number by number, in plain Python."""
    WQ, WK, WV, WO = (plain(part.weight) for part in (head.query, head.key, head.value, head.output))

    def dot(a: list[float], b: list[float]) -> float:
        return sum(one * other for one, other in zip(a, b, strict=True))

    def product(weight: list[list[float]], vector: list[float]) -> list[float]:
        return [dot(row, vector) for row in weight]

    result = []
    for i in range(len(x)):
        past = x[: i + 1]  # the causal mask, in plain Python
        question = product(WQ, x[i])
        powers = [exp(dot(question, product(WK, token)) / sqrt(D)) for token in past]
        values = [product(WV, token) for token in past]
        moved = [dot(powers, [value[d] for value in values]) / sum(powers) for d in range(D)]
        result.append(product(WO, moved))
    return result


def fused() -> mx.array:
    """MLX's own kernel, which the model uses: at GPT-2's sizes it never stores the T × T grid. (B, H, T, D)."""
    heads = (part[None, None] for part in (q, k, v))
    return head.output(mx.fast.scaled_dot_product_attention(*heads, scale=1 / sqrt(D), mask="causal")[0, 0])


ways = {
    "plain Python loops": mx.array(by_loops(plain(x))),
    "matrix products": added,
    "AttentionHead": head(x[None])[0],  # wants a batch, (B, T, C)
    "the fused kernel": fused(),
}
greatest = max(plain(mx.abs(way - added).max()) for way in ways.values())
for name, way in ways.items():
    print(f"{name:>18}: adds to tree {numbers(way[TREE, 4:12])}")
print(f"Greatest difference between them: {greatest:.1e}")
if not greatest < 1e-5:
    raise SystemExit("The four ways disagree: that is a bug.")
print("\nA layer has many such heads side by side: examples/02_many_heads_one_block.py")
