"""``mlx-gpt lens``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from mlx_gpt.commands.generate import check_writable, prompt_ids, prompt_text
from mlx_gpt.commands.generation_flags import Flag, load_quantized, note
from mlx_gpt.commands.given import refuse_idle
from mlx_gpt.errors import UsageError
from mlx_gpt.files import expand_user
from mlx_gpt.generate.settings import Number
from mlx_gpt.terminal import make_console
from mlx_gpt.text.pipes import STDIN

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Token = Annotated[str | None, arg(metavar="TOKEN", help_behavior_hint="")]
File = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]
WIDTH = 150  # of tables in a file or pipe
TEXT_OPTIONAL = ("heads", "circuits")


@dataclass(frozen=True)
class ViewFlags:
    """Options of views, named in brackets."""

    layer: Number = None
    """[attention, circuits] a layer, from 0"""
    head: Number = None
    """[attention, circuits] a head of it, from 0"""
    scores: Flag = False
    """[attention] also the scores before the softmax"""
    answer: Token = None
    """[attribution, neurons, patch] a next token, with its space, such as " Mary"; default the most probable"""
    wrong: Token = None
    """[attribution, neurons, patch] one to subtract; default the second, for patch the corrupted text's"""
    ablate: Name = None
    """[heads] what replaces a head: zero (the default), mean, or resample (its output in another text)"""
    corrupted: Text = None
    """[patch] a text of as many tokens in which activations of the text are put"""
    part: Name = None
    """[patch] resid_pre (the default), attn_out or mlp_out"""
    path: Annotated[tuple[str, str] | None, arg(metavar="FROM TO", help_behavior_hint="")] = None
    """[patch] two components, such as L3H1 L5H0: only what the second reads of the first is changed; also L3MLP, embed
    and logits"""
    estimate: Flag = False
    """[patch] estimate by gradients, with two runs in place of one for each cell"""
    top: Number = None
    """[neurons] how many are shown; default 16"""


@dataclass(frozen=True)
class Lens:
    """Look inside a model: where tokens look, what each layer predicts, what each part adds to a prediction.

    Shows a view of a text as coloured tables, which --out plots and --json prints in full.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    text: Annotated[Positional[str | None], arg(metavar="TEXT", help_behavior_hint="")] = None
    """the text to look at, - for stdin"""
    revision: Name = None
    """a branch, tag or commit on the hub"""
    view: Annotated[str, arg(metavar="VIEW")] = "attention"
    """attention, logit-lens, attribution, heads, patch, neurons or circuits"""
    without: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PART", help_behavior_hint="")] = ()
    """run the model without a part: a head L3H1, a neuron L2N17, L2MLP, L2ATTN, or an activation such as
    blocks.*.hook_mlp_out; may be repeated"""
    generate: Number = None
    """also continue the text by so many tokens, with and without those parts"""
    special: bool = True
    """read special tokens in the text, such as <|endoftext|>, as tokens, not as text"""
    out: File = None
    """write the view as a plot: .png, .pdf or .svg"""
    json: Flag = False
    """print the view as JSON, with every number in full"""
    options: ViewFlags = field(default_factory=ViewFlags)

    def __call__(self) -> None:
        import os

        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # full float32 on M5 and CUDA; read at the first product

        from mlx_gpt.lens.components import without
        from mlx_gpt.lens.views import VIEWS
        from mlx_gpt.lens.views.generated import generated
        from mlx_gpt.lens.views.plot import check_image, plot_view
        from mlx_gpt.lens.views.subject import Subject
        from mlx_gpt.lens.views.terminal import print_view
        from mlx_gpt.lens.views.view import as_json

        options = self._options(VIEWS)
        if self.out is not None:
            check_image(self.out)
            check_writable("--out", self.out)
        text = self._text()
        model, tokenizer = load_quantized(self.model, self.revision)

        def ids_of(text: str) -> list[int]:
            return tokenizer.as_prompt(prompt_ids(tokenizer, text, self.special)) if text else []

        subject = Subject(model, tokenizer, ids_of(text), without(model, self.without))
        if "corrupted" in options:
            options["corrupted"] = ids_of(options["corrupted"])
        with make_console(stderr=True).status("computing"):
            view = VIEWS[self.view](subject, **options)
            parts = " and ".join(self.without)
            view = replace(view, title=f"{view.title}, without {parts}" if parts else view.title)
            if self.generate is not None:
                view = view.followed_by(generated(subject, self.generate, parts))
        if self.json:
            tokens = {"ids": subject.ids, "tokens": subject.labels(subject.ids)}
            print(as_json(view, view=self.view, model=self.model, without=self.without, **tokens))
        else:
            print_view(make_console(width=None if sys.stdout.isatty() else WIDTH), view)
        if self.out is not None:
            plot_view(view, expand_user(self.out))
            note(f"{self.out}: written")

    def _options(self, views: Mapping[str, Any]) -> dict[str, Any]:
        """Return the given options of the view. Raises ``UsageError`` for those that it does not have, or lacks."""
        if self.view not in views:
            close = get_close_matches(self.view, views, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"--view {self.view}: expected one of {', '.join(views)}{hint}")
        known = inspect.signature(views[self.view]).parameters
        given = {name: value for name, value in vars(self.options).items() if value is not None and value is not False}
        refuse_idle(given, dict.fromkeys(given.keys() - known.keys(), f"with --view {self.view}"))
        required = [name for name, parameter in known.items() if parameter.default is parameter.empty][1:]
        if missing := [f"--{name}" for name in required if name not in given]:
            raise UsageError(f"--view {self.view} needs {' and '.join(missing)}")
        if self.without and self.view == "circuits" and self.generate is None:
            raise UsageError("--without has no effect with --view circuits, which reads weights; remove one of them")
        if self.generate is not None and self.generate < 1:
            raise UsageError(f"--generate must be 1 or above, not {self.generate}")
        return given

    def _text(self) -> str:
        """Return the text, or "" where the view needs none. Raises ``UsageError``, as ``prompt_text`` does."""
        needs = self.view not in TEXT_OPTIONAL or self.generate is not None
        if self.text is None and not needs:
            return ""
        text = prompt_text(None if self.text == STDIN else self.text, STDIN if self.text == STDIN else None)
        if not text:
            raise UsageError(f"--view {self.view} needs a text: give one after the model, - for stdin")
        return text
