"""From one head to GPT-2: heads form a layer, a layer and an MLP form a block, and blocks form the model.

Run it:  python examples/02_many_heads_one_block.py  (offline, in a second)
Each part is built by hand and compared with the package's. The example before this one is 01_one_head.py, the next
is 03_residual_stream.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 products, so that both ways agree

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

# GPT-2's tokenizer splits the sentence into these tokens and ids.
WORDS = ["The", "ancient", "oak", "tree", "provided", "cool", "shade", "on", "the", "hot", "summer", "day", "."]
IDS = mx.array([[464, 6156, 26210, 5509, 2810, 3608, 17979, 319, 262, 3024, 3931, 1110, 13]])  # (B, T)
T, TREE = len(WORDS), WORDS.index("tree")

# GPT-2's vocabulary in a small model. GPT-2 small has width 768, 12 blocks and 12 heads.
config = GPTConfig(n_embd=48, n_layer=4, n_head=3)


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def plain(array: mx.array) -> Any:
    """Convert an MLX array to Python numbers."""
    return array.tolist()


def numbers(row: mx.array) -> str:
    """Format the first numbers of a row; + 0.0 turns -0.0 into 0.0."""
    return " ".join(f"{round(value, 2) + 0.0:6.2f}" for value in plain(row[:8])) + "  …" * (len(row) > 8)


def compare(name: str, by_hand: mx.array, package: mx.array) -> None:
    largest = plain(mx.abs(by_hand - package).max())
    print(f"{name}: largest difference {largest:.1e}")
    if not largest < 1e-4:  # float32 sums in a different order, over a few layers
        raise SystemExit("They disagree, which is a bug.")


title("1. Many heads: each asks its own question")

# Weights ten times GPT-2's initial ones, so that the heads of an untrained model differ visibly. Their questions are
# random. Training makes them useful: "Which word is before me?", "Who describes me?", "Where was I used before?"
large = GPT(GPTConfig(n_embd=48, n_layer=1, n_head=3, initializer_range=0.2))
layer = large.h[0].attn
layer.c_proj.bias = 0.1 * mx.random.normal((config.n_embd,))  # zero in a new model; random here, so that it shows
stream = large.wte(IDS) + large.wpe(mx.arange(T))  # meaning plus position, (B, T, C)
x = large.h[0].ln_1(stream)  # each token's vector normalized, (B, T, C)
heads = [layer.head(i) for i in range(config.n_head)]


def picture(head: AttentionHead) -> list[str]:
    """Draw the attention pattern, a line for each query: darker is more weight, the future is blank."""
    scores = attention_scores(head.query(x), head.key(x), head.scale)
    pattern = attention_pattern(scores, causal_mask(T, T))[0]  # (T, T)
    return ["".join(2 * " ░▒▓█"[max(1, round(4 * sqrt(w))) if w else 0] for w in row) for row in plain(pattern)]


print(f"{'':>8}", *(f"{f'head {i}':<{2 * T}}" for i in range(config.n_head)), sep="  ")
for word, *lines in zip(WORDS, *map(picture, heads), strict=True):
    print(f"{word:>8}", *lines, sep="  ")
print("\nA row is a query; the columns are the same words from left to right.")

title("2. The layer is the sum of its heads' outputs plus the output bias")

for i, head in enumerate(heads):
    print(f"      head {i}  {numbers(head(x)[0, TREE])}")
print(f" output bias  {numbers(layer.c_proj.bias)}")
summed = sum((head(x) for head in heads), layer.c_proj.bias)  # (B, T, C)
print(f"       = sum  {numbers(summed[0, TREE])}     what tree receives")
print(f"   the layer  {numbers(layer(x)[0, TREE])}")
# The layer computes all heads in one product and one kernel: a GPU is faster at a few large steps than at many small.
compare("\nSum of the heads and MultiHeadAttention", summed, layer(x))

title("3. The MLP: attention moves information between tokens, the MLP processes each token alone")

mlp = large.h[0].mlp
up = mlp.c_fc(x)  # (B, T, C) -> (B, T, 4C)
activations = gelu_new(up)  # without this nonlinearity, the two matrices would be equivalent to one
down = mlp.c_proj(activations)  # (B, T, 4C) -> (B, T, C)
print(f"up-project {x.shape} -> {up.shape}, GELU, down-project {activations.shape} -> {down.shape}")
inputs = mx.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 5.0])
print(f"     x {numbers(inputs)}\n  GELU {numbers(gelu_new(inputs))}   (positive numbers pass)\n")
compare("Up-project, GELU, down-project and MLP", down, mlp(x))
compare("MLP of tree alone and in the sentence", mlp(x[:, TREE : TREE + 1]), mlp(x)[:, TREE : TREE + 1])

title("4. A block: attention, then MLP; each adds to the residual stream")


def norm(x: mx.array, ln: nn.LayerNorm) -> mx.array:
    """Normalize each token's vector to mean 0 and variance 1, then apply a learned scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / mx.sqrt(variance + 1e-5) * ln.weight + ln.bias


