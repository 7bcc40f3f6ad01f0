"""One attention head, step by step: how the vector of "tree" takes in the meaning of "ancient" and "oak".

Run it:  python examples/01_one_head.py  (offline, in a second)
Read it from top to bottom, beside mlx_gpt/model/attention.py. The next example is 02_many_heads_one_block.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 products, so that four ways agree to 1e-5

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
    """Convert an MLX array to Python numbers."""
    return array.tolist()


def numbers(row: mx.array) -> str:
    return " ".join(f"{round(value, 1) + 0.0:5.1f}" for value in plain(row))  # + 0.0 turns -0.0 into 0.0


def table(rows: dict[str, list[str]]) -> None:
    """Print named rows with a column for each word."""
    widths = [max(len(word), 5) for word in WORDS]
    for name, cells in {"": WORDS, **rows}.items():
        print(f"{name:>8}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def decimals(row: mx.array, digits: int = 1) -> list[str]:
    return [f"{value:.{digits}f}" for value in plain(row)]


def shaded(weight: float) -> str:
    """Show a weight as a shade and in percent; exactly zero as a dot."""
    return f"{' ░▒▓█'[round(4 * weight)] * 2}{100 * weight:3.0f}" if weight else "·"


title("1. Words become tokens, tokens become numbers")

# GPT-2's tokenizer splits the sentence into these tokens and ids. A space belongs to the word after it.
WORDS = ["The", "ancient", "oak", "tree", "provided", "cool", "shade", "on", "the", "hot", "summer", "day", "."]
IDS = [464, 6156, 26210, 5509, 2810, 3608, 17979, 319, 262, 3024, 3931, 1110, 13]
table({"id": [str(i) for i in IDS]})

T, C, D = len(WORDS), 16, 8  # tokens, width of the residual stream, width of the head
ANCIENT, OAK, TREE, PROVIDED = 1, 2, 3, 4

title("2. Each token is a vector: its meaning plus its position")

# Training would find these vectors. Here they are random, except for four numbers that we set by hand so that the
# example can be followed: 0 is "thing", 1 is "describes a thing", and 2, 3 are the position, as the hand of a clock
# that advances with every token. (In a trained model such features are directions, rarely single coordinates.)
things, describing = {"tree", "shade", "day"}, {"ancient", "oak", "cool", "hot", "summer"}
TICK = 2 * pi / 16

meaning = mx.random.normal((T, C))
meaning[:, 0] = mx.array([float(word in things) for word in WORDS])
meaning[:, 1] = mx.array([float(word in describing) for word in WORDS])
meaning[:, 2:4] = 0
position = mx.zeros((T, C))
position[:, 2:4] = mx.array([[cos(TICK * t), sin(TICK * t)] for t in range(T)])
x = meaning + position  # the residual stream, (T, C)

print(f"x, the residual stream: {T} tokens, {C} numbers each {x.shape}   (GPT-2: 768 numbers)")
print(f"            {'thing':>5} {'descr':>5} {'position':>11} │ the rest of its meaning, 12 numbers")
for t in (ANCIENT, OAK, TREE):
    print(f"{WORDS[t]:>8} =  {numbers(x[t, :4])} │{numbers(x[t, 4:12])}  …")

title("3. Queries ask, keys answer")

# Training would find these weights; we set them by hand. A query asks in number 0, "I am a thing: who describes me?",
# and in numbers 1, 2, "Who is one or two tokens before me?" A key answers "I describe" and "My position is this".
# The other numbers are small noise. (GPT-2 first normalizes each vector: ln_1, in example 02.)
head = AttentionHead(C, D)
BACK = -1.5 * TICK
query, key = 0.2 * mx.random.normal((2, D, C))
query[:3] = 0
key[:3] = 0
query[0, 0] = key[0, 1] = 3.4
query[1:3, 2:4] = 2.6 * mx.array([[cos(BACK), -sin(BACK)], [sin(BACK), cos(BACK)]])  # turn the hand of the clock back
key[1:3, 2:4] = 2.6 * mx.eye(2)
head.query.weight, head.query.bias = query, mx.zeros(D)
head.key.weight, head.key.bias = key, mx.zeros(D)

q = head.query(x)  # (T, C) -> (T, D)
k = head.key(x)  # (T, C) -> (T, D)
print(f"q, each token's question {q.shape}; k, each token's answer {k.shape}\n")
print(f"                 {'descr':>5} {'position':>11} │ noise")
print(f"    tree asks    {numbers(q[TREE, :3])} │{numbers(q[TREE, 3:])}    the match:")
for j in (ANCIENT, OAK, PROVIDED):
    print(f"{WORDS[j]:>8} answers {numbers(k[j, :3])} │{numbers(k[j, 3:])}    q · k = {(q[TREE] @ k[j]).item():4.1f}")

title("4. Every query meets every key: the grid of scores, q @ k.T / √D")

scores = attention_scores(q, k, scale=1 / sqrt(D))  # (T, T)
table({word: decimals(scores[i]) for i, word in enumerate(WORDS)})

title("5. Why divide by √D: scores grow with the width, and softmax saturates")

# A dot product of D random terms has a standard deviation of √D. How large is the largest of 13 attention weights?
print("    D   std of q · k     √D   largest weight: unscaled   divided by √D")
for width in (16, 64, 256):
    some_q, some_k = mx.random.normal((2, 1000, T, width))
    products = attention_scores(some_q, some_k, scale=1.0)
    raw, scaled = (mx.softmax(products * scale, axis=-1).max(axis=-1).mean().item() for scale in (1, 1 / sqrt(width)))
    print(f"{width:5} {mx.std(products).item():14.1f} {sqrt(width):6.1f} {raw:26.0%} {scaled:15.0%}")
print("When one token has nearly all the weight, the gradient almost vanishes and the head cannot learn.")

title("6. No token sees the future: the causal mask, then softmax. The row of tree:")

mask = causal_mask(T, T)  # (T, T), True for a key that the query may see
pattern = attention_pattern(scores, mask)  # (T, T)
row = scores[TREE]
masked = mx.where(mask[TREE], row, -mx.inf)
exp_scores = mx.exp(masked)
table(
    {
        "q · k": decimals(q[TREE] @ k.T),
        "/ √D": decimals(row),
        "masked": decimals(masked),
        "exp": decimals(exp_scores),
        "/ sum": decimals(exp_scores / exp_scores.sum(), 2),
    }
)

title("7. The attention pattern: what each token attends to, in percent (rows are queries, · is masked)")

table({word: [shaded(weight) for weight in plain(pattern[i])] for i, word in enumerate(WORDS)})
sums = pattern.sum(axis=-1)
print(f"Each row sums to one: {sums.min().item():.6f} to {sums.max().item():.6f}")

title("8. Values move: tree receives their weighted sum, added to its own vector")

# A token's value is separate from its key. This head passes on eight numbers of the meaning, unchanged.
head.value.weight, head.value.bias = mx.eye(D, C, k=4), mx.zeros(D)
head.output.weight = mx.eye(C, D, k=-4)

v = head.value(x)  # what each token passes on, (T, D)
attended = weighted_values(pattern, v)  # what each token receives, (T, D)
added = head.output(attended)  # the same at full width, (T, C)
after = x + added  # added to the residual stream, (T, C)

for j in (ANCIENT, OAK):
    print(f"{pattern[TREE, j].item():6.2f} × {WORDS[j]:<8}{numbers(v[j])}")
print(f"   and a little of the rest\n     = attended {numbers(attended[TREE])}      {v.shape} -> {attended.shape}\n")


def similarity(a: mx.array, b: mx.array) -> float:
    """Return the cosine of two tokens' meanings: 1 is the same, 0 unrelated."""
    a, b = a[4:], b[4:]
    return plain((a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum()))


