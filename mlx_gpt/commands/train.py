"""``mlx-gpt train``."""

from __future__ import annotations

import glob
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Suppress, arg

from mlx_gpt.commands.config_file import given, option, with_file
from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.files import unused
from mlx_gpt.train.auto.defaults import MINUTES
from mlx_gpt.train.config import LENGTHS, TrainConfig

if TYPE_CHECKING:
    import mlx.core as mx
    from rich.console import Console

    from mlx_gpt.model.gpt import GPT
    from mlx_gpt.store.checkpoint import Checkpoint
    from mlx_gpt.text.dataset import Dataset
    from mlx_gpt.text.tokenizer import Tokenizer
    from mlx_gpt.train.auto.model_size import Choice
    from mlx_gpt.train.machine import Machine

PRESET = "tiny"
SCRATCH = "scratch"
ARCHITECTURE = tuple(field.name for field in fields(GPTConfig) if field.name != "vocab_size")
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # not the weights' concern
FILE_MAY_SET = {"data", "out", "init", "revision", "tokenizer", "preset", "prompt", "report_to", *ARCHITECTURE}
FILE_MAY_SET |= {field.name for field in fields(TrainConfig)}
ALL_LENGTHS = (*LENGTHS, "minutes")
REPLACED = dict.fromkeys(ALL_LENGTHS, ALL_LENGTHS) | {"preset": ("preset", *ARCHITECTURE)}  # in a file, by this flag


@dataclass(frozen=True)
class Architecture(GPTConfig):
    """The flags of an architecture: ``GPTConfig``, but how many ids there are is the tokenizer's to say."""

    vocab_size: Suppress[int] = GPTConfig.vocab_size

    @classmethod
    def of(cls, config: GPTConfig) -> Architecture:
        """The flags with these values for defaults."""
        return cls(**asdict(config))

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**asdict(self))