def attention(x: mx.array, attn: MultiHeadAttention) -> mx.array:
    return sum((attn.head(i)(x) for i in range(attn.n_head)), attn.c_proj.bias)


def feed_forward(x: mx.array, mlp: MLP) -> mx.array:
    return mlp.c_proj(gelu_new(mlp.c_fc(x)))


def block_by_hand(x: mx.array, block: Block) -> mx.array:
    x = x + attention(norm(x, block.ln_1), block.attn)
    x = x + feed_forward(norm(x, block.ln_2), block.mlp)
    return x


print("x = x + attention(norm(x))\nx = x + mlp(norm(x))\n\nThe residual stream of tree, and what is added to it:")
attn_out = attention(norm(stream, large.h[0].ln_1), layer)
mlp_out = feed_forward(norm(stream + attn_out, large.h[0].ln_2), mlp)
for name, part in {"x": stream, "+ attention": attn_out, "+ mlp": mlp_out}.items():
    print(f"{name:>12}  {numbers(part[0, TREE])}")
print(f"{'= the block':>12}  {numbers(large.h[0](stream)[0, TREE])}\n")
compare("The formula by hand and Block", block_by_hand(stream, large.h[0]), large.h[0](stream))

title("5. The stack: ids in, logits out")

model = GPT(config)  # a new model with GPT-2's initial weights
x = model.wte.weight[IDS] + model.wpe.weight[:T]
print(f"ids {IDS.shape} -> wte + wpe {x.shape}", end="")
for block in model.h:
    x = block_by_hand(x, block)
x = norm(x, model.ln_f)
logits = x @ model.wte.weight.T  # similarity to the embedding of every token
print(f" -> {len(model.h)} blocks, ln_f {x.shape} -> head {logits.shape}")
compare("The stack by hand and GPT", logits, model(IDS))

title("6. The loss: how improbable the model finds each next token")

V = config.vocab_size
probabilities = mx.softmax(logits[0], axis=-1)  # (T, V)
next_probs = [plain(probabilities[t, IDS[0, t + 1]]) for t in range(T - 1)]  # of the token after t
for t in range(TREE - 2, TREE + 2):
    p = next_probs[t]
    print(f"after {WORDS[t]:<8} the probability of {WORDS[t + 1]:<8} is {p:.7f}: loss {-log(p):.2f}")
loss = sum(-log(p) for p in next_probs) / len(next_probs)
print(f"mean loss {loss:.2f}; ln V = ln {V} = {log(V):.2f}; 1/V = {1 / V:.7f}")
# With small weights all logits are near 0, so softmax gives every token about 1/V, and -ln(1/V) is ln V. If a new model
# starts elsewhere, there is a bug.
if not abs(loss / log(V) - 1) < 0.02:
    raise SystemExit("An untrained model does not start at ln V, which is a bug.")

print("\nexp(loss), the perplexity, is the number of equally likely tokens that the model chooses between:")
for level, remark in {
    log(V): "a new model",
    8.0: "",
    6.0: "much lower than at the start, and the text is still gibberish",
    4.0: "",
    3.12: "OpenAI's GPT-2 small on OpenWebText, as nanoGPT measured it",
}.items():
    print(f"  loss {level:5.2f}   one of {exp(level):6,.0f}   {remark}".rstrip())
