"""GPT-2 from scratch: text in, text out, with nothing but MLX and Python's standard library.

Run it:  python examples/00_gpt_from_scratch.py  (offline, in seconds; with a FOLDER "and a text" for another GPT-2)

    text -> tokens -> ids -> vectors -> blocks of attention and an MLP -> logits -> the next token

Axis letters: T tokens, C width of a token's vector, H heads, D = C / H width of a head, V vocabulary.
The next example, 01_one_head.py, takes one attention head apart.
"""

import json
import re
import sys
from itertools import pairwise
from math import inf, pi, sqrt
from pathlib import Path
from textwrap import fill
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")  # of a model folder
Weights = dict[str, Any]  # OpenAI's names: wte and wpe, the token and position vectors; h, the blocks; ln_f, ...

# 1. Text becomes tokens: bytes, joined into pieces that were frequent in the training text ----------------------------

# A token never spans two of these: a contraction, a word, a number, punctuation, white space. A space belongs to the
# word after it, so " tree" is the same token wherever it stands in a sentence.
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)

# The files write each byte as one visible character; a space is "Ġ".
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
NAME = {byte: chr(byte) for byte in VISIBLE}
NAME |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTE = {name: byte for byte, name in NAME.items()}


def split_words(text: str) -> list[str]:
    """Split as WORD does, where "a" stands for a letter of any other script, and "1" for a number."""
    kinds = ("a" if c.isalpha() else "1" if c.isnumeric() else "\t" if c.isspace() else "!" for c in text)
    in_ascii = "".join(c if c.isascii() else kind for c, kind in zip(text, kinds, strict=True))
    return [text[found.start() : found.end()] for found in WORD.finditer(in_ascii)]


class Tokenizer:
    """Byte-level byte-pair encoding. Every byte is a token, so any text can be written."""

    def __init__(self, folder: Path):
        self.id = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self.token = {i: token for token, i in self.id.items()}
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")  # "Ġ t", "h e", "Ġt he", ...
        self.rank = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}  # in the order of learning

    def encode(self, text: str) -> list[int]:
        return [self.id[token] for word in split_words(text) for token in self.merge(word)]

    def merge(self, word: str) -> list[str]:
        """Join two neighboring tokens, those that were learned first, until no pair was learned."""
        tokens = [NAME[byte] for byte in word.encode()]
        while min(ranks := [self.rank.get(pair, inf) for pair in pairwise(tokens)], default=inf) < inf:
            i = ranks.index(min(ranks))
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        return tokens

    def decode(self, ids: list[int]) -> str:
        return bytes(BYTE[c] for i in ids for c in self.token[i]).decode(errors="replace")


# 2. The model: ids in, logits out -------------------------------------------------------------------------------------


def gpt(weights: Weights, ids: mx.array, n_head: int) -> mx.array:
    """Return a logit for each token that could come next, after each token: (T,) -> (T, V)."""
    x = weights["wte"]["weight"][ids] + weights["wpe"]["weight"][: len(ids)]  # what it is, and where it is: (T, C)
    for block in weights["h"]:
        x = x + attention(norm(x, **block["ln_1"]), n_head, **block["attn"])  # tokens pass information on
        x = x + mlp(norm(x, **block["ln_2"]), **block["mlp"])  # each token is processed by itself
    head = weights.get("lm_head") or weights["wte"]  # GPT-2 reads tokens out with the vectors it read them in with
    return norm(x, **weights["ln_f"]) @ head["weight"].T  # a dot product with each token's vector: (T, V)


