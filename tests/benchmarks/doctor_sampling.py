"""Simulate the thresholds of the doctor's sampling checks: ``python tests/benchmarks/doctor_sampling.py [calls]``.

Draws that follow a rule are tested against it: the smallest p-value and the largest e-value of many healthy sets of
draws stand beside the thresholds in ``sampling/fit.py``.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np

from mlx_gpt.check.doctor.sampling.draws import Draws
from mlx_gpt.check.doctor.sampling.fit import misfit, repeats
from mlx_gpt.check.doctor.sampling.rules import Base


def healthy_draws(rng: np.random.Generator, V: int, scale: float, calls: int, n: int) -> list[Draws]:
    found = []
    for _ in range(calls):
        logits = (rng.normal(size=(n, V)) * scale).astype(np.float32)
        ids = (logits + rng.gumbel(size=(n, V))).argmax(axis=1)
        found.append(Draws(ids, 0, logits))
    return found


def main(trials: int) -> None:
    rng = np.random.default_rng(0)
    print("V      scale  calls x n   p < 1e-2  p < 1e-3  p < 1e-4  least p    most nats of repeated noise")
    for V in (2, 31, 300):
        for scale in (0.1, 1.0, 5.0):
            for calls, n in ((12, 10), (40, 10), (130, 3), (1, 60)):
                p, nats = [], []
                for _ in range(trials):
                    found = healthy_draws(rng, V, scale, calls, n)
                    p.append(misfit(SimpleNamespace(rng=rng), found, Base().rule())[0])  # type: ignore[arg-type]
                    nats.append(repeats(found, Base().rule()))
                below = "  ".join(f"{np.mean(np.array(p) < limit):8.1e}" for limit in (1e-2, 1e-3, 1e-4))
                print(f"{V:<6} {scale:<6} {calls:>3} x {n:<6} {below}  {min(p):.1e}    {max(nats):.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
