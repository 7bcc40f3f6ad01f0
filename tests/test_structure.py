"""The structure: what a file may import, what importing may do, what the repository may hold."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_gpt"
FILES = sorted(PACKAGE.rglob("*.py"))

README = (ROOT / "README.md").read_text(encoding="utf-8")


def layers(readme: str) -> list[list[str]]:
    """The layers of the package as the README shows them, from the command line down to the configuration."""
    (block,) = re.findall(r"^```\n(cli\n.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return [line.split() for line in block.splitlines()]


LAYERS = layers(README)
RANK = {name: (depth, column) for depth, names in enumerate(LAYERS) for column, name in enumerate(names)}


def place(file: Path, package: Path = PACKAGE) -> str:
    """Where a file lives: ``mlx_gpt/model/gpt.py`` -> ``model/gpt``."""
    return file.relative_to(package).with_suffix("").as_posix()


def top(place: str) -> str:
    """The folder or top-level file that the README names: ``train/report/panel`` -> ``train``."""
    return place.partition("/")[0]


def rank(place: str) -> tuple[int, int]:
    """Its layer, from the top, and its column; the package's own ``__init__`` and ``__main__`` stand above all."""
    if place.startswith("__"):
        return (-1, 0)
    assert top(place) in RANK, f"mlx_gpt/{place}.py is in no layer: add {top(place)} to the layers in README.md"
    return RANK[top(place)]


def imports(file: Path, package: Path = PACKAGE) -> set[str]:
    """The places of this package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = [package.name, *file.relative_to(package).parts[:-1]]
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {target for name in names if (target := resolve(name, package))}
    return found


def resolve(name: str, package: Path) -> str | None:
    """The file that a dotted name means: ``mlx_gpt.model.gpt.GPT`` -> ``model/gpt``; None outside the package."""
    top, *path = name.split(".")
    if top != package.name:
        return None
    if path and (package / "/".join(path)).with_suffix(".py").is_file():
        return "/".join(path)
    if (package.joinpath(*path) / "__init__.py").is_file():
        return "/".join([*path, "__init__"])
    return resolve(".".join([top, *path[:-1]]), package) if path else "__init__"


def may_import(source: str, target: str) -> bool:
    """Downwards, to the right within a line, and inside a folder; never from the package's own ``__init__``."""
    if target == "__init__":
        return source in ("cli", "__main__")
    return top(source) == top(target) or rank(source) < rank(target)


def names_of(files: list[Path]) -> list[str]:
    return [place(file) for file in files]


# Layers


def test_the_readme_shows_nine_layers_and_every_folder_is_in_one() -> None:
    assert len(LAYERS) == 9
    assert {top(place(file)) for file in FILES} - {"__init__", "__main__"} <= RANK.keys()


@pytest.mark.parametrize("file", FILES, ids=names_of(FILES))
def test_a_file_imports_only_from_the_layers_below_it(file: Path) -> None:
    source = place(file)
    upward = sorted(target for target in imports(file) if not may_import(source, target))
    assert not upward, f"mlx_gpt/{source}.py may not import {', '.join(upward)}: not in a layer below it"


def test_inside_a_folder_no_imports_run_in_a_circle() -> None:
    below = {place(file): imports(file) for file in FILES}
    while leaves := [source for source, targets in below.items() if not targets & below.keys()]:
        for leaf in leaves:
            del below[leaf]
    assert not below, f"these import each other: {', '.join(below)}"


def test_training_never_imports_generation() -> None:
    trained_by = set().union(*(imports(file) for file in FILES if top(place(file)) == "train"))
    assert not [target for target in trained_by if top(target) == "generate"]


def test_the_model_knows_only_itself_its_configuration_and_its_backend() -> None:
    known = set().union(*(imports(file) for file in FILES if top(place(file)) == "model"))
    assert {target for target in known if top(target) != "model"} <= {
        *("activations", "config", "errors", "device", "linux_cpu/kernels")
    }


def test_only_four_files_and_a_command_import_what_linux_needs() -> None:
    users = {place(file) for file in FILES if any(top(target) == "linux_cpu" for target in imports(file))}
    users = {user for user in users if top(user) != "linux_cpu"}
    assert users == {"__init__", "cli", "model/ops", "train/gradient", "commands/train"}


def test_the_package_itself_imports_model_store_and_generate() -> None:
    opened = imports(PACKAGE / "__init__.py")
    assert {t for t in opened if top(t) not in ("model", "store", "generate")} <= {"config", "linux_cpu/__init__"}


@pytest.mark.parametrize(
    ("source", "line", "target"),
    [
        ("model/mlp", "from mlx_gpt.store.folder import load", "store/folder"),
        ("model/mlp", "import mlx_gpt.store.folder", "store/folder"),
        ("model/mlp", "from mlx_gpt.store import folder", "store/folder"),
        ("model/mlp", "from ..store.folder import load", "store/folder"),
        ("model/mlp", "def late():\n    from mlx_gpt.store import folder", "store/folder"),
        ("model/mlp", "from .attention import attend", "model/attention"),  # the same folder: allowed
        ("model/mlp", "import mlx_gpt", "__init__"),
        ("train/step", "from mlx_gpt.generate.generation import generate", "generate/generation"),  # to the left
    ],
)
def test_the_layers_test_sees_every_way_to_import(tmp_path: Path, source: str, line: str, target: str) -> None:
    package = tmp_path / "mlx_gpt"
    for where in ("__init__", "model/mlp", "model/attention", "store/__init__", "store/folder", "train/step"):
        (package / where).parent.mkdir(parents=True, exist_ok=True)
        (package / where).with_suffix(".py").touch()
    (package / "generate").mkdir()
    (package / "generate/generation.py").touch()
    file = (package / source).with_suffix(".py")
    file.write_text(line)
    assert imports(file, package) == {target}
    assert may_import(source, target) == (target == "model/attention")


