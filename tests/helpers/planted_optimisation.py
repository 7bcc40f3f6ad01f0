"""Faults of loss, gradient and step to plant in a small GPT, and healthy ways to train that must have no fault."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .planted import Base, Given, Planted

Loss = Callable[[mx.array, mx.array], mx.array]  # logits (B, T, V), targets (B, T)
Tree = dict[str, Any]
RATE = 3e-3


def cross_entropy(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="mean")


def costs(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, reduction="none")


def adam(rate: Any = RATE, **settings: Any) -> Callable[[], Any]:
    return lambda: optim.AdamW(rate, **{"weight_decay": 0.0, "bias_correction": True, **settings})


def trained_with(
    base: Base,
    loss: Loss = cross_entropy,
    optimizer: Callable[[], Any] | None = None,
    *,
    batch: Callable[[Any, Any], tuple[Any, Any]] = lambda x, y: (x, y),
    change: Callable[[Tree], Tree] = lambda grads: grads,
    after: Callable[[Any], None] = lambda model: None,
    gradients: Callable[[Any, mx.array, mx.array], tuple[mx.array, Tree]] | None = None,
    dropout: bool = True,
    **given: Any,
) -> Given:
    """Return the arguments of examine for a loss and a step of one's own.

    It trains on ``batch(x, y)``, applies ``change`` to the gradients (a flat dict), and ends with ``after(model)``.
    """
    model = base.model
    value_and_grad = nn.value_and_grad(model, lambda x, y: loss(model(x), y))

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        return dict(tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1]))

    def new_step() -> Callable[[Any, Any], float]:
        its = (optimizer or adam())()

        def step(x: Any, y: Any) -> float:
            x, y = batch(x, y)
            model.train(dropout)
            if gradients is None:
                value, grads = value_and_grad(mx.array(x), mx.array(y))
            else:
                value, grads = gradients(value_and_grad, mx.array(x), mx.array(y))
            its.update(model, tree_unflatten(list(change(dict(tree_flatten(grads))).items())))
            after(model)
            mx.eval(model.parameters(), its.state, value)
            model.train(False)
            return float(value.item())

        return step

    return base.arguments(
        loss=lambda x, y: loss(model(mx.array(x)), mx.array(y)).item(),
        gradient=gradient,
        new_step=new_step,
        step=new_step(),
        parameters=lambda: {name: mx.array(value) for name, value in tree_flatten(model.parameters())},
        load_parameters=lambda values: model.update(tree_unflatten(list(values.items()))),
        **{"learning_rate": RATE, **given},
    )


# Losses -------------------------------------------------------------------------------------------------------------


def squared_error(logits: mx.array, y: mx.array) -> mx.array:
    return mx.square(mx.softmax(logits, axis=-1) - (mx.arange(logits.shape[-1]) == y[..., None])).sum(-1).mean()


def smoothed(logits: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits, y, label_smoothing=0.1, reduction="mean")


def masked_over_all(logits: mx.array, y: mx.array) -> mx.array:
    return (costs(logits, mx.maximum(y, 0)) * (y >= 0)).mean()


def masked(logits: mx.array, y: mx.array) -> mx.array:
    return (costs(logits, mx.maximum(y, 0)) * (y >= 0)).sum() / (y >= 0).sum()


def with_z_loss(logits: mx.array, y: mx.array) -> mx.array:
    return cross_entropy(logits, y) + 1e-3 * mx.square(mx.logsumexp(logits, axis=-1)).mean()


def padded_batches(base: Base) -> Callable[[], Any]:
    def batches() -> Any:
        for x, y in base.batches():
            y = y.copy()
            y[:, : y.shape[1] // 3] = -1
            yield x, y

    return batches


LOSSES: dict[str, tuple[str, Loss]] = {
    "squared error": ("loss-not-cross-entropy", squared_error),
    "softmax twice": ("loss-not-cross-entropy", lambda l, y: cross_entropy(mx.softmax(l, axis=-1), y)),
    "label smoothing": ("loss-not-cross-entropy", smoothed),
    "softmax over time": ("loss-not-cross-entropy", lambda l, y: -take(l - mx.logsumexp(l, axis=1, keepdims=True), y)),
    "softmax over the batch": (
        "loss-not-cross-entropy",
        lambda l, y: -take(l - mx.logsumexp(l, axis=0, keepdims=True), y),
    ),
    "targets transposed": (
        "loss-not-cross-entropy",
        lambda l, y: cross_entropy(l.reshape(-1, l.shape[-1]), y.T.reshape(-1)),
    ),
    "bits": ("loss-not-cross-entropy", lambda l, y: cross_entropy(l, y) / np.log(2)),
    "focal": ("loss-not-cross-entropy", lambda l, y: (mx.square(1 - mx.exp(-costs(l, y))) * costs(l, y)).mean()),
    "probability": ("loss-not-cross-entropy", lambda l, y: -take(mx.softmax(l, axis=-1), y)),
    "logit": ("loss-not-cross-entropy", lambda l, y: -take(l, y)),
    "a sum": ("loss-not-the-mean", lambda l, y: costs(l, y).sum()),
    "a sum over time": ("loss-not-the-mean", lambda l, y: costs(l, y).sum(1).mean()),
    "a sum over rows": ("loss-not-the-mean", lambda l, y: costs(l, y).mean(1).sum()),
    "the last position": ("loss-not-the-mean", lambda l, y: costs(l, y)[:, -1].mean()),
    "the first row": ("loss-not-the-mean", lambda l, y: costs(l, y)[0].mean()),
    "mean over the vocabulary": ("loss-not-the-mean", lambda l, y: costs(l, y).mean() / l.shape[-1]),
}


def take(logprobs: mx.array, y: mx.array) -> mx.array:
    return mx.take_along_axis(logprobs, y[..., None], axis=-1).mean()


FAULTS: dict[str, Planted] = {
    name: Planted(code, lambda base, loss=loss: trained_with(base, loss)) for name, (code, loss) in LOSSES.items()
}
FAULTS["mask counted"] = Planted(
    "loss-not-the-mean", lambda base: trained_with(base, masked_over_all, batches=padded_batches(base))
)

# Steps --------------------------------------------------------------------------------------------------------------


def only(part: str) -> Callable[[Tree], Tree]:
    """Apply the update to the parameters without ``part`` in their name: the optimizer does not know the others."""
    return lambda grads: {name: grad for name, grad in grads.items() if part not in name}


def accumulated(count: int, scale: float, kept: int | None = None, rows: int = 0) -> Any:
    """Return gradients of a batch in ``count`` parts or some rows, added up and multiplied; or of one part alone."""

    def gradients(value_and_grad: Any, x: mx.array, y: mx.array) -> tuple[mx.array, Tree]:
        n = rows or max(len(x) // count, 1)
        parts = [value_and_grad(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]
        if kept is not None:
            return parts[kept]
        total = parts[0][1]
        for _, grads in parts[1:]:
            total = tree_map(lambda a, b: a + b, total, grads)
        return parts[-1][0], tree_map(lambda g: g * scale, total)

    return gradients


def step_alone(given: Given) -> Given:
    return {name: value for name, value in given.items() if name != "new_step"}


def over_calls(base: Base, clear: bool, calls: int = 4) -> Given:
    """Return a step of which each call adds a micro-batch, and every fourth one updates the parameters."""
    given, model = trained_with(base), base.model

    def new_step() -> Callable[[Any, Any], float]:
        its, sums, count = adam()(), {}, [0]

        def step(x: Any, y: Any) -> float:
            if clear:
                sums.clear()
            sums.update({name: sums.get(name, 0) + grad / calls for name, grad in given["gradient"](x, y).items()})
            count[0] += 1
            if count[0] % calls == 0:
                its.update(model, tree_unflatten(list(sums.items())))
                sums.clear()
            mx.eval(model.parameters(), its.state)
            return given["loss"](x, y)

        return step

    return {**given, "new_step": new_step, "step": new_step()}


def gradient_in_parts(base: Base, kept: int | None = None) -> Given:
    """Return a gradient of micro-batches of two rows: their sum, or that of one."""
    given = trained_with(base)

    def gradient(x: Any, y: Any) -> Tree:
        parts = [given["gradient"](x[i : i + 2], y[i : i + 2]) for i in range(0, len(x), 2)]
        return {name: sum(part[name] for part in parts) for name in parts[0]} if kept is None else parts[kept]

    return {**given, "gradient": gradient}


def by_rows(rows: int) -> Any:
    """Return gradients of micro-batches of some rows, added up and not divided."""

    def gradients(value_and_grad: Any, x: mx.array, y: mx.array) -> tuple[mx.array, Tree]:
        return accumulated(1, 1.0, rows=rows)(value_and_grad, x, y)

    return gradients


def never_cleared(optimizer: Callable[[], Any], each: bool) -> Callable[[Base], Given]:
    """Add each step's gradients to those before it: of one optimizer, or of all that there were."""

    def adding() -> Callable[[Tree], Tree]:
        sums: Tree = {}

        def change(grads: Tree) -> Tree:
            sums.update({name: sums.get(name, 0) + grad for name, grad in grads.items()})
            return dict(sums)

        return change

    def plant(base: Base) -> Given:
        if not each:
            return trained_with(base, optimizer=optimizer, change=adding())
        return trained_with(base) | {
            "new_step": lambda: trained_with(base, optimizer=optimizer, change=adding())["new_step"]()
        }

    return plant


