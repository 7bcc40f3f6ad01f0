"""On other systems than Linux nothing of ``linux_cpu`` is used, and the model is MLX's own operations."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.command_line import ROOT, environment

CODE = """
import sys
sys.platform = "PLATFORM"
import mlx_gpt, mlx.core as mx, mlx.optimizers as optim
from mlx_gpt.model import ops
from mlx_gpt.train.config import TrainConfig
from mlx_gpt.train.step import make_train_step

mx.set_default_device(mx.cpu)
mx.random.seed(0)
model = mlx_gpt.GPT(mlx_gpt.GPTConfig(64, n_positions=16, n_embd=16, n_layer=2, n_head=2))
ids = mx.array([[1, 2, 3, 4, 5]] * 4)
step, state = make_train_step(model, optim.SGD(0.1), TrainConfig(batch_size=4))
for _ in range(2):
    loss, norm = step(ids[:, :-1], ids[:, 1:])
    mx.eval(loss, norm, state)
model.eval()
print(round(loss.item(), 4), model(ids).shape, ops.custom_kernels(mx.float32))
print(sorted(name for name in sys.modules if name.startswith("mlx_gpt.linux_cpu")))
"""


def run(platform: str) -> list[str]:
    code = CODE.replace("PLATFORM", platform)
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with Linux")
def test_elsewhere_nothing_of_linux_cpu_is_imported_and_the_loss_is_the_same() -> None:
    (result, modules), (linux_result, linux_modules) = run("darwin"), run("linux")
    assert modules == "[]"
    assert "mlx_gpt.linux_cpu.kernels" in linux_modules
    assert result == linux_result.replace("True", "False")
