"""``mlx-gpt lens``."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from mlx_gpt.commands.generate import check_writable, prompt_ids, prompt_text
from mlx_gpt.commands.generation_flags import Flag, load_quantized, note
from mlx_gpt.commands.given import refuse_idle
from mlx_gpt.errors import UsageError
from mlx_gpt.files import atomic_write, expand_user
from mlx_gpt.generate.settings import Number
from mlx_gpt.terminal import make_console
from mlx_gpt.text.pipes import STDIN

if TYPE_CHECKING:
    from mlx_gpt.model.gpt import GPT
    from mlx_gpt.text.tokenizer import Tokenizer

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Token = Annotated[str | None, arg(metavar="TOKEN", help_behavior_hint="")]
File = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]
WIDTH = 150  # of tables in a file or pipe
TEXT_OPTIONAL = ("heads", "circuits")
OF_VIEW = ("without", "generate", "out", "json")  # flags without effect where no view is shown


@dataclass(frozen=True)
class ViewFlags:
    """Options of views, named in brackets."""

    layer: Number = None
    """[attention, circuits, diagram] a layer, from 0"""
    head: Number = None
    """[attention, circuits, diagram] a head of it, from 0"""
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

    Shows a view of a text as coloured tables, which --out plots and --json prints in full; or writes a page or diagram.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """a folder, a file of weights, or a hub id such as openai-community/gpt2"""
    text: Annotated[Positional[str | None], arg(metavar="TEXT", help_behavior_hint="")] = None
    """the text to look at, - for stdin"""
    texts: Annotated[UseAppendAction[tuple[str, ...]], arg(name="text", metavar="TEXT", help_behavior_hint="")] = ()
    """the same as a flag; for --page it may be repeated"""
    revision: Name = None
    """a branch, tag or commit on the hub"""
    view: Name = None
    """attention (the default), logit-lens, attribution, heads, patch, neurons or circuits"""
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
    page: File = None
    """write one HTML file that shows and computes all of it in a browser, offline"""
    diagram: File = None
    """write the model's architecture as an SVG, with a text also its norms and a pattern"""
    to_scale: Flag = False
    """[diagram] add areas in proportion to parameters, FLOPs and activations"""
    views: ViewFlags = field(default_factory=ViewFlags)

    def __call__(self) -> None:
        from mlx_gpt.lens.views import VIEWS
        from mlx_gpt.lens.views.plot import check_image

        view = self.view
        if all(part is None for part in (view, self.page, self.diagram)):
            view = "attention"
        options = self._options(view, VIEWS)
        if self.out is not None:
            check_image(self.out)
        for flag in ("out", "page", "diagram"):
            if (file := getattr(self, flag)) is not None:
                check_writable(f"--{flag}", file)
        texts = self._texts(view)
        model, tokenizer = load_quantized(self.model, self.revision, dtype="float32")
        if self.diagram is not None:
            self._write_diagram(expand_user(self.diagram), model, tokenizer, texts)
        if self.page is not None:
            from mlx_gpt.lens.page import make_page

            with make_console(stderr=True).status("computing"):
                page, remark = make_page(model, tokenizer, texts, self._name())
            atomic_write(expand_user(self.page), page)
            note(f"{self.page}: {remark}")
        if view is not None:
            self._show(view, options, model, tokenizer, texts[0] if texts else "")

    def _show(self, name: str, options: dict[str, Any], model: GPT, tokenizer: Tokenizer, text: str) -> None:
        """Show a view on stdout, and as a plot."""
        from mlx_gpt.lens.components import without
        from mlx_gpt.lens.views import VIEWS
        from mlx_gpt.lens.views.generated import generated
        from mlx_gpt.lens.views.plot import plot_view
        from mlx_gpt.lens.views.subject import Subject
        from mlx_gpt.lens.views.terminal import print_view
        from mlx_gpt.lens.views.view import as_json

        def ids_of(text: str) -> list[int]:
            return tokenizer.as_prompt(prompt_ids(tokenizer, text, self.special)) if text else []

        subject = Subject(model, tokenizer, ids_of(text), without(model, self.without))
        if "corrupted" in options:
            options["corrupted"] = ids_of(prompt_text(options["corrupted"], None))
        with make_console(stderr=True).status("computing"):
            view = VIEWS[name](subject, **options)
            parts = " and ".join(self.without)
            view = replace(view, title=f"{view.title}, without {parts}" if parts else view.title)
            if self.generate is not None:
                view = view.followed_by(generated(subject, self.generate, parts))
        if self.out is not None:  # before stdout, whose reader may leave
            plot_view(view, expand_user(self.out))
            note(f"{self.out}: written")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # characters outside its encoding become ?
        if self.json:
            tokens = {"ids": subject.ids, "tokens": subject.labels(subject.ids)}
            print(as_json(view, view=name, model=self.model, without=self.without, **tokens))
        else:
            print_view(make_console(width=None if sys.stdout.isatty() else WIDTH), view)

    def _write_diagram(self, file: Path, model: GPT, tokenizer: Tokenizer, texts: list[str]) -> None:
        import os
        from urllib.parse import quote

        from mlx_gpt.lens.diagram import draw_diagram

        code = os.path.relpath(Path(__file__).parents[2], os.path.realpath(file.parent))  # links are relative
        text, layer, head = texts[0] if texts else None, self.views.layer or 0, self.views.head or 0
        svg = draw_diagram(
            model,
            tokenizer,
            text,
            name=self._name(),
            to_scale=self.to_scale,
            layer=layer,
            head=head,
            code=quote(Path(code).as_posix()),
        )
        atomic_write(file, svg)
        note(f"{self.diagram}: written")

    def _name(self) -> str:
        """Return the model's name in a page or diagram: that of its folder or file, or the hub id."""
        path = expand_user(self.model)
        return path.resolve().name if path.exists() else self.model

    def _options(self, view: str | None, views: Mapping[str, Any]) -> dict[str, Any]:
        """Return the given options of a view. Raises ``UsageError`` for those that have no effect, or are missing."""
        if self.to_scale and self.diagram is None:
            raise UsageError("--to-scale has no effect without --diagram; remove one of them")
        given = {name: value for name, value in vars(self.views).items() if value is not None and value is not False}
        of_diagram = {"layer", "head"} if self.diagram is not None else set()
        if view is None:
            of_view = [*given.keys() - of_diagram, *(name for name in OF_VIEW if getattr(self, name))]
            refuse_idle(of_view, dict.fromkeys(of_view, "without --view"))
            return {}
        if view not in views:
            close = get_close_matches(view, views, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"--view {view}: expected one of {', '.join(views)}{hint}")
        known = inspect.signature(views[view]).parameters
        refuse_idle(given, dict.fromkeys(given.keys() - known.keys() - of_diagram, f"with --view {view}"))
        required = [name for name, parameter in known.items() if parameter.default is parameter.empty][1:]
        if missing := [f"--{name}" for name in required if name not in given]:
            raise UsageError(f"--view {view} needs {' and '.join(missing)}")
        if self.without and view == "circuits" and self.generate is None:
            raise UsageError("--without has no effect with --view circuits, which reads weights; remove one of them")
        if self.generate is not None and self.generate < 1:
            raise UsageError(f"--generate must be 1 or above, not {self.generate}")
        return {name: value for name, value in given.items() if name in known}

    def _texts(self, view: str | None) -> list[str]:
        """Return the given texts, that of a pipe where the view needs one. ``UsageError`` for too many or none."""
        given: list[str | None] = [text for text in (self.text, *self.texts) if text is not None]
        needs = view is not None and (view not in TEXT_OPTIONAL or self.generate is not None)
        if view is not None and len(given) > 1:
            raise UsageError(f"a view shows one text, not {len(given)}; leave out the others")
        texts = [prompt_text(*((None, STDIN) if text == STDIN else (text, None))) for text in given or [None] * needs]
        if not all(texts):
            raise UsageError("the text is empty; give one after the model, or - for stdin")
        return texts