def sgd(rate: float = RATE, **settings: Any) -> Callable[[], Any]:
    return lambda: optim.SGD(rate, **settings)


def copy_trained(base: Base) -> Given:
    """Return a step that computes a loss, and its update on a copy of the parameters."""
    given = trained_with(base)
    return {**given, "new_step": lambda: given["loss"], "step": given["loss"]}


FAULTS.update(
    {
        "update not applied": Planted("step-without-effect", copy_trained),
        "rate of 0": Planted("step-without-effect", lambda base: trained_with(base, optimizer=adam(0.0))),
        "optimizer without the embeddings": Planted(
            "parameters-frozen", lambda base: trained_with(base, change=only("wte"))
        ),
        "optimizer without the attention": Planted(
            "parameters-frozen", lambda base: trained_with(base, change=only("attention"))
        ),
        "optimizer without the norms": Planted(
            "parameters-frozen", lambda base: trained_with(base, change=only("ln_"))
        ),
        "no bias correction": Planted(
            "no-bias-correction", lambda base: trained_with(base, optimizer=adam(bias_correction=False))
        ),
        "no bias correction, AdamW of 0.9 and 0.99": Planted(
            "no-bias-correction",
            lambda base: trained_with(base, optimizer=adam(bias_correction=False, betas=[0.9, 0.99], weight_decay=0.1)),
        ),
        "parts not divided": Planted(
            "accumulation-differs", lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(4, 1.0))
        ),
        "parts of two rows not divided": Planted(
            "accumulation-differs", lambda base: trained_with(base, optimizer=sgd(), gradients=by_rows(2))
        ),
        "gradients never cleared": Planted("accumulation-differs", never_cleared(adam(), each=True)),
        "gradients never cleared, momentum": Planted(
            "accumulation-differs", never_cleared(sgd(momentum=0.9), each=True)
        ),
        "gradients never cleared, descent": Planted(
            "accumulation-differs", never_cleared(sgd(), each=True), sizes=(0,)
        ),
        "gradients left over": Planted("accumulation-differs", never_cleared(adam(), each=False)),
        "gradients left over, descent": Planted("accumulation-differs", never_cleared(sgd(), each=False)),
        "only the last part": Planted(
            "accumulation-differs",
            lambda base: trained_with(base, gradients=accumulated(2, 1.0, kept=-1), dropout=False),
        ),
        "only the last part, with dropout": Planted(
            "accumulation-differs",
            lambda base: trained_with(base.with_faults(dropout=0.1), gradients=accumulated(2, 1.0, kept=-1)),
        ),
        "only the first part, step alone": Planted(
            "accumulation-differs", lambda base: step_alone(trained_with(base, gradients=accumulated(4, 1.0, kept=0)))
        ),
        "only the last call": Planted("accumulation-differs", lambda base: over_calls(base, clear=True)),
        "only the last call, step alone": Planted(
            "accumulation-differs", lambda base: step_alone(over_calls(base, clear=True))
        ),
        "parts of three rows": Planted(
            "accumulation-differs",
            lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(2, 1 / 3, rows=3)),
            sizes=(0, 2),  # without dropout
        ),
        "parts not divided, no gradient": Planted(
            "accumulation-differs",
            lambda base: trained_with(base, optimizer=sgd(), gradients=accumulated(4, 1.0)) | {"gradient": None},
            sizes=(0, 2),
        ),
        "gradients never cleared, Lion": Planted(
            "accumulation-differs", never_cleared(lambda: optim.Lion(RATE), each=True)
        ),
        "gradients never cleared, Lion, dropout": Planted(
            "accumulation-differs",
            lambda base: never_cleared(lambda: optim.Lion(RATE), each=True)(base.with_faults(dropout=0.1)),
        ),
        "gradients left over, Lion": Planted(
            "accumulation-differs", never_cleared(lambda: optim.Lion(RATE), each=False)
        ),
        "gradient of the last part": Planted("accumulation-differs", lambda base: gradient_in_parts(base, kept=-1)),
        "gradient of the first part": Planted("accumulation-differs", lambda base: gradient_in_parts(base, kept=0)),
        "gradient not divided": Planted("accumulation-differs", lambda base: gradient_in_parts(base)),
    }
)


