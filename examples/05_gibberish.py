"""It says gibberish, though the loss is decreasing: a GPT with two mistakes, and the doctor that names them.

Run it:  python examples/05_gibberish.py  (offline, in half a minute)
Read section 1 first: a GPT as people write their first one. Can you see the mistakes? The loss does not show them.
Beside it read mlx_gpt/check/doctor/README.md. The example before this one is 04_heads.py.
"""

from mlx_gpt.check.doctor import examine  # isort: skip  (before mlx, which on Linux then uses NumPy's OpenBLAS)

import random
from collections.abc import Iterator
from inspect import getsource
from textwrap import fill
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from rich.console import Console

# 1. The GPT -----------------------------------------------------------------------------------------------------------

WHO = ("The old farmer", "My little sister", "A hungry bear", "The brave captain", "Our new teacher", "A quiet boy")
DID = ("found", "painted", "carried", "lost", "wanted", "brought home")
WHAT = ("a red kite", "the silver spoon", "some fresh bread", "an empty box", "a small boat", "the last apple")
WHERE = ("in the garden", "near the river", "under a bridge", "by the sea", "after the rain", "on Sunday morning")
rng = random.Random(1)
text = " ".join(f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHERE)}." for _ in range(3000))
characters = sorted(set(text))
V, T, C, H, LAYERS = len(characters), 32, 48, 2, 2  # vocabulary, context, width, heads, layers


def encode(text: str) -> list[int]:
    return [characters.index(c) for c in text]


def decode(ids: list[int]) -> str:
    return "".join(characters[i] for i in ids)


data = np.array(encode(text), np.int32)
train_ids, val_ids = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def batches(B: int = 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        starts = np.random.randint(0, len(train_ids) - T, (B, 1))
        rows = train_ids[starts + np.arange(T + 1)]
        yield rows[:, :-1], rows[:, 1:]  # the target of each token is the next one


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out, self.rope = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.RoPE(C // H)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def attention(self, x: mx.array, mask: mx.array) -> mx.array:
        B, T, _ = x.shape
        q, k, v = (a.reshape(B, T, H, C // H).swapaxes(1, 2) for a in mx.split(self.qkv(x), 3, axis=-1))
        q, k = self.rope(q), self.rope(k)  # positions
        z = mx.fast.scaled_dot_product_attention(q, k, v, scale=(C // H) ** -0.5, mask=mask)  # (B, H, T, D)
        return self.out(z.swapaxes(1, 2).reshape(B, T, C))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(V, C), [Block() for _ in range(LAYERS)]
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, self.mask(ids.shape[1]))
        return self.head(self.norm(x))

    def mask(self, T: int) -> mx.array:
        return mx.tril(mx.ones((T, T)))

    def generate(self, ids: list[int], n: int, temperature: float = 1.0) -> list[int]:
        for _ in range(n):
            logits = self(mx.array([ids[-T:]]))[0, -1]
            ids = [*ids, self.choose(logits / temperature)]
        return ids

    def choose(self, logits: mx.array) -> Any:
        return mx.random.categorical(mx.softmax(logits)).item()


def train(model: GPT, steps: int = 200) -> list[float]:
    optimizer = optim.AdamW(optim.linear_schedule(6e-3, 0, steps), bias_correction=True)
    loss_and_gradient = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))
    losses = []
    for x, y in batches():
        loss, gradient = loss_and_gradient(mx.array(x), mx.array(y))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
        if len(losses) > steps:
            break
    return losses


# 2. It is trained, and says gibberish ---------------------------------------------------------------------------------


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def trained(model: GPT) -> GPT:
    print("loss:", " -> ".join(f"{loss:.2f}" for loss in train(model)[::50]))
    return model


def says(model: GPT) -> str:
    """Return a text of the model, and below it the share of its words that are in the corpus."""
    written = decode(model.generate(encode("The old farmer"), 220, temperature=0.7))
    words, corpus = written.split()[:-1], set(text.split())  # the last word is cut
    share = sum(word in corpus for word in words) / len(words)
    return (
        fill(" ".join(written.split()), 96, initial_indent="    ", subsequent_indent="    ")
        + f"\n    ({share:.0%} words)"
    )


# 3. What is wrong with it ---------------------------------------------------------------------------------------------


def arguments(model: GPT) -> dict[str, Any]:
    """Return what ``examine`` is given: the model, how it is sampled, and the data."""
    given = {"forward": model, "vocab_size": V, "n_positions": T, "sample": model.generate, "batches": batches}
    return given | {"train_ids": train_ids, "val_ids": val_ids, "encode": encode, "decode": decode}


def build() -> dict[str, Any]:
    """Return the same of a trained model, for the command ``mlx-gpt doctor examples/05_gibberish.py:build``."""
    mx.random.seed(0)
    np.random.seed(0)
    model = GPT()
    train(model)
    return arguments(model)


# 4. The repairs: a line each ------------------------------------------------------------------------------------------


class WithMask(GPT):
    def mask(self, T: int) -> mx.array:
        return mx.tril(mx.ones((T, T), dtype=mx.bool_))


class WithLogits(GPT):
    def choose(self, logits: mx.array) -> Any:
        return mx.random.categorical(logits).item()


class Repaired(WithMask, WithLogits):
    pass


def with_weights(model: GPT, weights: GPT) -> GPT:
    model.update(weights.parameters())
    return model


def diff(before: Any, after: Any) -> str:
    """Return the last lines of two functions, as a diff shows them."""
    old, new = (getsource(function).splitlines()[-1].strip() for function in (before, after))
    return f"- {old}\n+ {new}"


def main() -> None:
    console = Console(width=98, highlight=False)
    mx.random.seed(0)
    np.random.seed(0)

    title("1. A GPT is trained, and its loss decreases")
    model = trained(GPT())

    title("2. It says gibberish")
    print(says(model))

    title("3. The doctor's report")
    console.print(examine(**arguments(model)))

    title("4. The repairs, a line each")
    print(diff(GPT.mask, WithMask.mask))
    print("  A mask of ones and zeros is added to the scores and forbids nothing; one of booleans forbids.\n")
    print(diff(GPT.choose, WithLogits.choose))
    print("  mx.random.categorical applies the softmax itself. Twice the softmax is almost uniform.\n")
    print("The second repair alone. The model has only learned to copy the next character from the future:")
    print(says(with_weights(WithLogits(), model)))
    print("The first repair alone, trained again:")
    repaired = trained(Repaired())
    print(says(with_weights(WithMask(), repaired)))
    print("Both:")
    print(says(repaired))

    title("5. The report on the repaired GPT, whose loss is the higher one")
    report = examine(**arguments(repaired))
    print(report.verdict())
    for finding in report.findings:
        print(fill(f"{finding.severity}: {finding.code}: {finding.why}", 98))


if __name__ == "__main__":
    main()
