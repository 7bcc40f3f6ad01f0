"""From one head to GPT-2: heads side by side are a layer, layer and MLP are a block, a stack of blocks is the model.

Run it:  python examples/02_many_heads_one_block.py  (offline, in a second)
Each part is put together by hand and compared with the package's own. What came before is 01_one_head.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # whole float32 products, so that both ways can agree

from math import exp, log, sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import GPTConfig
from mlx_gpt.model.attention import (
    AttentionHead,
    MultiHeadAttention,
    attention_pattern,
    attention_scores,
    causal_mask,
)
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.mlp import MLP, gelu_new

mx.random.seed(1)

# GPT-2's tokenizer cuts the sentence just so, with these ids.
WORDS = ["The", "ancient", "oak", "tree", "provided", "cool", "shade", "on", "the", "hot", "summer", "day", "."]
IDS = mx.array([[464, 6156, 26210, 5509, 2810, 3608, 17979, 319, 262, 3024, 3931, 1110, 13]])  # (B, T)
T, TREE = len(WORDS), WORDS.index("tree")

# GPT-2's own vocabulary, in a narrow model. GPT-2 small: width 768, 12 blocks, 12 heads.
config = GPTConfig(n_embd=48, n_layer=4, n_head=3)


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def plain(array: mx.array) -> Any:
    """MLX's numbers as Python's own."""
    return array.tolist()


def numbers(row: mx.array) -> str:
    """The first numbers of a row; + 0.0 turns -0.0 into 0.0."""
    return " ".join(f"{round(value, 2) + 0.0:6.2f}" for value in plain(row[:8])) + "  …" * (len(row) > 8)


def same(what: str, by_hand: mx.array, package: mx.array) -> None:
    greatest = plain(mx.abs(by_hand - package).max())
    print(f"{what}: greatest difference {greatest:.1e}")
    if not greatest < 1e-4:  # float32, after a few layers of additions in another order
        raise SystemExit("They disagree: that is a bug.")


title("1. Heads side by side: each asks its own question")

# Ten times GPT-2's initial weights, so that untrained heads differ enough to be seen. Their questions are random;
# training makes some of them useful: "which word stood before me?", "who describes me?", "where did I stand before?"
loud = GPT(GPTConfig(n_embd=48, n_layer=1, n_head=3, initializer_range=0.2))
layer = loud.h[0].attn
layer.c_proj.bias = 0.1 * mx.random.normal((config.n_embd,))  # zero in a new model; here it shall be seen
stream = loud.wte(IDS) + loud.wpe(mx.arange(T))  # what each token is, plus where it stands, (B, T, C)
x = loud.h[0].ln_1(stream)  # each token's vector brought to one size, (B, T, C)
heads = [layer.head(i) for i in range(config.n_head)]


def picture(head: AttentionHead) -> list[str]:
    """The head's pattern, a line for each query: the darker, the more weight; the future is blank."""
    scores = attention_scores(head.query(x), head.key(x), head.scale)
    pattern = attention_pattern(scores, causal_mask(T, T))[0]  # (T, T)
    return ["".join(2 * " ░▒▓█"[max(1, round(4 * sqrt(w))) if w else 0] for w in row) for row in plain(pattern)]


print(f"{'':>8}", *(f"{f'head {i}':<{2 * T}}" for i in range(config.n_head)), sep="  ")
for word, *lines in zip(WORDS, *map(picture, heads), strict=True):
    print(f"{word:>8}", *lines, sep="  ")
print("\nA row is a query; the columns are the same words from left to right. Same stream, three patterns.")

title("2. What the heads add, summed, plus the output bias, is the layer")

for i, head in enumerate(heads):
    print(f"      head {i}  {numbers(head(x)[0, TREE])}")
print(f" output bias  {numbers(layer.c_proj.bias)}")
side_by_side = sum((head(x) for head in heads), layer.c_proj.bias)  # (B, T, C)
print(f"       = sum  {numbers(side_by_side[0, TREE])}     what tree receives")
print(f"   the layer  {numbers(layer(x)[0, TREE])}")
# The layer computes all of them in one product and one kernel; GPU time is spent on a few large steps, not many small.
same("\nHeads side by side and MultiHeadAttention", side_by_side, layer(x))

title("3. The MLP: attention moved information between tokens, now each token thinks alone")

