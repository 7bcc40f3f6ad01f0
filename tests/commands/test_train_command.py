"""``mlx-gpt train``: flags, files of settings, runs, and a model to start from."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Event

import mlx.core as mx
import pytest
from helpers.command_line import TINY, TRAIN, check_error, environment, the_line

from mlx_gpt.cli import main, parse
from mlx_gpt.commands.train import Train
from mlx_gpt.commands.train_flags import Training
from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.store.folder import load
from mlx_gpt.store.run_file import read_run_file
from mlx_gpt.store.run_lock import locked
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.config import TrainConfig

SIZE = TINY[2:]  # without the tokenizer

# Runs -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_is_reported_in_one_line_with_step_gradient_cause_and_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--learning-rate", "1e30", "--steps", "5"]) == 1
    expected = the_line(capsys.readouterr().err)
    assert re.match(
        r"the (loss|gradient's norm) became (nan|inf) at step \d \(largest gradient: [\w.]+, \S+\); ", expected
    )
    assert "a lower --learning-rate (it was 1e+30) or a longer --warmup usually helps" in expected
    assert "--init run/checkpoints/step-0" in expected
    assert main([*TRAIN[:3], "--out", "again", "--init", "run/checkpoints/step-0", "--steps", "2"]) == 0


def test_train_and_generate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--steps", "4", "--eval-every", "2", "--prompt", "line"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "    line" in output.out  # a sample during training
    assert re.search(r"validation loss \d\.\d+ nats per token \(ln V 5\.549, unigram \d", output.out)
    assert "next: mlx-gpt generate run" in output.out
    assert re.match(r"undertrained: .* more tokens are needed$", output.out.splitlines()[-1])
    assert {path.name for path in (here / "run").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "metrics.jsonl",
        "loss.png",
        "run.toml",
    }
    assert load(here / "run")[0].config == GPTConfig(257, 16, 16, 1, 2)
    assert main(["generate", "run", "--prompt", "line", "--seed", "0"]) == 0
    assert capsys.readouterr().out.endswith("\n")


# Flags ------------------------------------------------------------------------------------------------------------


def parsed(*flags: str) -> Train:
    verb = parse(["train", "--data", "x", "--out", "y", *flags])
    assert isinstance(verb, Train)
    return verb


def architecture(*flags: str) -> GPTConfig:
    return parsed(*flags).model.config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_default_of_the_other_flags(preset: str) -> None:
    assert architecture("--preset", preset) == PRESETS[preset]
    assert architecture("--preset", preset, "--n-layer", "3") == GPTConfig.preset(preset, n_layer=3)
    assert architecture("--n-layer", "3", f"--preset={preset}") == GPTConfig.preset(preset, n_layer=3)


def test_the_default_preset_is_tiny() -> None:
    assert architecture() == PRESETS["tiny"]
    assert architecture("--n-embd", "64", "--embd-pdrop", "0.1") == GPTConfig.preset("tiny", n_embd=64, embd_pdrop=0.1)


def test_every_setting_has_a_flag_with_its_default_or_that_it_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--preset", "small", "--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0
    names = {field.name for kind in (GPTConfig, TrainConfig) for field in fields(kind)} - {"vocab_size"}
    names |= {"data", "out", "resume", "config", "init", "tokenizer"}
    assert {name for name in names if f"--{name.replace('_', '-')} " not in help_text.replace(",", " ")} == set()
    assert "--vocab-size" not in help_text
    assert "--given" not in help_text
    words = " ".join(help_text.replace("│", " ").split())
    assert "width of the residual stream (chosen for text, machine and time; preset: 256)" in words
    assert "optimizer steps (chosen for text, machine and time)" in words
    assert "--keep INT newest checkpoints to keep (default: 2)" in words


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("my.txt", "runs/my"),
        ("books/v1.2", "runs/v1.2"),
        ("books/*.txt", "runs/books"),
        ("tinyworld", "runs/tinyworld"),
        ("/", "runs/mine"),
        ("-", "runs/mine"),
        ("/dev/fd/63", "runs/mine"),
    ],
)
def test_a_run_without_out_is_named_after_its_data(here: Path, data: str, out: str) -> None:
    (here / "books/v1.2").mkdir(parents=True)
    for name in (out, f"{out}-2", f"{out}-3"):
        verb = parse(["train", "--data", data])
        assert isinstance(verb, Train)
        assert verb.out == Path(name)
        (here / name).mkdir(parents=True)
    assert parse(["train", "--data", data, "--out", "mine"]).out == Path("mine")


def test_runs_without_out_that_start_at_once_get_different_folders(here: Path) -> None:
    command = [sys.executable, "-m", "mlx_gpt", "train", "--data", "text.txt", *TINY, "--steps", "2"]
    pair = [subprocess.Popen(command, cwd=here, env=environment()) for _ in range(2)]
    assert [process.wait(timeout=100) for process in pair] == [0, 0]
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["text", "text-2"]
    for run in (here / "runs").iterdir():
        assert load(run)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_can_be_used(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(TRAIN) == 0
    with locked_in_a_thread(here / "run"), locked_in_a_thread(here / "new"):
        check_error(TRAIN, 1, "run: another run writes to it (pid ", here, capsys)
        check_error(["train", "--resume", "run"], 1, "run: another run writes to it (pid ", here, capsys)
        check_error([*TRAIN, "--out", "new"], 1, "new: another run writes to it (pid ", here, capsys)
        assert main(["generate", "run", "--prompt", "a", "--max-tokens", "2"]) == 0
        assert main(["export", "run", "run.bin", "--to", "llm.c"]) == 0


@contextmanager
def locked_in_a_thread(run: Path) -> Iterator[None]:
    """Lock a run's folder as another process would."""
    begun, end = Event(), Event()

    def hold() -> None:
        with locked(run):
            begun.set()
            end.wait()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(hold)
        begun.wait()
        try:
            yield
        finally:
            end.set()
            future.result()