def on_another_batch(base: Base) -> Given:
    """Return a step that trains on the same other batch at each call."""
    *_, other = islice(base.batches(8), 5)
    return trained_with(base, batch=lambda x, y: other)


def decay_of(decay: float) -> Callable[[Base], Given]:
    return lambda base: trained_with(base, optimizer=adam(weight_decay=decay), metrics=None)


def rate_of(rate: float, optimizer: Any = adam) -> Callable[[Base], Given]:
    return lambda base: trained_with(base, optimizer=optimizer(rate), learning_rate=rate, metrics=None)


FAULTS.update(
    {
        "Adam at 1": Planted("learning-rate-too-high", rate_of(1.0)),
        "Adam at 0.3": Planted("learning-rate-too-high", rate_of(0.3)),
        "descent at 30": Planted("learning-rate-too-high", rate_of(30.0, sgd)),
        "Adam at 1e-8": Planted("learning-rate-too-low", rate_of(1e-8)),
        "Adam at 1e-7": Planted("learning-rate-too-low", rate_of(1e-7), states=(False,)),
        "descent at 1e-6": Planted("learning-rate-too-low", rate_of(1e-6, sgd)),
        "ascent": Planted(
            "cannot-memorise-a-batch", lambda base: trained_with(base, change=lambda g: {k: -v for k, v in g.items()})
        ),
        "another batch": Planted("cannot-memorise-a-batch", on_another_batch),
        "decay of 30": Planted("cannot-memorise-a-batch", decay_of(30.0)),
        "decay of 100": Planted("cannot-memorise-a-batch", decay_of(100.0)),
        "decay of 1000": Planted("cannot-memorise-a-batch", decay_of(1000.0)),
    }
)


