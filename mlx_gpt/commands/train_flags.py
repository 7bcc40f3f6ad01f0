"""The flags of ``mlx-gpt train``."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from tyro.conf import Suppress, arg

from mlx_gpt.commands.given import refuse_idle
from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.files import expand_user
from mlx_gpt.text.corpora import CORPORA
from mlx_gpt.text.pipes import is_pipe
from mlx_gpt.text.records import SUFFIXES, TEXT
from mlx_gpt.train.auto.model_size import SIZE_FIELDS
from mlx_gpt.train.config import LENGTHS, LIMITS, TrainConfig

if TYPE_CHECKING:
    from mlx_gpt.text.tokenizer import Tokenizer

PRESET = "tiny"
SCRATCH = "scratch"
ARCHITECTURE = tuple(field.name for field in fields(GPTConfig) if field.name != "vocab_size")
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # may differ from the model to start from
TRAINING = tuple(field.name for field in fields(TrainConfig))
OTHERS = ("data", "val_data", "field", "out", "init", "revision", "tokenizer", "preset", "prompt", "report_to")
# What is chosen automatically, which the help says instead of a default.
CHOSEN_SIZES = (*SIZE_FIELDS, "embd_pdrop", "resid_pdrop")
CHOSEN_TRAINING = ["optimizer", "learning_rate", "muon_iterations", "steps", "batch_size", "accumulate", "patience"]
CHOSEN_TRAINING += ["eval_every", "eval_windows", "final_windows", "checkpoint_every"]
MUON = [name for name in TRAINING if name.startswith("muon_")]
FILE_MAY_SET = {*OTHERS, *ARCHITECTURE, *TRAINING}
# The settings of a file that a flag replaces.
REPLACES = dict.fromkeys(LIMITS, LIMITS) | {"preset": ("preset", *ARCHITECTURE)}


@dataclass(frozen=True)
class Architecture(GPTConfig):
    """The flags of an architecture: ``GPTConfig`` without the vocabulary size, which the tokenizer determines."""

    vocab_size: Suppress[int] = GPTConfig.vocab_size

    @classmethod
    def of(cls, config: GPTConfig) -> Architecture:
        return cls(**asdict(config))

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**asdict(self))


@dataclass(frozen=True)
class Training(TrainConfig):
    """The flags of the settings of a training run."""


def _mark(flags: type, config: type, marks: Mapping[str, str | Callable[[str], str]]) -> None:
    """Set what the help of some flags has in the place of a default."""
    hints = get_type_hints(config)
    flags.__annotations__ |= {name: Annotated[hints[name], arg(help_behavior_hint=marks[name])] for name in marks}


_mark(Architecture, GPTConfig, dict.fromkeys(CHOSEN_SIZES, "(chosen for text, machine and time; preset: {})".format))
_mark(Training, TrainConfig, dict.fromkeys(CHOSEN_TRAINING, "(chosen for text, machine and time)"))
_mark(Training, TrainConfig, {"minutes": "(10 for the whole command if no length is given)"})


Flags = TypeVar("Flags", bound="TrainFlags")


@dataclass(frozen=True)
class TrainFlags:
    """The flags, with the names of those ``given``, and of those ``typed``: not read from a file."""

    data: Annotated[
        str,
        arg(
            help=f"a file, folder or glob of {', '.join(SUFFIXES)}, compressed or not; - for stdin; a prepared folder; "
            f"or {', '.join(CORPORA)}"
        ),
    ]
    out: Path
    """a new folder for the model, metrics.jsonl and loss.png; runs/NAME-OF-THE-DATA unless given"""
    resume: Path | None = None
    """the folder of a run to resume, without other flags; only --steps, --tokens, --epochs or --minutes may be given: a
    new total, counted from the beginning of the run, which extends it with its optimizer"""
    config: Path | None = None
    """a file of settings, such as the run.toml of a run; other flags override it"""
    init: str = SCRATCH
    """scratch, or the folder or hub id of a model to start from, which sets architecture and tokenizer"""
    revision: str | None = None
    """a branch, tag or commit on the hub of the model to start from"""
    tokenizer: str | None = None
    """gpt2, bytes, or bpe:N: N ids learned from the text; or a model that generate opens, or a tokenizer.json;
    chosen automatically if neither data nor model has one"""
    preset: Annotated[
        str, arg(help=f"a model size: {', '.join(PRESETS)}", help_behavior_hint="(chosen automatically)")
    ] = PRESET
    val_data: str | None = None
    """a file, folder or glob of text for validation, instead of a tenth of the data"""
    text_field: Annotated[str, arg(name="field")] = TEXT
    """the field of a JSON record, or the column of a table, that has the text"""
    prompt: str = ""
    """the beginning of the samples during training"""
    report_to: str = ""
    """tensorboard or wandb: also send the metrics there"""
    allow_sleep: bool = False
    """let a Mac fall asleep when it is idle, which stops the training until it wakes"""
    model: Annotated[Architecture, arg(name="")] = field(default_factory=lambda: Architecture.of(PRESETS[PRESET]))
    training: Annotated[Training, arg(name="")] = field(default_factory=Training)
    given: Suppress[frozenset[str]] = frozenset()
    typed: Suppress[frozenset[str]] = frozenset()

    def settings(self) -> dict[str, Any]:
        """Return all settings that repeat the run, by the names of the flags."""
        settings = {"data": _absolute(self.data), "init": _absolute(self.init), "tokenizer": self._tokenizer()}
        settings |= {"val_data": self.val_data and _absolute(self.val_data)}
        settings |= {
            "field": self.text_field if self.text_field != TEXT else None,
            "revision": self.revision,
            "prompt": self.prompt,
            "report_to": self.report_to or None,
        }
        settings |= {name: getattr(self.model, name) for name in ARCHITECTURE} | asdict(self.training)
        return {name: value for name, value in settings.items() if value is not None}

    def check_effects(self) -> None:
        """Raise ``UsageError`` for a flag on the command line that has no effect beside the other settings."""
        idle = {name: "without --optimizer muon" for name in MUON if self.training.optimizer != "muon"}
        idle |= {name: "with --eval-every 0" for name in ("prompt", "eval_windows") if not self.training.eval_every}
        refuse_idle(self.typed, idle)

    def _tokenizer(self) -> str | None:
        from mlx_gpt.text.tokenizer import is_made

        return self.tokenizer if self.tokenizer is None or is_made(self.tokenizer) else _absolute(self.tokenizer)

    def has_tokenizer(self) -> bool:
        """Return True if a tokenizer is given, or the text or the model to start from has one."""
        from mlx_gpt.text.prepare import is_prepared

        return self.tokenizer is not None or self.init != SCRATCH or is_prepared(expand_user(self.data))

    def with_settings(self: Flags, settings: Mapping[str, Any]) -> Flags:
        """The same flags with other settings."""
        own = {name: value for name, value in settings.items() if name == "tokenizer"}
        model = {name: value for name, value in settings.items() if name in ARCHITECTURE}
        training = {name: value for name, value in settings.items() if name in TRAINING}
        if self.given.isdisjoint(LENGTHS):  # then --minutes limits the whole command
            training = {"minutes": None} | training
        return replace(self, model=replace(self.model, **model), training=replace(self.training, **training), **own)

    def with_architecture(self: Flags, config: GPTConfig, tokenizer: Tokenizer) -> Flags:
        """The same flags with the architecture of the model to start from; only dropout may differ.

        Raises ``UsageError`` if a given flag contradicts the model.
        """
        from mlx_gpt.store.find_tokenizer import find_tokenizer
        from mlx_gpt.text.tokenizer import make_tokenizer

        given = {*ARCHITECTURE} if "preset" in self.given else self.given & {*ARCHITECTURE}
        wrong = [
            f"--{name.replace('_', '-')} {getattr(self.model, name)} (it has {getattr(config, name)})"
            for name in ARCHITECTURE
            if name in given - {*DROPOUT} and getattr(self.model, name) != getattr(config, name)
        ]
        if self.tokenizer:
            named = find_tokenizer(self.tokenizer)
            if isinstance(named, str) and not named.startswith("bpe:"):
                named = make_tokenizer(named, [])
            if isinstance(named, str) or named.hash != tokenizer.hash:
                wrong.append(f"--tokenizer {self.tokenizer} (it has its own)")
        if wrong:
            raise UsageError(f"--init {self.init} sets architecture and tokenizer; remove {', '.join(wrong)}")
        dropout = {name: getattr(self.model, name) for name in self.given & {*DROPOUT}}
        return replace(self, model=Architecture.of(replace(config, **dropout)))


def _absolute(name: str) -> str:
    """Make the name of a file, folder or glob independent of the working directory; keep other names."""
    path = expand_user(name)
    return str(path.absolute()) if path.exists() or glob.has_magic(name) else name


def default_out(data: str) -> Path:
    """Return the folder of a run on this data: ``runs`` and the name of the file, without its suffix, or folder."""
    if is_pipe(data):
        return Path("runs", "mine")
    path = expand_user(data).absolute()
    named = (part for part in (path, *path.parents) if part.name and not glob.has_magic(part.name))
    part = next(named, Path("mine"))
    return Path("runs", part.name if part.is_dir() else part.stem)
