"""Faster products and kernels for MLX's CPU backend on Linux."""