def large_weights(names: str) -> Callable[[Base], Given]:
    """Draw initial weights with standard deviation 1."""

    def plant(base: Base) -> Given:
        drawn = {
            name: mx.random.normal(value.shape, key=mx.random.key(base.seed))
            for name, value in tree_flatten(base.model.parameters())
            if value.ndim > 1 and names in name
        }
        base.model.update(tree_unflatten(list(drawn.items())))
        return trained_with(base)

    return plant


def first_loss_of(loss: float) -> Callable[[Base], Given]:
    return lambda base: base.arguments(metrics=[{"step": 0, "loss": loss}, {"step": 20, "loss": 3.0}])


def modes_alike(base: Base) -> Given:
    given = trained_with(base)
    return {**given, "forward_training": given["forward"]}


FAULTS.update(
    {
        "embeddings of 1": Planted("initial-loss-off", large_weights("wte"), (False,), sizes=(0, 1)),  # tied
        "weights of 1": Planted("initial-loss-off", large_weights(""), states=(False,)),
        "a first loss of 60": Planted("initial-loss-off", first_loss_of(60.0)),
        "modes alike": Planted("training-mode-without-dropout-effect", modes_alike),
    }
)


# Gradients ----------------------------------------------------------------------------------------------------------


def gradient_of(base: Base, *faults: str, stop: str = "") -> Given:
    """Return the gradient of the same weights with faults of PlainGPT's, or with a part of the attention cut off."""
    given, model = trained_with(base), base.model

    def loss(x: mx.array, y: mx.array) -> mx.array:
        return cross_entropy(model(x), y)

    value_and_grad = nn.value_and_grad(model, loss)

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        softmax, layers = mx.softmax, [block.attention for block in model.blocks]
        kept = [layer.faults for layer in layers]
        mx.softmax = (lambda a, **settings: mx.stop_gradient(softmax(a, **settings))) if stop else softmax
        try:
            for layer in layers:
                layer.faults = {*layer.faults, *faults}
            grads = dict(tree_flatten(value_and_grad(mx.array(x), mx.array(y))[1]))
        finally:
            mx.softmax = softmax
            for layer, before in zip(layers, kept, strict=True):
                layer.faults = before
        return grads

    return {**given, "gradient": gradient}


def flattened(base: Base) -> Given:
    """Return a gradient of which one matrix is transposed."""
    given = trained_with(base)

    def gradient(x: Any, y: Any) -> dict[str, mx.array]:
        grads = given["gradient"](x, y)
        name = "blocks.0.attention.out.weight"
        return {**grads, name: grads[name].T}

    return {**given, "gradient": gradient}


