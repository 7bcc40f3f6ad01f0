"""Settings that must stand before MLX is imported."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # products in full fp32 on M5 and CUDA too: tolerances here are fp32's