def attention(x: mx.array, n_head: int, c_attn: Weights, c_proj: Weights) -> mx.array:
    """Let each token collect what it needs from those before it, by H questions at once: (T, C) -> (T, C)."""
    T, C = x.shape
    qkv = linear(x, **c_attn).reshape(T, 3, n_head, C // n_head)  # (T, C) -> (T, 3 C) -> (T, 3, H, D)
    q, k, v = qkv.transpose(1, 2, 0, 3)  # what a token asks, what it answers to, what it gives: (H, T, D) each
    return linear(attend(q, k, v).swapaxes(0, 1).reshape(T, C), **c_proj)  # (H, T, D) -> (T, C), and mix the heads


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention in two lines (Vaswani et al. 2017, equation 1): (H, T, D) three times -> (H, T, D).

    A dot product tells how well a key answers a query. It grows like √D, and softmax would choose a single key, so it
    is divided by √D. Keys of the future get -inf, which softmax turns into 0: the token to predict is among them.
    """
    T, D = q.shape[1:]
    future = mx.triu(mx.full((T, T), -inf), k=1)  # -inf where the key comes after the query, else 0
    pattern = mx.softmax(q @ k.swapaxes(-1, -2) / sqrt(D) + future, axis=-1)  # (H, T, T), each row sums to 1
    return pattern @ v  # a query receives the average of the values, weighted by its row


def mlp(x: mx.array, c_fc: Weights, c_proj: Weights) -> mx.array:
    """Compare a token with many learned directions, and add a learned vector for each that it has: (T, C) -> (T, C)."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # (T, C) -> (T, 4 C) -> (T, C)


def gelu(x: mx.array) -> mx.array:
    """Pass positive numbers, and almost nothing of negative ones: without it, two matrices would be worth one."""
    return 0.5 * x * (1 + mx.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Bring each token's vector to mean 0 and variance 1, however much was added to it; then scale and shift it."""
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / mx.sqrt((centered * centered).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return x @ weight + bias


# 3. Generation: append a likely token, and ask again ------------------------------------------------------------------


def generate(weights: Weights, ids: list[int], n_head: int, n_tokens: int, temperature: float = 0.0) -> list[int]:
    """Return the ids with n_tokens more: the most likely one each time, or at a temperature above 0 drawn at random."""
    context = len(weights["wpe"]["weight"])  # there is a vector for as many positions
    for _ in range(n_tokens):
        logits = gpt(weights, mx.array(ids[-context:]), n_head)[-1]  # those after the last token: (V,)
        chosen: Any = mx.random.categorical(logits / temperature) if temperature else logits.argmax()
        ids = [*ids, chosen.item()]
    return ids


# 4. Training: make the tokens that did come next more likely ----------------------------------------------------------


def loss(weights: Weights, ids: mx.array, n_head: int) -> mx.array:
    """Return -log(probability of the next token), on average: ln V for a model that guesses, 0 for certainty."""
    logits = gpt(weights, ids[:-1], n_head)  # (T - 1, V)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # the logarithm of softmax
    return -mx.take_along_axis(logprobs, ids[1:, None], axis=-1).mean()


def train_step(weights: Weights, ids: mx.array, n_head: int, rate: float = 0.03) -> tuple[mx.array, Weights]:
    """Return the loss and new weights: each moves a little to where the loss is smaller, against its derivative."""
    value, gradient = mx.value_and_grad(loss)(weights, ids, n_head)
    return value, tree_map(lambda weight, derivative: weight - rate * derivative, weights, gradient)


def load(folder: Path) -> tuple[Weights, int, Tokenizer]:
    """Return the weights, the number of heads, and the tokenizer of a model folder."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} is not a folder of GPT-2: it has no {', '.join(missing)}")
    found: Any = mx.load(str(folder / "model.safetensors"))
    arrays = [(name.removeprefix("transformer."), array.astype(mx.float32)) for name, array in found.items()]
    masks = (".attn.bias", ".attn.masked_bias")  # in old files; here ``future``
    weights: Any = tree_unflatten([(name, array) for name, array in arrays if not name.endswith(masks)])
    return weights, json.loads((folder / "config.json").read_text())["n_head"], Tokenizer(folder)


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def main(folder: str = "", text: str = "") -> None:
    weights, n_head, tokenizer = load(Path(folder or Path(__file__).parent.parent / "weights/tinyworld"))
    (V, C), context = weights["wte"]["weight"].shape, len(weights["wpe"]["weight"])
    title("1. Text becomes tokens, and tokens become ids (␣ is a space, � part of a character)")
    for example in ("An oak tree: 🌳", text or "One sunny morning, Lily went to the barn. She was"):
        ids = tokenizer.encode(example)[-context:]  # of a longer text, only the end is read
        tokens = [tokenizer.decode([i]).replace(" ", "␣") for i in ids]
        print(*(f"{token:<{len(str(i))}}" for token, i in zip(tokens, ids, strict=True)))
        print(*(f"{i:<{len(token)}}" for token, i in zip(tokens, ids, strict=True)))

    title("2. The model gives each token of the vocabulary a probability to come next")
    print(f"ids ({(T := len(ids))},) -> vectors {T, C} -> {len(weights['h'])} blocks {T, C} -> logits {T, V}\n")
    probabilities: Any = mx.softmax(gpt(weights, mx.array(ids), n_head)[-1]).tolist()  # after the last token
    for p, i in sorted(zip(probabilities, range(V), strict=True), reverse=True)[:6]:
        print(f"{tokenizer.decode([i])!r:>12} {p:4.0%} {'█' * round(60 * p)}")

    title("3. A token is drawn and appended, and the model is asked again")
    mx.random.seed(4)
    print(fill(tokenizer.decode(generate(weights, ids, n_head, 60, temperature=0.7)), 100))

    title("4. It learns a sentence that none of its stories could contain")
    lesson = mx.array(tokenizer.encode("One sunny morning, Lily sent the garden to the market."))
    for step in range(21):
        value, trained = train_step(weights, lesson, n_head)
        if step in (0, 1, 2, 5, 10, 20):
            text = tokenizer.decode(generate(weights, tokenizer.encode("One sunny morning, Lily"), n_head, 9))
            print(f"after {step:2} steps, loss {value.item():.2f}: {text}")
        weights = trained
    print("\nWhat does a head attend to, and why? Next: examples/01_one_head.py")


if __name__ == "__main__":
    main(*sys.argv[1:3])