FAULTS.update(
    {
        "no mask in the gradient": Planted("future-leak-in-gradient", lambda base: gradient_of(base, "no-mask")),
        "one token of the future in the gradient": Planted(
            "future-leak-in-gradient", lambda base: gradient_of(base, "mask-shifted")
        ),
        "attention's pattern cut off": Planted(
            "future-leak-in-gradient", lambda base: gradient_of(base, stop="pattern")
        ),
        "a matrix's gradient transposed": Planted("future-leak-in-gradient", flattened),
    }
)


def muon() -> Any:
    return optim.MultiOptimizer([optim.Muon(0.01), adam()()], [lambda name, p: p.ndim == 2 and "blocks" in name])


def clipped(grads: Tree) -> Tree:
    return optim.clip_grad_norm(grads, 0.1)[0]


def embeddings_frozen(base: Base) -> Given:
    """Return a model whose embeddings are frozen on purpose, so that gradient leaves them out."""
    base.model.wte.freeze()
    return trained_with(base)


def warmup(base: Base) -> Given:
    return trained_with(base, optimizer=adam(optim.linear_schedule(0, RATE, 50)))


HEALTHY: dict[str, Callable[[Base], Given]] = {
    "plain": lambda base: trained_with(base),
    "z-loss": lambda base: trained_with(base, with_z_loss),
    "1.5 times": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) * 1.5),
    "perplexity": lambda base: (
        trained_with(base, loss=cross_entropy)
        | {"loss": lambda x, y: mx.exp(cross_entropy(base.model(mx.array(x)), mx.array(y))).item()}
    ),
    "masked": lambda base: trained_with(base, masked, batches=padded_batches(base)),
    "a quarter": lambda base: trained_with(base, lambda l, y: cross_entropy(l, y) / 4),
    "ignores id 0": lambda base: trained_with(base, lambda l, y: (costs(l, y) * (y != 0)).sum() / (y != 0).sum()),
    "without the last": lambda base: trained_with(base, lambda l, y: cross_entropy(l[:, :-1], y[:, :-1])),
    "shifts itself": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l[:, :-1], y[:, 1:]), batches=lambda: ((x, x) for x, _ in base.batches())
    ),
    "in bfloat16": lambda base: trained_with(
        base, lambda l, y: cross_entropy(l.astype(mx.bfloat16), y).astype(mx.float32)
    ),
    "gradient descent": lambda base: trained_with(base, optimizer=sgd(0.1), learning_rate=0.1),
    "gradient descent, momentum": lambda base: trained_with(
        base, optimizer=sgd(0.1, momentum=0.9, nesterov=True), learning_rate=0.1
    ),
    "Adam": lambda base: trained_with(base, optimizer=lambda: optim.Adam(RATE, bias_correction=True)),
    "AdamW, decay": lambda base: trained_with(base, optimizer=adam(weight_decay=0.1)),
    "Adam, 0.9 and 0.95, uncorrected": lambda base: trained_with(
        base, optimizer=adam(betas=[0.9, 0.95], bias_correction=False)
    ),
    "Lion": lambda base: trained_with(base, optimizer=lambda: optim.Lion(3e-4), learning_rate=3e-4),
    "Muon": lambda base: trained_with(base, optimizer=muon, learning_rate=0.01),
    "Adafactor": lambda base: trained_with(base, optimizer=lambda: optim.Adafactor()),
    "clipped": lambda base: trained_with(base, change=clipped),
    "clipped descent": lambda base: trained_with(base, optimizer=sgd(0.1), change=clipped, learning_rate=0.1),
    "warmup": warmup,
    "accumulated": lambda base: trained_with(base, gradients=accumulated(4, 0.25)),
    "descent, accumulated": lambda base: trained_with(
        base, optimizer=sgd(0.1), gradients=accumulated(4, 0.25), learning_rate=0.1
    ),
    "small rate": lambda base: trained_with(base, optimizer=adam(1e-4), learning_rate=1e-4),
    "large rate": lambda base: trained_with(base, optimizer=adam(1e-2), learning_rate=1e-2),
    "step alone": lambda base: step_alone(trained_with(base)),
    "step alone, accumulated over calls": lambda base: step_alone(over_calls(base, clear=False)),
    "accumulated over calls": lambda base: over_calls(base, clear=False),
    "embeddings frozen": embeddings_frozen,
}
