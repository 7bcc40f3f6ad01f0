"""The Markdown files: their paths, commands, code and line counts are those of the repository."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gpt.cli import parse
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github/CONTRIBUTING.md"
FOLDERS = (".github", "examples", "mlx_gpt", "tests", "weights")
PAGES = [README, *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]

a_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
a_checkout = pytest.mark.skipif(not CONTRIBUTING.exists(), reason="the sdist has no .github and no .ci")


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced code blocks in a language; "" for those without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [content for found, content in fences if found == language]


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code(page: Path) -> Iterator[str]:
    """Every line of the shell blocks and every inline code span."""
    for block in blocks(page, "sh"):
        yield from block.splitlines()
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        yield span.replace(r"\|", "|")


# The shell --------------------------------------------------------------------------------------------------------


@a_page
def test_shell_blocks_have_no_comments_which_zsh_does_not_accept_at_its_prompt(page: Path) -> None:
    for block in blocks(page, "sh"):
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", block)
        assert not re.search(r"(^|\s)#", unquoted, re.MULTILINE), block


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the run that the pages resume."""
    for name in ("my", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.toml").write_text('data = "my.txt"\n')
    monkeypatch.chdir(tmp_path)


@a_page
@pytest.mark.usefixtures("runs")
def test_every_command_parses(page: Path) -> None:
    commands = [command for line in code(page) for command in re.findall(r"(?:^|\s)mlx-gpt (\w[^|&]*)", line)]
    for command in commands:
        arguments = shlex.split(command)
        if len(arguments) == 1 or "--help" in arguments:  # the command is only named
            continue
        try:
            parse(arguments)
        except (SystemExit, UsageError) as error:
            pytest.fail(f"mlx-gpt {command}: {error}")


@a_page
def test_a_test_that_a_command_selects_by_name_exists(page: Path) -> None:
    for line in code(page):
        for file, name in re.findall(r"(tests/\S+\.py) -k (\w+)", line):
            assert name in (ROOT / file).read_text(encoding="utf-8"), line


# Paths and code ---------------------------------------------------------------------------------------------------


@a_checkout
@a_page
def test_every_path_exists(page: Path) -> None:
    named = {
        path
        for span in code(page)
        for path in re.findall(r"(?<![\w./-])(?:(?:mlx_gpt|tests|examples|\.github|\.ci)/)[\w./*-]*", span)
    }
    missing = [path for path in sorted(named) if not any(ROOT.glob(path.rstrip("/.")))]
    assert not missing


@a_checkout
@a_page
def test_every_link_leads_to_a_file_and_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, heading = link.partition("#")
        if link.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", found).lower().replace(" ", "-") for found in headings], link


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    save(GPT(GPTConfig(vocab_size=257, n_embd=12, n_layer=4, n_head=6)), Tokenizer.bytes(), tmp_path / "model")
    exec(compile(example.replace("openai-community/gpt2", "./model"), "README.md", "exec"), {})
    assert (tmp_path / "weights/copy/model.safetensors").exists()


@a_page
def test_the_imports_of_one_line_programs_resolve(page: Path) -> None:
    for line in code(page):
        for program in re.findall(r'python -c "([^"]+)"', line):
            exec("\n".join(part for part in program.split("; ") if "import" in part), {})


@a_page
def test_interactive_sessions_print_what_the_page_shows(page: Path) -> None:
    for block in blocks(page, ""):
        session = doctest.DocTestParser().get_doctest(block, {}, page.name, str(page), 0)
        assert doctest.DocTestRunner(verbose=False).run(session).failed == 0


# The README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_the_readme_has_a_command_for_the_tests() -> None:
    """``.ci/check`` runs it."""
    assert re.search(r"^.*&& (python -m pytest[^`\n]*)$", README.read_text(encoding="utf-8"), re.MULTILINE)


def n_lines(path: Path) -> int:
    """The lines of a file, or of all Python and C files below a folder."""
    files = [path] if path.is_file() else [file for kind in ("*.py", "*.c") for file in path.rglob(kind)]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_line_counts_in_the_readme_are_within_ten_lines_or_five_percent() -> None:
    rows = re.findall(r"^\| \[`(mlx_gpt/\w+/)`\]\(\S+\) \| ([\d,]+) \| (.*) \|$", README.read_text(), re.MULTILINE)
    stated = {folder: int(count.replace(",", "")) for folder, count, _ in rows}
    stated |= {
        folder + file: int(count)
        for folder, _, text in rows
        for file, count in re.findall(r"`([\w.]+)` \((\d+)\)", text)
    }
    assert len(stated) > 20
    counted = {path: n_lines(ROOT / path) for path in stated}
    wrong = {
        path: f"{stated[path]} stated, {n} counted"
        for path, n in counted.items()
        if abs(stated[path] - n) > max(10, n / 20)
    }
    assert not wrong


def test_every_test_file_is_listed_with_its_claim() -> None:
    listed = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert [file for file in sorted(files) if f"`{file}`" not in listed] == []


# CONTRIBUTING -----------------------------------------------------------------------------------------------------


@a_checkout
def test_contributing_names_what_its_files_define() -> None:
    """Each backticked name in an entry of "Where to add" is a name in one of its files."""
    _, _, section = CONTRIBUTING.read_text(encoding="utf-8").partition("## Where to add")
    entries = re.split(r"^- ", section, flags=re.MULTILINE)[1:]
    assert len(entries) >= 12
    for entry in entries:
        spans = re.findall(r"`([^`]+)`", entry)
        paths = [span for span in spans if "/" in span]
        assert paths, entry
        assert all((ROOT / path).exists() for path in paths), entry
        words = {word for path in paths for word in words_of(ROOT / path)}
        names = {name for span in spans if re.fullmatch(r"[\w.]+", span) for name in span.split(".")}
        missing = sorted(names - words)
        assert not missing, entry


def words_of(path: Path) -> set[str]:
    """Every name in a Python file, or in those below a folder."""
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".py"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {getattr(node, attribute, None) for node in nodes for attribute in ("id", "name", "attr", "arg")}
    return {name for name in found if isinstance(name, str)}