def test_flags_reach_the_settings() -> None:
    assert parsed("--steps", "7", "--optimizer", "muon").training == Training(steps=7, optimizer="muon")
    assert parsed("--minutes", "2", "--recompute").training == Training(minutes=2.0, recompute=True)


# Files of settings ------------------------------------------------------------------------------------------------


def test_flags_override_a_file_and_a_file_the_defaults(here: Path) -> None:
    (here / "my.toml").write_text(
        'data = "a"\nout = "b"\nn_layer = 3\nlearning_rate = 1e-5\nrecompute = true\nprompt = "--steps 3"\n'
    )
    verb = parse(["train", "--config", "my.toml", "--n-layer", "2"])
    assert isinstance(verb, Train)
    assert (verb.data, verb.out, verb.prompt) == ("a", Path("b"), "--steps 3")
    assert verb.model.config == GPTConfig.preset("tiny", n_layer=2)
    assert verb.training == Training(learning_rate=1e-5, recompute=True)
    assert not parsed("--config", "my.toml", "--no-recompute").training.recompute


def test_a_flag_replaces_the_equivalent_settings_of_a_file(here: Path) -> None:
    (here / "my.toml").write_text("steps = 9\nn_layer = 3\nn_embd = 64\n")
    assert parsed("--config", "my.toml", "--tokens", "100").training == Training(tokens=100)
    assert parsed("--config", "my.toml", "--preset", "small").model.config == PRESETS["small"]
    assert parsed("--config", "my.toml", "--preset", "small", "--n-head", "2").model.config.n_head == 2
    assert parsed("--config", "my.toml", "--n-head", "2").model.config == GPTConfig.preset(
        "tiny", n_layer=3, n_embd=64, n_head=2
    )


def test_every_setting_is_written_to_the_run_folder(here: Path) -> None:
    flags = ["--optimizer", "muon", "--embd-pdrop", "0.1", "--eval-every", "0", "--learning-rate", "2e-3"]
    assert main([*TRAIN, *flags]) == 0
    written = read_run_file(here / "run/run.toml")
    verb = parse(["train", "--config", "run/run.toml", "--out", "again"])
    assert isinstance(verb, Train)
    assert verb.settings() == written
    assert verb.training == Training(steps=2, batch_size=2, optimizer="muon", eval_every=0, learning_rate=2e-3)
    assert verb.model.config == GPTConfig(50257, 16, 16, 1, 2, embd_pdrop=0.1)
    assert verb.data == str(here / "text.txt")  # independent of the working directory


