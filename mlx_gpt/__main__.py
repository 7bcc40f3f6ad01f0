"""Run ``mlx-gpt`` as ``python -m mlx_gpt``."""

from mlx_gpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