mlp = loud.h[0].mlp
wide = mlp.c_fc(x)  # (B, T, C) -> (B, T, 4C)
bent = gelu_new(wide)  # without a bend here, two matrices in a row would be no more than one
narrow = mlp.c_proj(bent)  # (B, T, 4C) -> (B, T, C)
print(f"widen {x.shape} -> {wide.shape}, bend, narrow {bent.shape} -> {narrow.shape}")
some = mx.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 5.0])
print(f"  from {numbers(some)}\n  bent {numbers(gelu_new(some))}   (GELU: positive passes)\n")
same("Widen, bend, narrow and MLP", narrow, mlp(x))
same("tree thinks the same without the sentence", mlp(x[:, TREE : TREE + 1]), mlp(x)[:, TREE : TREE + 1])

title("4. A block: attend, then think; both only ever add to the stream")


def norm(x: mx.array, ln: nn.LayerNorm) -> mx.array:
    """Each token's numbers to mean 0 and variance 1, then stretched and shifted as learned."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / mx.sqrt(variance + 1e-5) * ln.weight + ln.bias


def attend(x: mx.array, attn: MultiHeadAttention) -> mx.array:
    return sum((attn.head(i)(x) for i in range(attn.n_head)), attn.c_proj.bias)


def think(x: mx.array, mlp: MLP) -> mx.array:
    return mlp.c_proj(gelu_new(mlp.c_fc(x)))


def block_by_hand(x: mx.array, block: Block) -> mx.array:
    x = x + attend(norm(x, block.ln_1), block.attn)
    x = x + think(norm(x, block.ln_2), block.mlp)
    return x


print("x = x + attend(norm(x))      the stream of tree, and what is added to it:\nx = x + think(norm(x))\n")
attended = attend(norm(stream, loud.h[0].ln_1), layer)
thought = think(norm(stream + attended, loud.h[0].ln_2), mlp)
for name, part in {"x": stream, "+ attended": attended, "+ thought": thought}.items():
    print(f"{name:>12}  {numbers(part[0, TREE])}")
print(f"{'= the block':>12}  {numbers(loud.h[0](stream)[0, TREE])}\n")
same("The formula by hand and Block", block_by_hand(stream, loud.h[0]), loud.h[0](stream))

title("5. The stack: ids in, logits out")

model = GPT(config)  # a new model with GPT-2's initial weights
x = model.wte.weight[IDS] + model.wpe.weight[:T]
print(f"ids {IDS.shape} -> wte + wpe {x.shape}", end="")
for block in model.h:
    x = block_by_hand(x, block)
x = norm(x, model.ln_f)
logits = x @ model.wte.weight.T  # compared with the embedding of every token: the more alike, the likelier
print(f" -> {len(model.h)} blocks, ln_f {x.shape} -> head {logits.shape}")
same("The stack by hand and GPT", logits, model(IDS))

title("6. The loss: how surprised the model is by what comes next")

V = config.vocab_size
probabilities = mx.softmax(logits[0], axis=-1)  # (T, V)
given = [plain(probabilities[t, IDS[0, t + 1]]) for t in range(T - 1)]  # what token t gave to the one that came
for t in range(TREE - 2, TREE + 2):
    print(f"after {WORDS[t]:<8} the model gave {WORDS[t + 1]:<8} a chance of {given[t]:.7f}: loss {-log(given[t]):.2f}")
loss = sum(-log(p) for p in given) / len(given)
print(f"mean loss {loss:.2f}; ln V = ln {V} = {log(V):.2f}; one in V is {1 / V:.7f}")
# With small weights all logits are near 0, so softmax gives every token about 1/V, and -ln(1/V) is ln V. A new model
# that starts elsewhere has a bug; one that starts there knows nothing yet, and knows it.
if not abs(loss / log(V) - 1) < 0.02:
    raise SystemExit("An untrained model should start at ln V: that is a bug.")

print("\nWhat a loss means: exp(loss) is how many equally likely tokens the model still wavers between.")
for level, remark in {
    log(V): "a new model",
    8.0: "",
    6.0: "the loss has come down a long way, and yet: gibberish",
    4.0: "",
    3.12: "OpenAI's GPT-2 small on OpenWebText, as nanoGPT measured it",
}.items():
    print(f"  loss {level:5.2f}   one of {exp(level):6,.0f}   {remark}".rstrip())
