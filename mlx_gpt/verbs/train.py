"""``mlx-gpt train``."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Suppress, arg

from mlx_gpt.config import PRESETS, GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.train.config import LENGTHS, STEPS, TrainConfig
from mlx_gpt.verbs.flags import given, option, with_file

if TYPE_CHECKING:
    import mlx.core as mx
    from rich.console import Console

    from mlx_gpt.model.gpt import GPT
    from mlx_gpt.store.checkpoint import Checkpoint
    from mlx_gpt.text.tokenizer import Tokenizer
    from mlx_gpt.train.material import Material

PRESET = "tiny"
SCRATCH = "scratch"
TOKENIZER = "bpe:1024"
ARCHITECTURE = tuple(field.name for field in fields(GPTConfig) if field.name != "vocab_size")
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")  # not the weights' concern
FILE_MAY_SET = {"data", "out", "init", "revision", "tokenizer", "preset", "prompt", "report_to", *ARCHITECTURE}
FILE_MAY_SET |= {field.name for field in fields(TrainConfig)}
REPLACED = dict.fromkeys(LENGTHS, LENGTHS) | {"preset": ("preset", *ARCHITECTURE)}  # in a file, by this flag


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
    """Train a GPT on a text of yours, go on training one, or go on with a run."""

    data: str
    """a file, folder or glob of .txt, .md, .jsonl or .parquet; what mlx-gpt prepare made; tinyworld, shakespeare ..."""
    out: Path
    """where the model folder, metrics.jsonl and loss.png go: a new folder"""
    resume: Path | None = None
    """the folder of a run to go on with; nothing else is needed"""
    config: Path | None = None
    """a file of settings, such as the run.toml of a run; the flags given beside it win"""
    init: str = SCRATCH
    """scratch, or the folder or hub id of a model to start from, which brings its architecture and tokenizer"""
    revision: str | None = None
    """a branch, tag or commit of the hub's, of the model to start from"""
    tokenizer: str | None = None
    """gpt2, bytes, or bpe:N: N ids learned from the text; bpe:1024 where data and model have none"""
    preset: Annotated[str, arg(help=f"the size that the flags below change: {', '.join(PRESETS)}")] = PRESET
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
        if all(every[name] is None for name in LENGTHS):
            every["steps"] = STEPS
        return {name: value for name, value in every.items() if value is not None}

    def __call__(self) -> None:
        from mlx_gpt.train.distributed import join, peers

        group = join()
        with peers(group):
            self._train(group)

    def _train(self, group: mx.distributed.Group | None) -> None:
        from rich.console import Console

        from mlx_gpt.generate.decode import generate
        from mlx_gpt.train.distributed import is_main, main_first
        from mlx_gpt.train.run import check_new, last_checkpoint, run

        console = Console(quiet=not is_main(group), highlight=False)
        start = None
        if self.resume:
            start = last_checkpoint(self.resume, self.settings(), self.given, console)
        elif is_main(group):
            check_new(self.out)
        with main_first(group):
            model, material = self._prepare(start, console)
        console.print(
            f"{model.n_parameters:,} parameters, {material.train.n_tokens:,} tokens to train on, "
            f"{material.val.n_tokens:,} to measure by, vocabulary {material.tokenizer.vocab_size}"
        )

        generate(model, material.tokenizer, self.prompt)  # too long a prompt is told now, not halfway through

        def sample(step: int, done: float) -> None:
            text = "".join(generate(model, material.tokenizer, self.prompt, max_tokens=60))
            console.print("    " + (self.prompt + text).replace("\n", "\n    "), style="cyan", markup=False)

        used = replace(self, model=Architecture.of(model.config), tokenizer=self._tokenizer())
        look = sample if is_main(group) else None
        result = run(
            model, material, self.training, self.out, console, look, used.settings(), start, group, self.report_to
        )
        marks = ", ".join(f"{name} {loss:.3f}" for name, loss in material.marks.items())
        console.print(f"validation loss {result.val_loss:.4f} nats per token ({marks})")
        console.print(f"model and metrics: {result.folder}   plot: {result.plot}")
        console.print(f'next: mlx-gpt generate {result.folder} --prompt "..."')

    def _prepare(self, start: Checkpoint | None, console: Console) -> tuple[GPT, Material]:
        """The model to train, of a checkpoint, of another model, or new, and the text in its tokens."""
        import mlx.core as mx

        from mlx_gpt.model.gpt import GPT
        from mlx_gpt.store.folder import load
        from mlx_gpt.train.run import new_model

        if start:
            return start.model, self._material(self._tokenizer() or start.tokenizer, console)
        if self.init == SCRATCH:
            if self.revision:
                raise UsageError("--revision is of the model that --init names: give --init too")
            material = self._material(self._tokenizer(), console)
            return new_model(self.model.config, material, self.training.seed), material
        loaded, tokenizer = load(self.init, self.revision)
        self._refuse_contradictions(loaded.config, tokenizer)
        mx.random.seed(self.training.seed)
        dropout = {name: getattr(self.model, name) for name in DROPOUT if name in self.given}
        model = GPT(replace(loaded.config, **dropout))
        model.update(loaded.parameters())
        return model, self._material(tokenizer, console)

    def _tokenizer(self) -> str | None:
        """The tokenizer to make: none where the text or the model to start from has one."""
        from mlx_gpt.text.prepare import is_prepared

        has_one = self.init != SCRATCH or is_prepared(Path(self.data).expanduser())
        return self.tokenizer or (None if has_one else TOKENIZER)

    def _material(self, tokenizer: Tokenizer | str | None, console: Console) -> Material:
        from mlx_gpt.train.material import find_material

        with console.status("reading the text") as status:
            return find_material(
                self.data, tokenizer, lambda n: status.update(f"reading the text: {n / 1e6:,.0f} MB are tokens")
            )

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


def command_line(argv: Sequence[str]) -> tuple[list[str], Train]:
    """The command line with the flags of the file that it names, and what its flags default to.

    The preset is read first, since it decides other defaults.
    """
    argv = with_file(argv, FILE_MAY_SET, REPLACED)
    preset = option(argv, "preset") or PRESET
    model = Architecture.of(GPTConfig.preset(preset))
    return argv, Train(data=tyro.MISSING, out=tyro.MISSING, preset=preset, model=model, given=given(argv))
