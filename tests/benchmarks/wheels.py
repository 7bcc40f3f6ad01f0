"""Ask the resolver whether each dependency and extra has wheels for macOS 14 on arm64, on Python 3.10 to 3.14.

    pip install uv && python tests/benchmarks/wheels.py

Resolves for the target's markers, with wheels only, and prints a table for ``tests/README.md``. Needs the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
YES = "yes"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OPTIONS = ("--quiet", "--no-header", "--only-binary", ":all:", "--python-platform", "aarch64-apple-darwin")


def requirements() -> dict[str, list[str]]:
    """Return the requirements of the package, under "no extra", and of each extra without those of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: [line for line in lines if not line.startswith(project["name"])]
        for name, lines in project["optional-dependencies"].items()
    }
    return {"no extra": project["dependencies"], **extras}


def resolve(lines: str, python: str) -> str:
    """Return ``YES``, or what the resolver says."""
    command = ["uv", "pip", "compile", "-", "--python-version", python, *OPTIONS]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True)
    return YES if done.returncode == 0 else " ".join(done.stderr.split())


def main() -> None:
    print(f"| | {' | '.join(PYTHONS)} |\n{'|---' * (1 + len(PYTHONS))}|")
    for extra, lines in requirements().items():
        answers = {python: resolve("\n".join(lines), python) for python in PYTHONS}
        print(f"| {extra} | {' | '.join('yes' if one == YES else '**no**' for one in answers.values())} |", flush=True)
        for python, answer in answers.items():
            if answer != YES:
                print(f"{extra}, {python}: {answer}", file=sys.stderr)


if __name__ == "__main__":
    main()
