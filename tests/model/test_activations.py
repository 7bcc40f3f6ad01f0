"""Every activation function of transformers is computed as its formula says, and has its gradient."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_gpt.check import reference
from mlx_gpt.config import ACTIVATIONS, GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.mlp import ACTIVATION
from mlx_gpt.model.quantize import quantize

X = np.concatenate([np.linspace(-12, 12, 4001) + 1e-3, [-80, -30, 30, 80]])  # beside the kinks


def test_the_table_the_reference_and_the_configuration_know_the_same_names() -> None:
    assert {*ACTIVATIONS} == ACTIVATION.keys() == reference.ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_those_of_the_float64_formula(name: str) -> None:
    x, activation, formula = mx.array(X, mx.float32), ACTIVATION[name], reference.ACTIVATIONS[name]
    np.testing.assert_allclose(np.array(activation(x)), formula(np.array(x, np.float64)), rtol=2e-6, atol=1e-6)
    small = x[:4001]
    slope = np.array(mx.grad(lambda x: activation(x).sum())(small))
    at, step = np.array(small, np.float64), 1e-6
    np.testing.assert_allclose(slope, (formula(at + step) - formula(at - step)) / (2 * step), rtol=1e-4, atol=3e-6)
    assert ACTIVATION[name](x.astype(mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parity
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_those_of_transformers(name: str) -> None:
    torch, activations = pytest.importorskip("torch"), pytest.importorskip("transformers.activations")
    theirs = torch.tensor(np.append(X, 0.0), requires_grad=True)
    expected = activations.ACT2FN[name](theirs)
    expected.sum().backward()
    x, activation = mx.array(np.append(X, 0.0), mx.float32), ACTIVATION[name]
    np.testing.assert_allclose(np.array(activation(x)), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    slope = np.array(mx.grad(lambda x: activation(x).sum())(x))
    np.testing.assert_allclose(slope, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_every_activation_of_transformers_without_weights_is_known() -> None:
    pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    weights = {name: [*activations.ACT2FN[name].parameters()] for name in activations.ACT2CLS}
    assert [name for name in weights if not weights[name] and name not in ACTIVATIONS] == []


@pytest.mark.parametrize("name", ["relu2", "gelu_pytorch_tanh", "mish"])
def test_a_model_of_any_activation_trains_and_can_be_quantized(name: str) -> None:
    mx.random.seed(0)
    model = GPT(GPTConfig(64, 8, 64, 1, 2, activation_function=name))
    x = mx.random.randint(0, 64, (2, 8))
    loss, gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())(x)
    assert np.isfinite(loss.item())
    assert mx.abs(gradients["h"][0]["mlp"]["c_fc"]["weight"]).max().item() > 0
    expected = model(x)
    assert mx.abs(quantize(model, 8)(x) - expected).max().item() < 0.05 * mx.abs(expected).max().item()
