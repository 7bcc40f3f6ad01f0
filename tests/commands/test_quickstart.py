"""The quickstart: the preset and number of stories for a measured speed, and what a run leaves."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import everything
from rich.console import Console

from mlx_gpt import quickstart
from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.device import on_cpu
from mlx_gpt.quickstart import (
    DEEP,
    SHALLOW,
    WIDE,
    CheckedStories,
    Preset,
    check_stories,
    choose_preset,
    stories_needed,
    training_settings,
)
from mlx_gpt.store.folder import load
from mlx_gpt.text.dataset import dataset_from_texts
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld import stories as world
from mlx_gpt.train.config import TrainConfig


@pytest.mark.parametrize(
    ("minutes", "speed", "preset"),
    [(3, 5_000, SHALLOW), (3, 25_000, DEEP), (3, 100_000, WIDE), (3, 400_000, WIDE), (10, 5_000, DEEP)],
)
def test_the_preset_is_the_largest_that_the_measured_speed_can_train(
    minutes: float, speed: float, preset: Preset
) -> None:
    assert choose_preset(lambda _: speed, 60 * minutes - 15) == (preset, speed)


def test_a_preset_that_turns_out_too_slow_is_not_chosen() -> None:
    speeds = {SHALLOW: 20_000, DEEP: 100_000, WIDE: 10_000}
    assert choose_preset(speeds.__getitem__, 165) == (DEEP, 100_000)


def test_no_story_is_seen_more_than_three_times_at_the_estimated_speed_of_a_mac() -> None:
    seconds = 3 * 60
    n = stories_needed(400_000 * seconds)
    assert 200_000 < n < quickstart.MAX_STORIES
    tokens = len(Tokenizer.train(stories := world.generate_stories(300, 0), 900).encode(" ".join(stories))) / 300
    assert n * tokens * 3.3 > 400_000 * seconds


def test_the_settings_are_those_of_train_and_leave_time_for_the_end() -> None:
    config = training_settings(DEEP, 25_000, 165, seed=3)
    assert isinstance(config, TrainConfig)
    assert 60 * config.minutes == pytest.approx(165 - quickstart.END, abs=4)
    assert config.seed == 3
    assert config.n_steps(16 * 144, 10**6) >= 3 if config.minutes is None else config.eval_every > 100


def test_quickstart_leaves_a_model_its_samples_and_a_table(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = TrainConfig(steps=4, batch_size=2, eval_every=2, eval_windows=2)
    small = GPTConfig(n_positions=48, n_embd=16, n_layer=1, n_head=2)
    monkeypatch.setattr(quickstart, "training_settings", lambda *_: few)
    monkeypatch.setattr(quickstart, "SHALLOW", Preset(0, small, few))
    monkeypatch.setattr(quickstart, "measure_training_speed", lambda *_: 1000.0)
    for name, n in (("FIRST_STORIES", 600), ("N_VAL_STORIES", 20), ("N_SAMPLES", 3)):
        monkeypatch.setattr(quickstart, name, n)
    monkeypatch.setattr(quickstart, "check_stories", lambda *args: check_stories(*args, n=3))
    assert main(["quickstart", "--minutes", "0.2"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    folder = here / "runs/quickstart"
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "loss.png",
        "samples.md",
    }
    for name in ("ln V", "unigram", "bigram", "best possible", "valid sentences, of 3", "valid whole stories, of 3"):
        assert name in output.out
    for label in ("before training", "at 50%", "after training"):
        assert label in output.out
        assert f"- {label}: " in (folder / "samples.md").read_text()
    assert "mlx-gpt generate runs/quickstart" in output.out
    load(folder)

    before = everything(folder)
    assert main(["quickstart", "--minutes", "0.2"]) == 0  # again: in a new folder
    assert everything(folder) == before
    assert (here / "runs/quickstart-2/model.safetensors").exists()
    if on_cpu():  # a GPU adds gradients in any order
        assert (here / "runs/quickstart-2/model.safetensors").read_bytes() == before["model.safetensors"]


def test_checking_counts_valid_stories_and_valid_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = type("Model", (), {"config": GPTConfig(n_positions=9)})
    stories = world.generate_stories(3, seed=0)
    wrong = "Tom was in the ball."
    monkeypatch.setattr(quickstart, "generate_many", lambda *_, **__: [*stories, wrong, ""])
    checked = check_stories(model, Tokenizer.bytes(), seed=0, n=5)
    assert checked.stories == [*stories, wrong, ""]
    assert checked.n_valid_stories == 3
    assert checked.n_valid_sentences == 3
    assert [sentence for sentence, valid in checked.sentences if not valid] == [wrong, ""]
    assert all(
        sentence in world.split_sentences(story)
        for (sentence, _), story in zip(checked.sentences[:3], stories, strict=True)
    )


def test_the_table_orders_losses_from_uniform_probabilities_to_the_rules() -> None:
    stories = world.generate_stories(30, seed=0)
    dataset = dataset_from_texts("tinyworld", stories[:20], stories[20:], "bytes")
    checked = CheckedStories(
        stories[:2], [world.parse_story(story) for story in stories[:2]], [("x", False), ("y", True)]
    )
    out = StringIO()
    Console(file=out, width=100).print(quickstart._table(1.25, dataset, checked))
    lines = [line for line in out.getvalue().splitlines() if re.search(r"\d\.\d{3}", line)]
    names = ["(ln V)", "(unigram", "(bigram", "this model", "(best possible)", "above the best"]
    assert [name for name, line in zip(names, lines, strict=True) if name not in line] == []
    values = [float(re.findall(r"\d\.\d{3}", line)[-1]) for line in lines]
    assert values[:3] == pytest.approx(list(dataset.baselines.values())[:3], abs=6e-4)
    assert values[3] == 1.25
    assert values[4] == pytest.approx(dataset.baselines["best possible"], abs=6e-4)
    assert values[5] == pytest.approx(1.25 - dataset.baselines["best possible"], abs=1.1e-3)
    assert re.search(r"valid sentences, of 2.* 1\b", out.getvalue())
    assert re.search(r"valid whole stories, of 2.* 2\b", out.getvalue())


def test_the_samples_file_shows_where_each_story_breaks(tmp_path: Path) -> None:
    story = world.generate_stories(1, seed=0)[0]
    stories = [story, story[:-20]]
    checked = CheckedStories(stories, [world.parse_story(story) for story in stories], [("It ran.", False)])
    quickstart._write_samples(tmp_path / "samples.md", [("before", " x\n")], checked)
    text = (tmp_path / "samples.md").read_text()
    assert "- before: x\n" in text
    assert f"- {story}\n  - **valid**" in text
    assert re.search(r"\*\*sentence \d+ is not in the grammar", text)
    assert text.endswith("- It ran.\n")
