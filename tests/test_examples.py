"""The examples run offline, in seconds, and show what they claim to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NO_NETWORK = """
import socket

def refuse(*_):
    raise OSError("this test has no network")

socket.socket.connect = socket.getaddrinfo = refuse
"""


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def run(name: str, folder: Path, seconds: float = 100) -> str:
    """Return the output of an example, run without a network."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, encoding="utf-8", timeout=seconds)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("00_gpt_from_scratch.py", tmp_path_factory.mktemp("from_scratch"))


@pytest.fixture(scope="module")
def one_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("01_one_head.py", tmp_path_factory.mktemp("one_head"))


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("02_many_heads_one_block.py", tmp_path_factory.mktemp("one_block"))


@pytest.fixture(scope="module")
def residual_stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("03_residual_stream.py", tmp_path_factory.mktemp("residual_stream"))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("04_heads.py", tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def gibberish(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("05_gibberish.py", tmp_path_factory.mktemp("gibberish"), seconds=600)


def part(output: str, number: int) -> str:
    """Return a numbered section of an example's output."""
    return re.split(r"^\d\. ", output, flags=re.MULTILINE)[number]


def test_the_walk_through_names_existing_files_and_the_numbers_that_the_example_prints(one_head: str) -> None:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    links = [ROOT / "examples" / link for link in re.findall(r"\]\((.+?)\)", text)]
    assert links
    assert [link for link in links if not link.is_file()] == []
    weights = re.search(r"(\d+)% of \"ancient\" and (\d+)% of \"oak\"", text)
    assert weights
    row = next(line for line in part(one_head, 7).splitlines() if line.split()[:1] == ["tree"])
    assert re.findall(r"\d+", row)[1:3] == list(weights.groups())


def without_numbers(text: str) -> list[str]:
    """The lines of a text without what another machine may compute otherwise: numbers, bars, what tiny models write."""
    return [re.sub(r"^(Trained .*loss) .*|[\d.%│█ -]+", r"\1 ", line).rstrip() for line in text.splitlines()]


def test_the_walk_through_quotes_what_the_examples_print(request: pytest.FixtureRequest) -> None:
    outputs = "\n".join(request.getfixturevalue(name) for name in ("from_scratch", "residual_stream", "heads"))
    printed = without_numbers(outputs)
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```text\n(.*?)^```$", text.partition("## 7.")[0], re.DOTALL | re.MULTILINE)
    assert len(quoted) >= 5
    for line in without_numbers("".join(quoted)):
        assert line in printed, line


@pytest.mark.parametrize(
    "example", ["from_scratch", "one_head", "one_block", "residual_stream", "heads", slow("gibberish")]
)
def test_the_output_fits_on_a_screen(example: str, request: pytest.FixtureRequest) -> None:
    lines = request.getfixturevalue(example).splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
    assert not re.search(r"\bnan\b", "\n".join(lines))


def test_twenty_steps_teach_a_new_sentence(from_scratch: str) -> None:
    steps = re.findall(r"^after +(\d+) steps, loss (\S+): (.+)$", part(from_scratch, 4), flags=re.MULTILINE)
    losses = [float(loss) for _, loss, _ in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5
    assert losses[-1] < 0.5
    sentence = "One sunny morning, Lily sent the garden to the market."
    assert sentence not in steps[0][2]
    assert sentence in steps[-1][2]


def test_tree_attends_to_ancient_and_oak_and_to_no_later_token(one_head: str) -> None:
    pattern = part(one_head, 7)
    row = next(line for line in pattern.splitlines() if line.split()[:1] == ["tree"])
    percent = [int(number) for number in re.findall(r"\d+", row)]
    assert len(percent) == 4  # The, ancient, oak, tree itself
    assert percent[1] + percent[2] > 90
    assert row.count("·") == 9  # the future
    assert "Each row sums to one: 1.0000" in pattern


def test_tree_becomes_more_similar_to_what_it_attended_to(one_head: str) -> None:
    for word in ("ancient", "oak"):
        found = re.search(rf"to {word} +before +(\S+), after +(\S+)", one_head)
        assert found
        assert float(found[2]) > float(found[1]) + 0.1


def test_unscaled_scores_sharpen_with_the_width_and_scaled_ones_do_not(one_head: str) -> None:
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +(\d+)% +(\d+)%$", part(one_head, 5), flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [16, 64, 256]
    for _, spread, root, _, _ in rows:
        assert float(spread) == pytest.approx(float(root), rel=0.05)
    unscaled, scaled = ([int(row[i]) for row in rows] for i in (3, 4))
    assert unscaled[0] < unscaled[1] < unscaled[2]
    assert max(scaled) - min(scaled) <= 2


def test_four_ways_give_the_same_head(one_head: str) -> None:
    ways = re.findall(r"^ *(.+): adds to tree (.+)$", part(one_head, 9), flags=re.MULTILINE)
    assert len(ways) == 4
    found = re.search(r"Largest difference between them: (\S+)", one_head)
    assert found
    assert float(found[1]) < 1e-5


def test_each_part_built_by_hand_equals_the_packages(one_block: str) -> None:
    differences = dict(re.findall(r"^(.+): largest difference (\S+)$", one_block, flags=re.MULTILINE))
    assert list(differences) == [
        "Sum of the heads and MultiHeadAttention",
        "Up-project, GELU, down-project and MLP",
        "MLP of tree alone and in the sentence",
        "The formula by hand and Block",
        "The stack by hand and GPT",
    ]
    assert all(float(difference) < 1e-4 for difference in differences.values())


def test_the_heads_have_different_patterns(one_block: str) -> None:
    last = next(line for line in part(one_block, 1).splitlines() if line.split()[:1] == ["."])
    assert len(set(last.split()[1:])) == 3


def test_the_loss_starts_at_ln_v(one_block: str) -> None:
    found = re.search(r"mean loss ([\d.]+); ln V = ln 50257 = 10\.82", one_block)
    assert found
    assert float(found[1]) == pytest.approx(10.82, rel=0.02)


def test_the_logit_lens_turns_from_the_token_itself_to_the_next_one(residual_stream: str) -> None:
    best = re.findall(
        r"^(?:at the start|after block \d) +'(.+?)' +(\d+)%", part(residual_stream, 3), flags=re.MULTILINE
    )
    assert len(best) == 7
    assert best[0] == (".", "100")
    assert best[-1] == (" Her", "100")


def test_what_the_parts_add_sums_to_the_difference_of_the_logits(residual_stream: str) -> None:
    rows = re.findall(r"^(\w+) +(-?\d+\.\d\d) ", part(residual_stream, 4), flags=re.MULTILINE)
    *parts, (label, total) = rows
    assert label == "sum"
    assert len(parts) == 15
    assert sum(float(value) for _, value in parts) == pytest.approx(float(total), abs=0.01 * len(parts))
    assert f"the model's logits: {total}" in residual_stream


def test_the_head_that_adds_little_itself_is_the_one_without_which_most_is_lost(residual_stream: str) -> None:
    rows = re.findall(r"^(L\dH\d) +(-?\d\S*) +(-?\d\S*) +.*│", part(residual_stream, 5), flags=re.MULTILINE)
    adds = {name: float(value) for name, value, _ in rows}
    lost = {name: float(value) for name, _, value in rows}
    assert len(lost) == 12
    assert max(lost, key=lambda name: lost[name]) == "L3H0"
    assert lost["L3H0"] > 5 * adds["L3H0"]
    assert sorted(lost.values())[-2] < 3
    assert re.search(r"L3H0 gives 99\.\d% of its attention to ' had'", residual_stream)


def test_one_head_notices_the_word_that_introduces_the_object(heads: str) -> None:
    scores = [int(percent) for percent in re.findall(r"head \d +(\d+)%", part(heads, 2))]
    assert len(scores) == 12
    assert scores.index(max(scores)) == 2 * 3 + 0  # block 3, head 0
    assert sorted(scores)[-1] >= 98
    assert sorted(scores)[-2] < 30
    rows = re.findall(r"^ *(\S+) .*│ +(\S+) (\d+)%$", part(heads, 3), flags=re.MULTILINE)
    stops = [(seen, int(percent) > 95) for token, seen, percent in rows if token == "."]
    assert stops[1:3] == [("She", True), ("had", True)]


def test_without_the_head_stories_introduce_a_second_object(heads: str) -> None:
    found = re.search(r"second object: (\d+) of 16, without L3H0 (\d+) of 16", part(heads, 4))
    assert found
    assert found[1] == "0"
    assert int(found[2]) >= 6


def test_every_part_that_is_taken_out_raises_the_loss(heads: str) -> None:
    losses = {name: float(loss) for name, loss in re.findall(r"^(.+): loss ([\d.]+)$", heads, flags=re.MULTILINE)}
    whole = losses.pop("The model as it is")
    assert list(losses) == ["Without L3H0", "Without the scale", "Trained with the mask, used without"]
    assert min(losses.values()) > whole + 0.05
    entropies = [float(number) for number in re.findall(r"attention ([\d.]+)", part(heads, 5))]
    assert entropies[1] < entropies[0] / 2


def test_a_model_trained_without_the_mask_has_the_lower_loss(heads: str) -> None:
    with_mask, without = (line.split(" -> ") for line in part(heads, 6).splitlines() if " -> " in line)
    assert float(without[-1].split()[0]) < 0.75 * float(with_mask[-1].split()[0])


@pytest.mark.slow
def test_the_report_names_both_mistakes_of_the_gibberish_and_none_of_the_repaired_gpt(gibberish: str) -> None:
    report = part(gibberish.replace("\n1. Fault", "\nFault 1").replace("\n2. Fault", "\nFault 2"), 3)
    assert re.findall(r"^Fault (\d): (\S+)$", report, re.MULTILINE) == [
        ("1", "future-leak"),
        ("2", "probabilities-as-logits"),
    ]
    assert "No fault was found" in part(gibberish, -1)


@pytest.mark.slow
def test_the_gibberish_has_the_lower_loss_and_only_both_repairs_make_words(gibberish: str) -> None:
    losses = [[float(loss) for loss in line.split(" -> ")] for line in re.findall(r"^loss: (.+)$", gibberish, re.M)]
    broken, repaired = losses
    assert broken[-1] < 0.5 * repaired[-1] < 0.2 * repaired[0]
    neither, second, first, both = (int(share) for share in re.findall(r"\((\d+)% words\)", gibberish))
    assert max(neither, second, first) <= 60
    assert both >= 85


@pytest.mark.slow
def test_the_readmes_quote_the_report_and_the_repairs(gibberish: str) -> None:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8").partition("## 7.")[2]
    (repairs,) = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert repairs in gibberish
    (quoted,) = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    printed = " ".join(" ".join(without_numbers(gibberish)).split())
    for line in without_numbers(quoted):  # consequences that there was time to see
        assert "This also explains" in line or " ".join(line.split()) in printed, line