def test_written_paths_are_absolute_and_no_setting_is_redundant(here: Path) -> None:
    (here / "texts").mkdir()
    for i in range(9):
        (here / f"texts/{i}.txt").write_text(f"the {i}th text of nine is short, as texts are " * 40)
    assert (
        main(["train", "--data", "texts/*.txt", "--tokenizer", "bpe:280", "--out", "run", *SIZE, "--epochs", "0.01"])
        == 0
    )
    written = read_run_file(here / "run/run.toml")
    assert written["data"] == str(here / "texts/*.txt")
    assert "steps" not in written
    assert written["epochs"] == 0.01
    flags = ["--init", "run", "--steps", "1", "--batch-size", "2"]
    assert main(["train", "--data", "texts", "--out", "tuned", *flags]) == 0
    written = read_run_file(here / "tuned/run.toml")
    assert written["init"] == str(here / "run")
    assert "tokenizer" not in written  # it is the model's


def test_a_prepared_text_brings_its_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "text.txt", "--tokenizer", "bytes", "--out", "ids"]) == 0
    train = ["train", "--data", "ids", *SIZE, "--steps", "2"]
    assert main([*train, "--out", "run"]) == 0
    assert main([*train, "--out", "same", "--tokenizer", "bytes"]) == 0
    assert (here / "run/metrics.jsonl").exists()
    assert "tokenizer" not in read_run_file(here / "run/run.toml")
    capsys.readouterr()
    assert main([*train, "--out", "other", "--tokenizer", "bpe:300"]) == 1
    assert "the text was prepared with a vocabulary of 257 ids, not bpe:300" in the_line(capsys.readouterr().err)
    (here / "other.txt").write_text("a text with other words, so that it has other pairs " * 9)
    assert main(["prepare", "other.txt", "--tokenizer", "bpe:259", "--val-fraction", "0.5", "--out", "others"]) == 0
    capsys.readouterr()
    assert main(["train", "--data", "others", "--init", "model", "--out", "other"]) == 1
    assert "the text was prepared with another tokenizer" in the_line(capsys.readouterr().err)
    assert not (here / "other").exists()


@pytest.mark.parametrize("spec", ["vocabulary", "vocabulary/tokenizer.json"])
def test_an_existing_vocabulary_is_used_and_a_resumed_run_does_not_need_its_folder(here: Path, spec: str) -> None:
    words = Tokenizer.train((here / "text.txt").read_text(), 262)
    words.save(here / "vocabulary")
    assert main(["train", "--data", "text.txt", "--out", "run", "--tokenizer", spec, *SIZE, "--steps", "2"]) == 0
    assert read_run_file(here / "run/run.toml")["tokenizer"] == str(here / spec)
    (here / "vocabulary").rename(here / "elsewhere")
    assert main(["train", "--resume", "run", "--steps", "3"]) == 0
    model, tokenizer = load(here / "run")
    assert (tokenizer.hash, model.config.vocab_size) == (words.hash, 262)
    assert main(["prepare", "text.txt", "--tokenizer", "elsewhere", "--out", "ids"]) == 0
    assert Tokenizer.from_folder(here / "ids").hash == words.hash


# Starting from a model --------------------------------------------------------------------------------------------


def test_a_run_from_a_model_has_its_weights_architecture_and_tokenizer(here: Path) -> None:
    flags = ["--init", "model", "--learning-rate", "1e-30", "--steps", "1", "--batch-size", "2", "--resid-pdrop", "0.1"]
    assert main(["train", "--data", "text.txt", "--out", "run", *flags]) == 0
    (before, tokenizer), (after, same) = load(here / "model"), load(here / "run")
    ids = mx.array([[1, 2, 3]])
    assert mx.allclose(before(ids), after(ids), atol=1e-6)
    assert same.hash == tokenizer.hash
    assert after.config == GPTConfig(257, 32, 16, 2, 2, initializer_range=0.3, resid_pdrop=0.1)
    assert main(["train", "--config", "run/run.toml", "--out", "again"]) == 0
    assert (here / "run/model.safetensors").read_bytes() == (here / "again/model.safetensors").read_bytes()


def test_flags_that_agree_with_the_model_to_start_from_are_accepted(here: Path) -> None:
    flags = ["--init", "model", "--n-layer", "2", "--tokenizer", "bytes", "--steps", "1", "--batch-size", "2"]
    assert main(["train", "--data", "text.txt", "--out", "run", *flags]) == 0