def test_a_file_in_no_layer_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"mlx_gpt/attic.py is in no layer: add attic to the layers in README.md"):
        rank("attic")


def test_only_the_linux_switch_leads_to_what_linux_needs() -> None:
    """On a Mac nothing of ``linux_cpu`` is imported, whatever BLAS MLX's CPU backend has there."""
    switch = 'sys.platform.startswith("linux")'
    for file in FILES:
        if top(place(file)) == "linux_cpu":
            continue
        text = file.read_text(encoding="utf-8")
        for found in re.finditer(r"^( *)from mlx_gpt\.linux_cpu", text, re.MULTILINE):
            before = text[: found.start()].rpartition("\ndef ")[2] if found[1] else text[: found.start()][-200:]
            assert switch in before, f"{place(file)}: {found[0]}"


def test_only_the_thread_that_computes_uses_mlx_in_the_server() -> None:
    """``Engine.run`` calls ``Batch``; ``/health`` reads MLX's counters, which any thread may."""
    users = {place(file): file.read_text(encoding="utf-8") for file in FILES if top(place(file)) == "serve"}
    users = {name: text for name, text in users.items() if "import mlx" in text}
    assert users.keys() == {"serve/app", "serve/batch"}
    counters = {"mx.get_active_memory", "mx.get_cache_memory", "mx.get_peak_memory"}
    assert set(re.findall(r"\bmx\.\w+", users["serve/app"])) == counters


# Sizes


def lines_of_code(file: Path) -> int:
    """The lines of a file without blank lines, comments and docstrings."""
    with tokenize.open(file) as text:
        tokens = list(tokenize.generate_tokens(text.readline))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {line for token in tokens if token.type not in empty for line in range(token.start[0], token.end[0] + 1)}
    strings = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return len(code - {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)})


def test_the_path_from_ids_to_logits_is_under_300_lines_of_code() -> None:
    path = ("attention", "mlp", "block", "gpt")
    assert sum(lines_of_code(PACKAGE / f"model/{name}.py") for name in path) < 300


def test_the_model_is_under_600_lines() -> None:
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "model").glob("*.py")) < 600


def test_the_train_step_is_under_110_lines() -> None:
    assert len((PACKAGE / "train/step.py").read_text(encoding="utf-8").splitlines()) < 110


# Names


def test_no_two_public_classes_have_the_same_name() -> None:
    defined: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined.setdefault(node.name, []).append(f"mlx_gpt/{place(file)}.py")
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


# Importing


def test_importing_the_package_stays_cheap() -> None:
    heavy = ["matplotlib", "tokenizers", "huggingface_hub", "tiktoken", "torch", "transformers"]
    code = f"import sys, mlx_gpt; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the file is imported: all but the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from at_import(node)


@pytest.mark.parametrize("file", FILES, ids=names_of(FILES))
def test_importing_a_file_prints_nothing_and_does_not_read_the_environment(file: Path) -> None:
    for node in at_import(ast.parse(file.read_text(encoding="utf-8"))):
        prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        assert not prints, f"{place(file)}.py prints in line {node.lineno}"  # type: ignore[attr-defined]
        assert not reads, f"{place(file)}.py reads the environment in line {node.lineno}"  # type: ignore[attr-defined]


# The repository


@pytest.mark.parametrize("script", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_a_benchmark_imports_what_exists(script: Path) -> None:
    try:
        runpy.run_path(str(script), run_name="benchmark")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "mlx_lm"):
            raise
        pytest.skip(f"needs {error.name}: the parity extra")


A_DEVELOPERS_MACHINE = re.compile(r"(?<![\w.~-])/(?:(?:work|tmp)/|(?:home|Users)/[a-zA-Z])")


def tracked_text() -> dict[str, str]:
    """The text files under version control, by name."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts[name] = content.decode("utf-8", errors="replace")
    return texts


def test_no_file_names_a_place_on_a_developers_machine() -> None:
    found = {
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_text().items()
        for number, line in enumerate(text.splitlines(), 1)
        if A_DEVELOPERS_MACHINE.search(line)
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (("see ", "work", "main"), True),
        (("", "Users", "ada", "gpt"), True),
        (("path='", "home", "ada'"), True),
        (("", "tmp", "x"), True),
        (("https://example.com", "home", "ada"), False),
        ((".", "work", "x"), False),
        (("$TMPDIR", "tmp", "x"), False),
    ],
)
def test_a_developers_paths_are_told_from_addresses(parts: tuple[str, ...], found: bool) -> None:
    assert bool(A_DEVELOPERS_MACHINE.search("/".join(parts))) is found


def test_local_and_hosted_checks_run_one_script() -> None:
    if not (ROOT / ".github").exists():
        pytest.skip("the sdist has no .github")
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert workflow.rstrip().endswith("- run: .ci/check")
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        assert "timeout-minutes:" in file.read_text(encoding="utf-8"), file
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().endswith("\n.ci/check")
