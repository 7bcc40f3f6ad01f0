"""The views show what the readings compute, and the terminal, the plot and JSON show the views."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import random_model
from rich.cells import cell_len
from rich.console import Console

from mlx_gpt.errors import UsageError
from mlx_gpt.lens import (
    ablate_heads,
    activation_patching,
    attention_entropy,
    attribution_patching,
    first_token_mass,
    generate,
    head_scores,
    logit_difference,
    path_patching,
    qk_circuit,
    trace,
)
from mlx_gpt.lens.components import find_component, without
from mlx_gpt.lens.heads import KINDS
from mlx_gpt.lens.views import VIEWS
from mlx_gpt.lens.views.generated import generated
from mlx_gpt.lens.views.plot import SUFFIXES, plot_view
from mlx_gpt.lens.views.subject import Subject, token_label
from mlx_gpt.lens.views.terminal import print_view
from mlx_gpt.lens.views.view import POSITION, SCALES, Table, View, as_json
from mlx_gpt.text.tokenizer import Tokenizer

MODEL, TOKENIZER = random_model(vocab_size=257), Tokenizer.bytes()
L, H = MODEL.config.n_layer, MODEL.config.n_head
TEXT, CORRUPTED, X, Y = (TOKENIZER.encode(text) for text in ("a tall tree", "a tall wall", "x", "y"))
SUBJECT = Subject(MODEL, TOKENIZER, TEXT)
EDITED = replace(SUBJECT, edits=without(MODEL, ["L1H2", "L0MLP"]))
OPTIONS: dict[str, dict[str, Any]] = {"patch": {"corrupted": CORRUPTED}, "circuits": {"layer": 1, "head": 1}}
BOTH = pytest.mark.parametrize("subject", [SUBJECT, EDITED], ids=["plain", "edited"])


@pytest.fixture(scope="module")
def views() -> dict[str, View]:
    return {name: view(SUBJECT, **OPTIONS.get(name, {})) for name, view in VIEWS.items()}


def logits_of(subject: Subject) -> np.ndarray:
    return np.array(subject.trace()[0][0])


# What the views show


@BOTH
def test_attention_shows_the_pattern_and_nothing_of_the_future(subject: Subject) -> None:
    overview, pattern, scores = VIEWS["attention"](subject, scores=True).tables
    assert len(overview.rows) == L * H
    layer, head = find_component(MODEL, overview.rows[0])
    assert pattern.title.startswith(f"pattern of {overview.rows[0]},")
    expected = subject.trace("*attn.hook_pattern")[1][layer.replace("hook_z", "hook_pattern")][0, head]
    lower = np.tri(len(TEXT), dtype=bool)
    np.testing.assert_allclose(pattern.values[lower], np.array(expected)[lower], atol=1e-6)
    assert np.isnan(pattern.values[~lower]).all()
    assert np.isnan(scores.values[~lower]).all()
    of_first = (
        np.array([row[0] for row in np.array(expected)[1:]]),
        np.diagonal(expected)[1:],
        np.diagonal(expected, -1),
    )
    np.testing.assert_allclose(overview.values[0, 1:], [weights.mean() for weights in of_first], atol=1e-6)
    earlier = pattern.values[2:, 1:-1][np.tri(len(TEXT) - 2, dtype=bool)]
    assert overview.values[0, 0] == earlier.max() == np.nanmax(overview.values[:, 0])


def test_attention_of_a_layer_shows_all_its_heads_and_of_a_head_only_that() -> None:
    assert len(VIEWS["attention"](SUBJECT, layer=2).tables) == 1 + H
    (table,) = VIEWS["attention"](SUBJECT, layer=2, head=1).tables
    assert table.title.startswith("pattern of L2H1")


@BOTH
def test_the_last_row_of_the_logit_lens_is_the_output(subject: Subject) -> None:
    tokens, ranks = VIEWS["logit-lens"](subject).tables
    logits = logits_of(subject)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(tokens.values[-1], probabilities.max(-1), rtol=1e-4)
    assert tokens.texts is not None
    assert tokens.texts[-1] == subject.labels(logits.argmax(-1))
    assert tokens.values.shape == ranks.values.shape == (L + 1, len(TEXT))
    assert (ranks.values[-1] == 1).all()
    x = subject.trace("blocks.1.hook_resid_pre")[1]["blocks.1.hook_resid_pre"]
    early = np.array(MODEL.logits(MODEL.ln_f(x))[0])
    assert ranks.values[1, 3] == 1 + (early[3] > early[3, logits[3].argmax()]).sum()


@BOTH
def test_the_parts_of_an_attribution_sum_to_the_difference_of_the_logits(subject: Subject) -> None:
    layers, rest = VIEWS["attribution"](subject, answer="x", wrong="y").tables
    difference = logits_of(subject)[-1, X[0]] - logits_of(subject)[-1, Y[0]]
    parts = dict(zip(rest.rows, rest.values[:, 0], strict=True))
    assert parts["sum"] == pytest.approx(difference, abs=1e-4)
    assert parts["all layers"] == pytest.approx(layers.values[:, :-1].sum(), abs=1e-4)
    if subject is EDITED:
        assert layers.values[1, 2] == 0
        assert layers.values[0, list(layers.columns).index("MLP")] == 0
        assert parts["removed"] == pytest.approx(0, abs=1e-4)


def test_what_no_part_adds_after_an_edit_of_the_stream_is_shown() -> None:
    subject = replace(SUBJECT, edits=without(MODEL, ["blocks.1.hook_resid_mid"]))
    _, rest = VIEWS["attribution"](subject, answer="x", wrong="y").tables
    parts = dict(zip(rest.rows, rest.values[:, 0], strict=True))
    assert abs(parts["removed"]) > 0.01
    assert parts["sum"] == pytest.approx(logits_of(subject)[-1, X[0]] - logits_of(subject)[-1, Y[0]], abs=1e-4)


def test_by_default_the_two_most_probable_tokens_are_compared() -> None:
    first, second = np.argsort(-logits_of(SUBJECT)[-1])[:2].tolist()
    assert SUBJECT.pair(None, None) == (first, second)
    assert EDITED.pair(None, None) == (first, second)
    assert SUBJECT.pair(None, "x") == (first, *X)
    assert SUBJECT.pair("y", "x") == (*Y, *X)


def test_the_answer_is_not_the_token_that_is_subtracted() -> None:
    subjects = (Subject(MODEL, TOKENIZER, TOKENIZER.encode(letter)) for letter in ascii_letters)
    subject, text = next((s, text) for s in subjects if (text := TOKENIZER.decode(s.pair(None, None)[:1])).isascii())
    first, second = subject.pair(None, None)
    assert subject.pair(None, text) == (second, first)
    assert subject.pair(text, None) == (first, second)


@BOTH
@pytest.mark.parametrize("has_text", [True, False])
def test_heads_shows_scores_and_ablation_of_each_head(subject: Subject, has_text: bool) -> None:
    if not has_text:
        subject = replace(subject, ids=[])
    (table,) = VIEWS["heads"](subject).tables
    scores = head_scores(MODEL, MODEL.config.n_positions // 2, edits=subject.edits)
    for row, name in enumerate(table.rows):
        layer, head = (int(part) for part in name[1:].split("H"))
        found = [scores[kind][layer, head].item() for kind in scores]
        np.testing.assert_allclose(table.values[row, :3], found, atol=1e-5)
    if has_text:
        loss = np.array(ablate_heads(MODEL, [TEXT], edits=subject.edits))
        assert table.values[:, -1].max() == pytest.approx(loss.max(), abs=1e-5)
    assert (np.diff(table.values[:, :3].max(axis=1)) <= 0).all()


def test_means_of_a_text_leave_out_the_query_that_sees_only_itself() -> None:
    (table,) = VIEWS["heads"](SUBJECT).tables
    _, activations = SUBJECT.trace("*hook_pattern")
    for column, reading in (("entropy", attention_entropy), ("first token", first_token_mass)):
        expected = np.sort(np.array(reading(activations))[:, 0, :, 1:].mean(-1).flatten())
        np.testing.assert_allclose(np.sort(table.values[:, table.columns.index(column)]), expected, atol=1e-6)


def test_a_score_near_that_of_even_attention_is_no_head_of_the_kind() -> None:
    even = {"blocks.*.attn.hook_attn_scores": lambda scores, _: mx.where(mx.isinf(scores), scores, 0)}
    view = VIEWS["heads"](replace(SUBJECT, edits=even))
    (table,) = view.tables
    scores = ", ".join(f"{kind} {x:.3f}" for kind, x in zip(KINDS, table.values[0], strict=False))
    absent = ", ".join(f"no {kind} head" for kind in KINDS)
    assert view.remarks[-1] == f"Evenly spread attention scores {scores}; near that, there is {absent}."
    copying = {
        "blocks.1.attn.hook_pattern": lambda pattern, _: mx.broadcast_to(mx.eye(pattern.shape[-1], k=-1), pattern.shape)
    }
    remark = VIEWS["heads"](replace(SUBJECT, edits=copying)).remarks[-1]
    assert "no previous token head" not in remark
    assert "no induction head" in remark


@pytest.mark.parametrize("ablate", ["mean", "resample"])
@pytest.mark.parametrize("ids", [TEXT, []], ids=["text", "no text"])
def test_heads_are_ablated_in_every_way(ablate: str, ids: list[int]) -> None:
    (table,) = VIEWS["heads"](replace(SUBJECT, ids=ids), ablate).tables
    assert np.isfinite(table.values).all()


@BOTH
@pytest.mark.parametrize("estimate", [False, True])
def test_patching_shows_the_change_of_the_logit_difference(subject: Subject, estimate: bool) -> None:
    view = VIEWS["patch"](subject, CORRUPTED, "x", "y", "mlp_out", estimate=estimate)
    metric = logit_difference(X[0], Y[0])
    base = metric(trace(MODEL, [CORRUPTED], subject.edits, ())[0]).item()
    run = attribution_patching if estimate else activation_patching
    for table, name, over in zip(view.tables, ("hook_mlp_out", "attn.hook_z"), ("position", "head"), strict=True):
        expected = np.array(run(MODEL, [TEXT], [CORRUPTED], metric, name, (over,), edits=subject.edits))
        np.testing.assert_allclose(table.values, expected - (0 if estimate else base), atol=1e-5)
    assert view.tables[0].columns[7] == "7 t|w"


@BOTH
def test_a_path_is_patched_into_queries_keys_and_values(subject: Subject) -> None:
    (table,) = VIEWS["patch"](subject, CORRUPTED, "x", "y", path=("L0H1", "L2H3")).tables
    metric = logit_difference(X[0], Y[0])
    base = metric(trace(MODEL, [CORRUPTED], subject.edits, ())[0]).item()
    for letter, value in zip("qkv", table.values[0], strict=True):
        ends = ("blocks.0.attn.hook_z", 1), (f"blocks.2.attn.hook_{letter}", 3)
        expected = path_patching(MODEL, [CORRUPTED], [TEXT], *ends, metric, edits=subject.edits).item() - base
        assert value == pytest.approx(expected, abs=1e-5)
    if subject is SUBJECT:
        assert np.abs(table.values).max() > 1e-3


@pytest.mark.parametrize("path", [("embed", "L1MLP"), ("L1H0", "L1MLP"), ("L0MLP", "logits"), ("embed", "logits")])
def test_a_path_may_begin_at_the_embedding_and_end_at_an_mlp_or_the_logits(path: tuple[str, str]) -> None:
    (table,) = VIEWS["patch"](SUBJECT, CORRUPTED, "x", "y", path=path).tables
    assert table.values.shape == (1, 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("L2H0", "L1H0"), "L1H0 does not read L2H0: a path leads to a later layer"),
        (("L1MLP", "L1H0"), "L1H0 does not read L1MLP"),
        (("L1H1", "L1H0"), "L1H0 does not read L1H1"),
        (("logits", "L1H0"), "L1H0 does not read logits"),
        (("L1N3", "L2H0"), "a path leads between heads (L3H1), MLPs (L3MLP), embed and logits, not 'L1N3'"),
        (("*hook_z", "L2H0"), "not '*hook_z'"),
        (("L9H0", "L2H0"), f"layer must be between 0 and {L - 1}, not 9"),
    ],
)
def test_an_impossible_path_is_refused(path: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        VIEWS["patch"](SUBJECT, CORRUPTED, "x", "y", path=path)
    assert message in str(error.value)


@BOTH
def test_neurons_shows_the_largest_contributions_of_all(subject: Subject) -> None:
    (table,) = VIEWS["neurons"](subject, "x", "y", top=5).tables
    inner = MODEL.h[0].mlp.c_fc.bias.shape[0]
    (all_,) = VIEWS["neurons"](subject, "x", "y", top=L * inner).tables
    assert len(all_.rows) == L * inner
    assert list(table.rows) == list(all_.rows[:5])
    assert (np.diff(np.abs(all_.values[:, 0])) <= 0).all()
    layer, neuron = (int(part) for part in table.rows[0][1:].split("N"))
    post = subject.trace(f"blocks.{layer}.mlp.hook_post")[1][f"blocks.{layer}.mlp.hook_post"]
    assert table.values[0, 1] == pytest.approx(post[0, -1, neuron].item(), abs=1e-5)


def test_circuits_shows_the_highest_pairs_and_composition() -> None:
    qk, _, _, _, reads, is_read = VIEWS["circuits"](SUBJECT, 1, 1).tables
    product = np.array(qk_circuit(MODEL, 1, 1, tokens=True, fold_norm=True).product)
    row, column = np.unravel_index(product.argmax(), product.shape)
    assert qk.values[0, 0] == pytest.approx(product.max(), rel=1e-4)
    assert qk.notes is not None
    assert qk.notes[0] == " → ".join(SUBJECT.labels([row, column]))
    assert {name[:2] for name in reads.rows} == {"L0"}
    assert {name[:2] for name in is_read.rows} == {"L2"}
    assert len(VIEWS["circuits"](SUBJECT, L - 1, 0).tables) == 5  # read by none


def test_text_is_generated_with_and_without_a_part() -> None:
    (table,) = generated(EDITED, 5, "L1H2").tables
    assert table.texts is not None
    assert list(table.rows) == ["as it is", "without L1H2"]
    for texts, values, edits in zip(table.texts, table.values, ({}, EDITED.edits), strict=True):
        new = np.array(generate(MODEL, [TEXT], 5, edits=edits)[0])
        assert list(texts) == SUBJECT.labels(new)
        logits = trace(MODEL, [[*TEXT, *new[:-1].tolist()]], edits, ())[0][0, -5:]
        expected = mx.softmax(logits, axis=-1)[mx.arange(5), mx.array(new)]
        np.testing.assert_allclose(values, np.array(expected), rtol=1e-4)
    assert list(generated(SUBJECT, 2, "").tables[0].rows) == ["as it is"]


# Parts by short names


def test_removed_parts_are_zero_and_others_are_not() -> None:
    names = ["L1H2", "L1H0", "L2N5", "l0mlp", "blocks.*.attn.hook_v"]
    _, found = trace(MODEL, [TEXT], without(MODEL, names))
    z, post = np.array(found["blocks.1.attn.hook_z"]), np.array(found["blocks.2.mlp.hook_post"])
    assert not z[:, :, [0, 2]].any()
    assert not post[..., 5].any()
    assert (post[..., [4, 6]] != 0).any()
    assert not np.array(found["blocks.0.hook_mlp_out"]).any()
    assert not np.array(found["blocks.2.attn.hook_v"]).any()
    assert np.array(found["blocks.1.hook_mlp_out"]).any()


def test_scores_set_to_zero_stay_masked() -> None:
    _, found = trace(MODEL, [TEXT], without(MODEL, ["blocks.1.attn.hook_attn_scores"]))
    expected = np.tri(len(TEXT)) / np.arange(1, len(TEXT) + 1)[:, None]
    np.testing.assert_allclose(np.array(found["blocks.1.attn.hook_pattern"])[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("L3H0", f"layer must be between 0 and {L - 1}, not 3"),
        ("L0H4", f"head must be between 0 and {H - 1}, not 4"),
        ("L0N128", "neuron must be between 0 and 127, not 128"),
        ("L0", "'L0': expected a head (L3H1), a neuron (L3N17), L3MLP, L3ATTN or an activation"),
        ("blocks.0.hook_mlp_ot", "the closest is 'blocks.0.hook_mlp_out'"),
        ("blocks.*.ln1.*", "blocks.*.ln1.* cannot be zero: a norm divides by blocks.0.ln1.hook_scale"),
    ],
)
def test_an_unknown_part_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        without(MODEL, [name])
    assert message in str(error.value)


# Tokens


@pytest.mark.parametrize(
    ("text", "label"),
    [(" tree", "·tree"), ("\n", r"\n"), ("\x1b[2J", r"\x1b[2J"), ("\u202e", r"\u202e"), ("  ", "· "), ("é", "é")],
)
def test_a_label_is_printable(text: str, label: str) -> None:
    class One:
        def token_bytes(self, token_id: int) -> bytes:
            return text.encode()

    assert token_label(One(), 0) == label  # type: ignore[arg-type]


def test_bytes_that_are_no_character_are_shown_as_bytes_beside_characters() -> None:
    class One:
        def token_bytes(self, token_id: int) -> bytes:
            return " \u202eé".encode() + b"\xf0\x9f"

    assert token_label(One(), 0) == r"·\u202eé\xf0\x9f"  # type: ignore[arg-type]


def test_bytes_that_are_no_character_and_ids_without_a_token_have_labels() -> None:
    assert SUBJECT.labels([*TOKENIZER.encode("😀"), 256, 300]) == [
        r"\xf0",
        r"\x9f",
        r"\x98",
        r"\x80",
        "<|endoftext|>",
        "id 300",
    ]


# Showing


def printed(view: View, width: int = 80, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, **options)
    print_view(console, view)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_pipe_gets_plain_text_and_no_colour_is_respected(
    views: dict[str, View], monkeypatch: pytest.MonkeyPatch
) -> None:
    for view in views.values():
        plain = printed(view)
        assert "\x1b" not in "".join(plain)
        coloured = printed(view, force_terminal=True, color_system="256")
        assert "\x1b[" in "".join(coloured)
        assert ";48;5;" in "".join(coloured)
        monkeypatch.setenv("NO_COLOR", "1")
        assert "48;5;" not in "".join(printed(view, force_terminal=True, color_system="256"))
        monkeypatch.delenv("NO_COLOR")


@pytest.mark.parametrize("width", [30, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_every_column_is_shown(views: dict[str, View], width: int) -> None:
    for view in views.values():
        lines = printed(view, width, force_terminal=True, color_system=None)
        assert max(cell_len(line) for line in lines) <= width
        for table in view.tables:
            if table.axes[1] != POSITION and len(table.rows) > 1:
                for name in table.columns:
                    assert any(name[:15] in line for line in lines), (view.title, name)


def numbered(rows: int, columns: int, **options: Any) -> Table:
    values = np.arange(rows * columns, dtype=float).reshape(rows, columns)
    return Table("t", [f"r{i}" for i in range(rows)], [f"{i} c" for i in range(columns)], values, **options)


def test_a_long_text_loses_its_first_positions_on_a_terminal_and_says_so() -> None:
    table = numbered(300, 300, axes=(POSITION, POSITION), format="{:.0f}")
    lines = printed(View("v", "how", [table]))
    assert lines[-1] == "--json prints all of it, --out plots it."
    assert "shown: 24 of 300 positions" in lines
    assert any(line.startswith("r299") and "89999" in line for line in lines)
    assert not any(line.startswith("r275") for line in lines)
    heads = printed(View("v", "how", [numbered(144, 2, axes=("head", ""))]))
    assert "shown: 40 of 144 heads" in heads
    assert any(line.startswith("r39 ") for line in heads)


def test_every_part_of_a_wide_table_has_the_rows_and_the_last_the_notes() -> None:
    lines = printed(View("v", "how", [numbered(2, 30, notes=["first", "second"])]))
    rows = [line for line in lines if line.startswith("r1")]
    assert len(rows) > 1
    long = Table("t", ["r"], ["c"], np.ones((1, 1)), notes=["word " * 40])
    assert printed(View("v", "how", [long]), force_terminal=True, color_system=None)[-1].startswith("--json prints all")
    assert [line.endswith("  second") for line in rows] == [False] * (len(rows) - 1) + [True]
    found = [text for line in rows for text in line.split()[1:] if text != "second"]
    assert found == [f"{value:.2f}" for value in range(30, 60)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("by_column", [False, True])
def test_shades_lie_between_minus_one_and_one_and_the_largest_is_darkest(scale: str, by_column: bool) -> None:
    values = np.array([[1.0, 1.0], [0.5, np.nan], [0.25, 0.0]])
    values = 1 / values[:2] if scale == "rank" else values
    shades = Table("t", [*map(str, range(len(values)))], ["a", "b"], values, scale=scale, by_column=by_column).shades()
    assert shades[0, 0] == np.nanmax(shades) == 1
    assert np.isnan(shades[1, 1])
    assert shades[1, 0] < 1


def test_a_table_of_zeros_has_no_colour() -> None:
    assert not Table("t", ["a"], ["b"], np.zeros((1, 1))).shades().any()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_view_is_plotted(suffix: str, views: dict[str, View], tmp_path: Path) -> None:
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    names = views if suffix == ".svg" else ["attention"]
    for name in names:
        file = tmp_path / f"{name}{suffix}"
        plot_view(views[name], file)
        assert file.read_bytes().startswith(starts[suffix])


@pytest.mark.filterwarnings("error")
def test_a_plot_takes_any_token_and_large_tables(tmp_path: Path) -> None:
    odd = Table("$x$", ["$\\frac$", "漢字 😀"], ["a_b^c", "{"], np.array([[1.0, np.nan], [-1, 0]]), notes=["$", "\\"])
    plot_view(View("$v", "how %s {", [odd, numbered(100, 100)]), tmp_path / "odd.png")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.png"]


def test_json_has_every_number_in_full_with_its_shape_and_names(views: dict[str, View]) -> None:
    for view in views.values():
        found = json.loads(as_json(view, model="m"))
        assert found["model"] == "m"
        assert found["reading"] == view.reading
        for shown, table in zip(found["tables"], view.tables, strict=True):
            assert shown["shape"] == [len(shown["rows"]), len(shown["columns"])] == list(table.values.shape)
            values = np.array(shown["values"], dtype=float)  # null -> nan
            np.testing.assert_array_equal(values.reshape(table.values.shape), table.values)