@dataclass(frozen=True)
class Train:
    """Train a GPT on a text of yours, go on training one, or go on with a run.

    What is not given is picked, from the text and the speed of this machine, so that all is done in ten minutes, or in
    --minutes.
    """

    data: str
    """a file, folder or glob of .txt, .md, .jsonl or .parquet; what mlx-gpt prepare made; tinyworld, shakespeare ..."""
    out: Path
    """where the model folder, metrics.jsonl and loss.png go: a new folder, runs/NAME-OF-THE-DATA unless given"""
    resume: Path | None = None
    """the folder of a run to go on with; nothing else is needed"""
    config: Path | None = None
    """a file of settings, such as the run.toml of a run; the flags given beside it win"""
    init: str = SCRATCH
    """scratch, or the folder or hub id of a model to start from, which brings its architecture and tokenizer"""
    revision: str | None = None
    """a branch, tag or commit of the hub's, of the model to start from"""
    tokenizer: str | None = None
    """gpt2, bytes, or bpe:N: N ids learned from the text; picked where data and model have none"""
    preset: Annotated[str, arg(help=f"a size, instead of a picked one: {', '.join(PRESETS)}")] = PRESET
    prompt: str = ""
    """what the samples during training continue"""
    report_to: str = ""
    """tensorboard or wandb: metrics go there too, where it is installed"""
    model: Annotated[Architecture, arg(name="")] = field(default_factory=lambda: Architecture.of(PRESETS[PRESET]))
    training: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    given: Suppress[frozenset[str]] = frozenset()

    def settings(self) -> dict[str, Any]:
        """All that it takes to repeat the run, by the names of the flags."""
        own = {"data": _from_anywhere(self.data), "init": _from_anywhere(self.init), "tokenizer": self.tokenizer}
        own |= {"revision": self.revision, "prompt": self.prompt, "report_to": self.report_to or None}
        architecture = {name: getattr(self.model, name) for name in ARCHITECTURE}
        every = own | architecture | asdict(self.training)
        return {name: value for name, value in every.items() if value is not None}

    def __call__(self) -> None:
        from mlx_gpt.train.distributed import join, report_lost_peers
        from mlx_gpt.train.machine import set_breadth

        began = time.perf_counter()
        set_breadth(not self.training.recompute)
        group = join()
        with report_lost_peers(group):
            self._train(group, began)

    def _train(self, group: mx.distributed.Group | None, began: float) -> None:
        from rich.console import Console

        from mlx_gpt.generate.generation import generate
        from mlx_gpt.store.folder import load
        from mlx_gpt.train.auto.plan import measure_slowest, print_choices, settings_of
        from mlx_gpt.train.distributed import check_in_main, is_main, main_first
        from mlx_gpt.train.report.trackers import check_tracker
        from mlx_gpt.train.run import check_new, last_checkpoint, run

        if self.revision and self.init == SCRATCH:
            raise UsageError("--revision is of the model that --init names: give --init too")
        if self.report_to:
            check_tracker(self.report_to)
        console = Console(quiet=not is_main(group), highlight=False)
        start = None
        if self.resume:
            start = last_checkpoint(self.resume, self.settings(), self.given, console)
        else:
            check_in_main(group, lambda: check_new(self.out))
        seconds = 60 * (self.training.minutes or MINUTES)
        machine = None if start or not self._is_open() else measure_slowest(group)
        with main_first(group):
            base = None if start or self.init == SCRATCH else load(self.init, self.revision)
            if base:
                self._refuse_contradictions(base[0].config, base[1])
            dataset, picks = self._dataset(start, base, machine, seconds, console)
        used = self
        if not start:
            picks += self._picks(dataset, base, machine, began + seconds, group)
            print_choices(picks, console)
            used = self._with(settings_of(picks))
        model = start.model if start else used._model(dataset, base)
        console.print(
            f"{model.n_parameters:,} parameters, {dataset.train.n_tokens:,} tokens to train on, "
            f"{dataset.val.n_tokens:,} to measure by, vocabulary {dataset.tokenizer.vocab_size}"
        )

        generate(model, dataset.tokenizer, self.prompt)  # too long a prompt is told now, not halfway through

        def sample(step: int, done: float) -> None:
            text = "".join(generate(model, dataset.tokenizer, self.prompt, max_tokens=60))
            console.print("    " + (self.prompt + text).replace("\n", "\n    "), style="cyan", markup=False)

        used = replace(used, model=Architecture.of(model.config))
        look = sample if is_main(group) else None
        result = run(
            model, dataset, used.training, self.out, console, look, used.settings(), start, group, self.report_to
        )
        marks = ", ".join(f"{name} {loss:.3f}" for name, loss in dataset.baselines.items())
        console.print(f"validation loss {result.val_loss:.4f} nats per token ({marks})")
        console.print(f"model and metrics: {result.folder}   plot: {result.plot}")
        console.print(f'next: mlx-gpt generate {result.folder} --prompt "..."')

    def _has_tokenizer(self) -> bool:
        """Whether it is given, or the text or the model to start from has one."""
        from mlx_gpt.text.prepare import is_prepared

        return bool(self.tokenizer) or self.init != SCRATCH or is_prepared(Path(self.data).expanduser())

    def _is_open(self) -> bool:
        """Whether something is to be picked for which the machine is to be measured."""
        from mlx_gpt.train.auto.defaults import needs_measurement

        return not self._has_tokenizer() or needs_measurement(self._names())

    def _names(self) -> set[str]:
        """Of the settings that are given; a model has all of an architecture's."""
        whole = "preset" in self.given or self.init != SCRATCH
        return {*self.given, *(ARCHITECTURE if whole else ())}

    def _dataset(
        self,
        start: Checkpoint | None,
        base: tuple[GPT, Tokenizer] | None,
        machine: Machine | None,
        seconds: float,
        console: Console,
    ) -> tuple[Dataset, list[Choice]]:
        """The text in tokens; the tokenizer is picked where there is none."""
        from mlx_gpt.train.auto.model_size import Choice
        from mlx_gpt.train.auto.plan import tokenizer_for

        if start:
            return self._read(self.tokenizer or start.tokenizer, console), []
        if self._has_tokenizer():
            return self._read(base[1] if base else self.tokenizer, console), []
        assert machine
        picked = tokenizer_for(self.data, machine, seconds)
        try:
            return self._read(picked.settings["tokenizer"], console), [picked]
        except UsageError:  # one character, repeated
            none = Choice({"tokenizer": "bytes"}, "the text repeats itself: there are not so many pairs to learn")
            return self._read("bytes", console), [none]

    def _read(self, tokenizer: Tokenizer | str | None, console: Console) -> Dataset:
        from mlx_gpt.text.dataset import load_dataset

        with console.status("reading the text") as status:
            return load_dataset(
                self.data, tokenizer, lambda n: status.update(f"reading the text: {n / 1e6:,.0f} MB are tokens")
            )

    def _model(self, dataset: Dataset, base: tuple[GPT, Tokenizer] | None) -> GPT:
        """A new model, or the one to start from."""
        import mlx.core as mx

        from mlx_gpt.model.gpt import GPT
        from mlx_gpt.train.run import new_model

        if base is None:
            return new_model(self.model.config, dataset, self.training.seed)
        mx.random.seed(self.training.seed)
        dropout = {name: getattr(self.model, name) for name in DROPOUT if name in self.given}
        model = GPT(replace(base[0].config, **dropout))
        model.update(base[0].parameters())
        return model

    def _picks(
        self,
        dataset: Dataset,
        base: tuple[GPT, Tokenizer] | None,
        machine: Machine | None,
        deadline: float,
        group: mx.distributed.Group | None,
    ) -> list[Choice]:
        """What is picked in place of what is not given."""
        from mlx_gpt.train.auto.plan import plan

        every = {**asdict(self.model), **(asdict(base[0].config) if base else {}), **asdict(self.training)}
        every |= {name: getattr(self.model, name) for name in self.given & {*DROPOUT}}
        given = {name: value for name, value in every.items() if name in self._names()}
        return plan(dataset, machine, deadline, given, group, tuning=base is not None)

    def _with(self, flags: dict[str, Any]) -> Train:
        """The same with these flags."""
        own = {name: flags[name] for name in flags if name == "tokenizer"}
        model = {name: flags[name] for name in flags if name in ARCHITECTURE}
        training = {name: flags[name] for name in flags if name not in (*own, *model)}
        if self.given.isdisjoint(LENGTHS):  # minutes were those of everything
            training = {"minutes": None} | training
        return replace(self, model=replace(self.model, **model), training=replace(self.training, **training), **own)

    def _refuse_contradictions(self, found: GPTConfig, tokenizer: Tokenizer) -> None:
        """``UsageError`` where a flag asks for something else than the model to start from has."""
        from mlx_gpt.text.tokenizer import make_tokenizer

        names = {*ARCHITECTURE} if "preset" in self.given else self.given & {*ARCHITECTURE}
        wrong = [
            f"--{name.replace('_', '-')} {getattr(self.model, name)} (it has {getattr(found, name)})"
            for name in ARCHITECTURE
            if name in names - {*DROPOUT} and getattr(self.model, name) != getattr(found, name)
        ]
        if self.tokenizer:
            learned = self.tokenizer.startswith("bpe:")
            if learned or make_tokenizer(self.tokenizer, []).hash != tokenizer.hash:
                wrong.append(f"--tokenizer {self.tokenizer} (it has its own)")
        if wrong:
            raise UsageError(f"--init {self.init} brings its architecture and tokenizer; leave out {', '.join(wrong)}")


def _from_anywhere(name: str) -> str:
    """The name of a file, folder or glob such that it does not depend on the working directory; others as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or glob.has_magic(name) else name


def _name_of(data: str) -> str:
    """What a run on this data is called: like the file, without its ending, or like the folder."""
    path = Path(data).expanduser().absolute()
    named = (part for part in (path, *path.parents) if part.name and not glob.has_magic(part.name))
    part = next(named, Path("mine"))
    return part.name if part.is_dir() else part.stem


def command_line(argv: Sequence[str]) -> tuple[list[str], Train]:
    """The command line with the flags of the file that it names, and what its flags default to.

    The preset is read first, since it decides other defaults.
    """
    argv = with_file(argv, FILE_MAY_SET, REPLACED)
    preset = option(argv, "preset") or PRESET
    model = Architecture.of(GPTConfig.preset(preset))
    out = unused(Path("runs") / _name_of(option(argv, "data") or "mine"))
    return argv, Train(data=tyro.MISSING, out=out, preset=preset, model=model, given=given(argv))