for j in (ANCIENT, OAK, PROVIDED):
    before, now = similarity(x[TREE], x[j]), similarity(after[TREE], x[j])
    note = "" if mask[TREE, j].item() else "   (in the future, so masked)"
    print(f"Similarity of tree to {WORDS[j]:<8} before {before:5.2f}, after {now:5.2f}{note}")

title("9. The same head, computed in four ways")


def by_loops(x: list[list[float]]) -> list[list[float]]:
    """Compute the head in plain Python, one number at a time."""
    WQ, WK, WV, WO = (plain(part.weight) for part in (head.query, head.key, head.value, head.output))

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def product(weight: list[list[float]], vector: list[float]) -> list[float]:
        return [dot(row, vector) for row in weight]

    result = []
    for i in range(len(x)):
        past = x[: i + 1]  # the causal mask, in plain Python
        query = product(WQ, x[i])
        exp_scores = [exp(dot(query, product(WK, token)) / sqrt(D)) for token in past]
        values = [product(WV, token) for token in past]
        attended = [dot(exp_scores, [value[d] for value in values]) / sum(exp_scores) for d in range(D)]
        result.append(product(WO, attended))
    return result


def fused() -> mx.array:
    """Call MLX's kernel, (B, H, T, D), as the model does. At GPT-2's sizes it never stores the (T, T) scores."""
    heads = (part[None, None] for part in (q, k, v))
    return head.output(mx.fast.scaled_dot_product_attention(*heads, scale=1 / sqrt(D), mask="causal")[0, 0])


ways = {
    "plain Python loops": mx.array(by_loops(plain(x))),
    "matrix products": added,
    "AttentionHead": head(x[None])[0],  # takes a batch, (B, T, C)
    "the fused kernel": fused(),
}
largest = max(plain(mx.abs(way - added).max()) for way in ways.values())
for name, way in ways.items():
    print(f"{name:>18}: adds to tree {numbers(way[TREE, 4:12])}")
print(f"Largest difference between them: {largest:.1e}")
if not largest < 1e-5:
    raise SystemExit("The four ways disagree, which is a bug.")
print("\nA layer has many such heads: examples/02_many_heads_one_block.py")
