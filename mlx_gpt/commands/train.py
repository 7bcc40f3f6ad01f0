"""``mlx-gpt train``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import tyro

from mlx_gpt.commands.config_file import with_file
from mlx_gpt.commands.generation_flags import note
from mlx_gpt.commands.given import given_settings, option
from mlx_gpt.commands.train_flags import (
    ARCHITECTURE,
    PRESET,
    SCRATCH,
    Architecture,
    TrainFlags,
    default_out,
)
from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import MLXGPTError, UsageError
from mlx_gpt.files import unused
from mlx_gpt.generate.generation import generate
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.checkpoint import METRICS, Checkpoint
from mlx_gpt.store.find_tokenizer import find_tokenizer
from mlx_gpt.store.folder import load_source
from mlx_gpt.store.layouts import find_source
from mlx_gpt.terminal import make_console
from mlx_gpt.text.dataset import Dataset, load_dataset
from mlx_gpt.text.tokenizer import Tokenizer, is_made
from mlx_gpt.train.auto.defaults import MINUTES, needs_measurement
from mlx_gpt.train.auto.model_size import Choice
from mlx_gpt.train.auto.plan import measure_slowest, plan, print_choices, settings_of, tokenizer_for
from mlx_gpt.train.awake import keep_awake
from mlx_gpt.train.distributed import check_in_main, is_main, join, main_first, report_lost_peers
from mlx_gpt.train.machine import Machine, faster_dtype
from mlx_gpt.train.report.trackers import check_tracker
from mlx_gpt.train.run import PLOT, last_checkpoint, lock_first_vacant, lock_new, lock_run, new_model, run
from mlx_gpt.train.signals import interruptible

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train a GPT on your own text, continue training a model, or resume a run.

    Settings that are not given are chosen automatically, from the text and the speed of this machine, so that the
    command takes ten minutes, or --minutes.
    """

    def __call__(self) -> None:

        started = time.perf_counter()
        if sys.platform.startswith("linux"):
            from mlx_gpt.linux_cpu.lanes import set_graph_width

            set_graph_width(wide=not self.training.recompute)
        group = join()
        console = make_console(quiet=not is_main(group), highlight=False, markup=False)
        with interruptible(), report_lost_peers(group), ExitStack() as stack:
            if self.revision and self.init == SCRATCH:
                raise UsageError("--revision is of the model that --init names: give --init too")
            if self.report_to:
                check_tracker(self.report_to)
            out = check_in_main(group, lambda: self._lock(stack, console))
            if not self.allow_sleep:
                keep_awake(console.print)
            if self.resume:
                self._resume(self.resume, group, console)
            else:
                replace(self, out=out or self.out)._start(started, group, console)

    def _lock(self, stack: ExitStack, console: Console) -> Path:
        """Lock the folder of the run before the text is read, which can take long, and return it."""
        if not (self.resume or "out" in self.given):
            return lock_first_vacant(stack, default_out(self.data), console)
        (lock_run if self.resume else lock_new)(stack, self.out, console)
        return self.out

    def _resume(self, run: Path, group: mx.distributed.Group | None, console: Console) -> None:
        start = last_checkpoint(run, self.settings(), self.given, console)
        with main_first(group):
            named = self.tokenizer and is_made(self.tokenizer)
            dataset = self._read(self.tokenizer if named else start.tokenizer, console)
        self._run(start.model, dataset, group, console, start)

    def _start(self, started: float, group: mx.distributed.Group | None, console: Console) -> None:
        whole = "preset" in self.given or self.init != SCRATCH
        names = {*self.given, *(ARCHITECTURE if whole else ())}  # of settings that are not chosen
        measured = not self.has_tokenizer() or needs_measurement(names)
        machine = measure_slowest(group) if measured else None
        seconds = 60 * (self.training.minutes or MINUTES)
        flags = self
        with main_first(group):
            base = None if self.init == SCRATCH else self._base()
            if base:
                flags = self.with_architecture(base[0].config, base[1])
            dataset, choices = self._dataset(base and base[1], machine, seconds, console)
        given = {name: value for name, value in flags.settings().items() if name in names}
        choices += plan(dataset, machine, started + seconds, given, group, tuning=base is not None)
        print_choices(choices, console)
        if machine and "dtype" not in self.given and (found := faster_dtype(machine.matrix_speed)):
            console.print(f"{found[0]} multiplies {found[1]:.1f} times as fast as float32 here: try --dtype {found[0]}")
        flags = flags.with_settings(settings_of(choices))
        flags.check_effects()
        flags._run(flags._new_model(dataset, base and base[0]), dataset, group, console)

    def _base(self) -> tuple[GPT, Tokenizer]:
        """Load the model to start from, and its tokenizer."""
        source = find_source(self.init, self.revision)
        source.require_floats("start from")
        return load_source(source)

    def _run(
        self,
        model: GPT,
        dataset: Dataset,
        group: mx.distributed.Group | None,
        console: Console,
        start: Checkpoint | None = None,
    ) -> None:
        console.print(
            f"{model.n_parameters:,} parameters, {dataset.train.n_tokens:,} training tokens, "
            f"{dataset.val.n_tokens:,} validation tokens, vocabulary {dataset.tokenizer.vocab_size}"
        )
        if dataset.changes and is_main(group):
            note(dataset.changes)
        generate(model, dataset.tokenizer, self.prompt)  # refuses a prompt that is too long

        def sample(step: int, done: float) -> None:
            text = "".join(generate(model, dataset.tokenizer, self.prompt, max_tokens=60))
            console.print("    " + (self.prompt + text).replace("\n", "\n    "), style="cyan")

        on_eval, settings = sample if is_main(group) else None, self.settings()
        loss = run(model, dataset, self.training, self.out, console, on_eval, settings, start, group, self.report_to)
        baselines = ", ".join(f"{name} {value:.3f}" for name, value in dataset.baselines.items())
        console.print(f"validation loss {loss:.4f} nats per token ({baselines})")
        console.print(f"model and metrics: {self.out}   plot: {self.out / PLOT}")
        console.print(f'next: mlx-gpt generate {self.out} --prompt "..."')
        if is_main(group) and (line := self._last_line(dataset, loss, model.n_parameters)):
            console.print(line, soft_wrap=True)

    def _last_line(self, dataset: Dataset, loss: float, n_parameters: int) -> str:
        """Return what the doctor says of the level of the loss, or ""."""
        from mlx_gpt.check.doctor.arguments import read_metrics
        from mlx_gpt.check.doctor.level.metrics import numbers
        from mlx_gpt.check.doctor.level.training import last_line

        rows: list[dict[str, float]] = []
        with suppress(MLXGPTError):  # the run is complete without its log
            rows = numbers(read_metrics(self.out / METRICS))
        return last_line(rows, dataset.train.ids, dataset.val.ids, dataset.tokenizer.vocab_size, loss, n_parameters)

    def _dataset(
        self, tokenizer: Tokenizer | None, machine: Machine | None, seconds: float, console: Console
    ) -> tuple[Dataset, list[Choice]]:
        """Read the text; choose a tokenizer if there is none."""
        if self.has_tokenizer():
            given = find_tokenizer(self.tokenizer) if self.tokenizer and not tokenizer else None
            return self._read(tokenizer or given, console), []
        assert machine
        choice = tokenizer_for(self.data, machine, seconds, self.text_field)
        try:
            return self._read(choice.settings["tokenizer"], console), [choice]
        except UsageError:  # such as one character, repeated
            choice = Choice({"tokenizer": "bytes"}, "the text has too few different pairs to learn a vocabulary from")
            return self._read("bytes", console), [choice]

    def _read(self, tokenizer: Tokenizer | str | None, console: Console) -> Dataset:
        with console.status("reading the text") as status:
            return load_dataset(
                self.data,
                tokenizer,
                lambda n: status.update(f"reading the text: {n / 1e6:,.0f} MB tokenized"),
                self.val_data,
                self.text_field,
            )

    def _new_model(self, dataset: Dataset, base: GPT | None) -> GPT:
        """A new model, with the weights of ``base`` if given."""
        if base is None:
            return new_model(self.model.config, dataset, self.training.seed)
        mx.random.seed(self.training.seed)
        model = GPT(self.model.config)
        model.update(base.parameters())
        return model


def command_line(argv: Sequence[str]) -> tuple[list[str], Train]:
    """Return the command line with the flags of its settings file, and the defaults of its flags, set by the preset."""
    typed, argv = given_settings(argv), with_file(argv)
    if empty := [name for name in ("out", "resume", "config") if option(argv, name) == ""]:
        raise UsageError(f"--{empty[0]} is empty; give a name")
    preset = option(argv, "preset") or PRESET
    model = Architecture.of(GPTConfig.preset(preset))
    out = unused(default_out(option(argv, "data") or "mine"))
    return argv, Train(data=tyro.MISSING, out=out, preset=preset, model=model, given=given_settings(argv), typed=typed)
