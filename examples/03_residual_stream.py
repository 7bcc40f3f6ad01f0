"""The residual stream: one token's vector on its way up, and what each part of the model adds to it.

Run it:  python examples/03_residual_stream.py  (offline, in seconds)
Read it beside mlx_gpt/lens/trace.py, which is the forward pass with every step named, and attribution.py. The example
before this one is 02_many_heads_one_block.py, the next is 04_heads.py.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 products, so that the parts sum to the whole

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt import load
from mlx_gpt.lens import decompose_resid, logit_attribution, logit_direction, logit_lens_top, trace

model, tokenizer = load(Path(__file__).parent.parent / "weights/tinyworld")
n_layer, n_head = model.config.n_layer, model.config.n_head


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def plain(array: mx.array) -> Any:
    """Convert an MLX array to Python numbers."""
    return array.tolist()


def word(i: int) -> str:
    return repr(tokenizer.decode([i]))


def bar(value: float, scale: float = 1.5) -> str:
    """Draw a number as a bar, to the left of a line if it is negative."""
    length = "█" * round(abs(value) * scale)
    return f"{length:>16}│" if value < 0 else f"{'':16}│{length}"


title("1. A text, and the token that we follow")

# Stories of this small world introduce an object, and then a friend comes: "Her brother ...", "His sister ...".
TEXT = "One sunny morning, Lily went to the garden. She was kind. Lily had a red kite."
ids = tokenizer.encode(TEXT)
logits, activations = trace(model, [ids])  # (B, T, V), and every activation by its name
likely = mx.argsort(-logits[0, -1])
HER, LILY = (tokenizer.encode(text)[0] for text in (" Her", " Lily"))

print(f"{TEXT}\n{len(ids)} tokens; the last is {word(ids[-1])}. From its vector the next token is predicted:")
probabilities = mx.softmax(logits[0, -1])
for i in plain(likely[:3]):
    print(f"{word(i):>12} {plain(probabilities[i]):8.2%}")
print(f"\nThe trace holds {len(activations)} activations, such as")
for name in ("hook_embed", "blocks.3.attn.hook_pattern", "blocks.3.hook_resid_post"):
    print(f"    {name:<28}{activations[name].shape}")

title("2. The stream is a sum: the embedding, the position, and what 6 blocks add")

parts, labels = decompose_resid(model, activations)  # (N, B, T, C): embed, pos_embed, 0_attn_out, 0_mlp_out, ...
parts = parts[:, 0, -1]  # those of the last token: (N, C)
sums = mx.cumsum(parts, axis=0)  # the stream after each part
final = activations[f"blocks.{n_layer - 1}.hook_resid_post"][0, -1]  # (C,)
print("part           length   of the sum   direction of the sum and of the final vector (cosine)")
for label, part, x in zip(labels, parts, sums, strict=True):
    cosine = plain((x @ final) / (mx.linalg.norm(x) * mx.linalg.norm(final)))
    print(f"{label:<12} {plain(mx.linalg.norm(part)):8.1f} {plain(mx.linalg.norm(x)):12.1f}   {cosine:6.2f}")
error = plain(mx.abs(sums[-1] - final).max())
print(f"The sum of all parts and the last block's output: largest difference {error:.1e}")

title("3. The logit lens: what would the model say if it stopped here?")

# The final norm and the head are applied to the unfinished stream. It starts with the token itself, for the head
# reads with the vectors of the embedding. Block by block "what am I?" turns into "what comes next?"
top, logprobs = logit_lens_top(model, activations, k=3)  # (n_layer + 1, B, T, k)
for layer in range(n_layer + 1):
    found = zip(plain(top[layer, 0, -1]), plain(mx.exp(logprobs[layer, 0, -1])), strict=True)
    cells = [f"{word(i):>8} {p:4.0%}" for i, p in found if p > 0.005]
    print(f"{f'after block {layer - 1}' if layer else 'at the start':<13}", *cells)

title("4. Who did it? What each part adds to the logit of ' Her', less that of ' Lily'")

# ' Lily' would begin a sentence of the story's next part. The final norm is linear at the scale of this text, so the
# difference of the two logits is a sum over the parts too: direct logit attribution.
direction = logit_direction(model, HER, LILY)  # (C,)
values, labels = logit_attribution(model, activations, direction)  # (N, B, T)
for label, value in zip(labels, plain(values[:, 0, -1]), strict=True):
    print(f"{label:<14} {value:6.2f} {bar(value)}")
difference = plain(logits[0, -1, HER] - logits[0, -1, LILY])
total = plain(values[:, 0, -1].sum())
print(f"{'sum':<14} {total:6.2f}     the model's logits: {difference:.2f}")

if not abs(total - difference) < 1e-3:
    raise SystemExit("The parts do not sum to the whole, which is a bug.")

title("5. By head: what each adds itself, and what is lost without it")

# The MLPs above write ' Her', but each sees this token only: that it is time for a friend must have come from another
# token, by attention. So we take a head's vector out at this token, and let everything above it compute anew.
values, labels = logit_attribution(model, activations, direction, by="head")
adds = dict(zip(labels, plain(values[:, 0, -1]), strict=True))


def difference_without(layer: int, head: int) -> float:
    def without_head(z: mx.array, name: str) -> mx.array:  # (B, T, H, D)
        z[:, -1, head] = 0
        return z

    logits, _ = trace(model, [ids], {f"blocks.{layer}.attn.hook_z": without_head}, names=())
    return plain(logits[0, -1, HER] - logits[0, -1, LILY])


heads = [(layer, head) for layer in range(n_layer) for head in range(n_head)]
lost = {f"L{layer}H{head}": difference - difference_without(layer, head) for layer, head in heads}
print("head   adds itself   lost without it")
for name, value in lost.items():
    print(f"{name} {adds[name]:13.2f} {value:17.2f} {bar(value, 0.75)}")

strongest = max(lost, key=lambda name: lost[name])
layer, head = map(int, strongest[1:].split("H"))
row = activations[f"blocks.{layer}.attn.hook_pattern"][0, head, -1]  # (T,)
seen = plain(row.argmax())
print(
    f"\n{strongest} gives {plain(row[seen]):.1%} of its attention to {word(ids[seen])}: the object has been introduced."
)
print("What else does this head do, and what becomes of the stories without it? Next: examples/04_heads.py")
