"""The diagram: what it prints is what the trace and the parameters hold."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import random_model
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.lens import trace
from mlx_gpt.lens.diagram import draw_diagram
from mlx_gpt.lens.names import ActivationNames
from mlx_gpt.lens.weights import dense_weight
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.quantize import quantize
from mlx_gpt.store.folder import load
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.train.machine import training_flops

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
TEXT = "a shade<b>"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "inner": {"n_inner": 20},
    "one layer": {"n_layer": 1},
    "one head": {"n_head": 1},
    "many layers": {"n_layer": 20, "n_embd": 8, "n_head": 2},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "quantized": {"n_embd": 64},
}


@pytest.fixture(params=CONFIGURATIONS)
def model(request: pytest.FixtureRequest) -> GPT:
    made = random_model(vocab_size=257, **CONFIGURATIONS[request.param])
    return quantize(made, 4) if request.param == "quantized" else made


@pytest.fixture
def opened(model: GPT) -> dict[str, int]:
    """The last layer and head."""
    return {"layer": model.config.n_layer - 1, "head": model.config.n_head - 1}


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(node: ElementTree.Element) -> list[str]:
    return ["".join(found.itertext()) for found in node.iter(f"{SVG}text")]


def boxes(root: ElementTree.Element, kind: str) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """The boxes of parameters or activations by name: the shape in each one's data and the texts in it."""
    found = {}
    for node in root.iter(f"{SVG}a"):
        if name := node.get(f"data-{kind}"):
            assert name not in found
            shape = tuple(int(size) for size in node.get("data-shape", "").split(",") if size)
            found[name] = shape, texts(node)
    return found


def traced(model: GPT, ids: Any, layer: int) -> dict[str, mx.array]:
    """The activations of a model that the diagram shows: those of one block, and those outside blocks."""
    names = ActivationNames(model.config)
    of_interest = [n for n in names.stored + names.by_name if n.startswith((f"blocks.{layer}.", "hook_", "ln_final"))]
    return trace(model, ids, names=of_interest)[1]


def parameters(model: GPT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def short(name: str) -> str:
    return re.sub(r"^(h|blocks)\.\d+\.", "", name)


def number_in(text: str) -> float:
    found = re.search(r"([\d,.]+)( [kMGT])?", text)
    assert found is not None
    unit = {None: 1, " k": 1e3, " M": 1e6, " G": 1e9, " T": 1e12}[found[2]]
    return float(found[1].replace(",", "")) * unit


# Names, shapes and counts


@pytest.mark.parametrize("text", [None, TEXT])
def test_every_activation_of_the_opened_block_is_a_box_with_its_traced_shape(
    model: GPT, opened: dict[str, int], text: str | None
) -> None:
    tokenizer = Tokenizer.bytes()
    ids = [[0] * model.config.n_positions] if text is None else [tokenizer.encode_prompt(text)]
    found = boxes(parse(draw_diagram(model, tokenizer, text, **opened)), "activation")
    expected = {name: tuple(array.shape) for name, array in traced(model, ids, opened["layer"]).items()}
    T = len(ids[0])
    assert {name: shape for name, (shape, _) in found.items()} == {**expected, "tokens": (1, T), "mask": (T, T)}
    for name, (shape, printed) in found.items():
        line = " ".join(printed)
        assert short(name) in line
        assert "×".join(map(str, shape)) in line


def test_every_parameter_of_the_opened_block_and_outside_blocks_is_a_box_with_its_shape_and_count(
    model: GPT, opened: dict[str, int]
) -> None:
    found = boxes(parse(draw_diagram(model, **opened)), "parameter")
    block = f"h.{opened['layer']}."
    assert {name: shape for name, (shape, _) in found.items()} == {
        name: shape for name, shape in parameters(model).items() if name.startswith(block) or not name.startswith("h.")
    }
    for name, (shape, printed) in found.items():
        assert printed == [short(name), "×".join(map(str, shape)), f"{prod(shape):,}"]


def test_the_parameters_of_every_block_are_listed_and_all_counts_sum_to_the_total(
    model: GPT, opened: dict[str, int]
) -> None:
    root = parse(draw_diagram(model, **opened))
    outside = sum(prod(shape) for name, (shape, _) in boxes(root, "parameter").items() if not name.startswith("h."))
    (stack,) = [node for node in root.iter(f"{SVG}g") if node.get("data-part") == "blocks"]
    lines = [line for title in stack.iter(f"{SVG}title") for line in str(title.text).splitlines()]
    rows = [re.fullmatch(r"([\d,]+) parameters in h\.(\d+): (.*)", line) for line in lines]
    listed, counts = {}, []
    for row in filter(None, rows):
        shapes = dict(entry.split() for entry in row[3].split(", "))
        assert all(name.startswith(f"h.{row[2]}.") for name in shapes)
        listed |= {name: tuple(map(int, shape.split("×"))) for name, shape in shapes.items()}
        counts.append(number_in(row[1]))
    assert listed == {name: shape for name, shape in parameters(model).items() if name.startswith("h.")}
    assert sum(counts) + outside == model.n_parameters
    assert f"{model.n_parameters:,} parameters" in " ".join(texts(root))
    assert f"{sum(counts):,.0f} parameters" in texts(stack)


def test_blocks_with_equal_numbers_share_a_row_that_counts_them_unless_asked_not_to() -> None:
    model = random_model(n_layer=5)
    size = sum(prod(shape) for name, shape in parameters(model).items() if name.startswith("h.0."))

    def rows(**settings: Any) -> list[str]:
        nodes = parse(draw_diagram(model, layer=1, **settings)).iter(f"{SVG}g")
        (stack,) = [node for node in nodes if node.get("data-part") == "blocks"]
        return [line for line in texts(stack) if line.startswith("h.") or f"{size:,}" in line]

    assert rows() == ["h.0", f"{size:,}", "h.1", f"{size:,}", "h.2…4", f"3 × {size:,}"]
    assert rows(fold=False) == [line for layer in range(5) for line in (f"h.{layer}", f"{size:,}")]


# FLOPs


def test_flops_are_a_third_of_those_of_training_on_a_full_context(model: GPT) -> None:
    (line,) = [line for line in texts(parse(draw_diagram(model))) if "FLOP per token" in line and "GPT-2" in line]
    assert number_in(line.rpartition(", ")[2]) == pytest.approx(training_flops(model.config) / 3, rel=0.005)


def test_flops_of_each_product_are_those_of_its_matrices() -> None:
    model, tokenizer = random_model(vocab_size=257, n_inner=20), Tokenizer.bytes()
    root = parse(draw_diagram(model, tokenizer, TEXT))
    T, block = len(tokenizer.encode_prompt(TEXT)), model.h[0]
    H, D = model.config.n_head, model.config.head_dim
    third = block.attn.c_attn.weight.size // 3
    expected = {
        **{f"blocks.0.attn.hook_{letter}": 2 * T * third for letter in "qkv"},
        **{f"blocks.0.attn.hook_{name}": H * T * T * 2 * D for name in ("attn_scores", "z")},
        "blocks.0.hook_attn_out": 2 * T * block.attn.c_proj.weight.size,
        "blocks.0.mlp.hook_pre": 2 * T * block.mlp.c_fc.weight.size,
        "blocks.0.hook_mlp_out": 2 * T * block.mlp.c_proj.weight.size,
        "hook_unembed": 2 * T * dense_weight(model.wte).size,
    }
    stated = {}
    for node in root.iter(f"{SVG}a"):
        if found := re.search(r": ([\d,]+) FLOPs", str(node[0].text)):
            stated[node.get("data-activation")] = int(number_in(found[1]))
    assert stated == expected


# Numbers of a text


def test_norms_are_those_of_the_last_token(model: GPT, opened: dict[str, int]) -> None:
    tokenizer = Tokenizer.bytes()
    found = boxes(parse(draw_diagram(model, tokenizer, TEXT, **opened)), "activation")
    activations = traced(model, [tokenizer.encode_prompt(TEXT)], opened["layer"])
    measured = {name: number_in(line) for name, (_, printed) in found.items() for line in printed if "|x|" in line}
    stream = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"}
    assert {short(name) for name in measured} == stream | {"hook_embed", "hook_pos_embed"}
    for name, value in measured.items():
        assert value == pytest.approx(np.linalg.norm(np.array(activations[name])[0, -1]), rel=0.006)


def test_bars_of_blocks_are_in_proportion_to_what_attention_and_mlp_add() -> None:
    model, tokenizer = random_model(vocab_size=257), Tokenizer.bytes()
    root = parse(draw_diagram(model, tokenizer, TEXT))
    (stack,) = [node for node in root.iter(f"{SVG}g") if node.get("data-part") == "blocks"]
    widths = [
        float(bar.get("width", 0)) for bar in stack.iter(f"{SVG}rect") if "d-fill" in bar.get("class", "").split()
    ]
    activations = trace(model, [tokenizer.encode_prompt(TEXT)])[1]
    norms = [
        np.linalg.norm(np.array(activations[f"blocks.{layer}.hook_{part}_out"])[0, -1])
        for layer in range(model.config.n_layer)
        for part in ("attn", "mlp")
    ]
    assert widths == pytest.approx(np.array(norms) / max(norms) * max(widths), abs=0.1)


@pytest.mark.parametrize("length", [1, 9, 20, 40])
def test_the_drawn_pattern_is_the_traced_one_of_the_first_20_tokens(length: int) -> None:
    model, tokenizer, text = random_model(vocab_size=257, n_positions=40), Tokenizer.bytes(), "abcdefghij" * 4
    text = text[:length]
    root = parse(draw_diagram(model, tokenizer, text, layer=1, head=2))
    pattern = np.array(trace(model, [tokenizer.encode_prompt(text)])[1]["blocks.1.attn.hook_pattern"])[0, 2]
    weights = [(float(node.get("fill-opacity", 0)), str(node[0].text)) for node in root.iter(f"{SVG}rect") if len(node)]
    expected = [pattern[i, j] for i in range(min(20, length)) for j in range(i + 1)]
    assert [shade for shade, _ in weights] == pytest.approx(expected, abs=6e-4)
    assert [number_in(title.rpartition(": ")[2]) for _, title in weights] == pytest.approx(expected, abs=6e-4)


def test_next_tokens_are_the_most_probable_ones() -> None:
    model, tokenizer = load(ROOT / "weights/tinyworld")
    text = "One sunny morning, Lily went to the"
    printed = texts(parse(draw_diagram(model, tokenizer, text)))
    probabilities = np.array(mx.softmax(model([tokenizer.encode_prompt(text)])[0, -1]))
    best = np.argsort(-probabilities)[:5]
    start = printed.index("most probable next tokens") + 1
    assert printed[start : start + 10 : 2] == [tokenizer.decode([i]).replace(" ", "·") for i in best]
    shares = [number_in(line) / 100 for line in printed[start + 1 : start + 10 : 2]]
    assert shares == pytest.approx(probabilities[best], abs=6e-4)


# To scale


def areas(path: str) -> float:
    return sum(float(w) * float(h) for w, h in re.findall(r"h([\d.]+)v([\d.]+)h-", path))


def test_areas_to_scale_are_in_proportion_to_parameters_flops_and_activations(model: GPT) -> None:
    root = parse(draw_diagram(model, to_scale=True))
    (scale,) = [node for node in root.iter(f"{SVG}g") if node.get("data-part") == "scale"]
    totals: dict[str, float] = {}
    for group in scale.iter(f"{SVG}g"):
        if len(group) and group[0].tag == f"{SVG}title":
            found = re.fullmatch(
                r"(\S+): ([\d,]+) ([A-Za-z ]+?)(?: in each of (\d+) blocks)?, [\d.]+%", str(group[0].text)
            )
            assert found is not None
            size = number_in(found[2]) * int(found[4] or 1)
            area = sum(areas(path.get("d", "")) for path in group.iter(f"{SVG}path"))
            totals[found[3]] = totals.get(found[3], 0) + size
            assert area == pytest.approx(912 * 96 * size / totals_of(model)[found[3]], rel=0.02, abs=4)
    assert totals == totals_of(model)


def totals_of(model: GPT) -> dict[str, float]:
    logits, activations = trace(model, [[0] * model.config.n_positions])
    return {
        "parameters": model.n_parameters,
        "FLOPs": training_flops(model.config) / 3 * model.config.n_positions,
        "numbers in activations": logits.size + sum(array.size for array in activations.values()),
    }


# Links, escaping, size


def test_every_link_leads_to_the_line_that_defines_the_function_in_its_tooltip(model: GPT) -> None:
    links = [*parse(draw_diagram(model)).iter(f"{SVG}a")]
    assert len(links) > 40
    for node in links:
        path, _, line = node.get("href", "").partition("#L")
        qualified = str(node[0].text).splitlines()[-1]
        code = (ROOT / "examples" / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*def {qualified.rpartition('.')[2]}\(", code)
        assert qualified.startswith(path.removeprefix("../").removesuffix(".py").replace("/", "."))


def test_text_names_and_tokens_are_escaped() -> None:
    text = "<b>&\x1b[2J\u202e\n\x00\ufffe\"'é"
    svg = draw_diagram(random_model(vocab_size=257, n_positions=40), Tokenizer.bytes(), text, name=text)
    root = parse(svg)
    assert all(c.isprintable() or c == "\n" for c in svg)
    assert r"<b>&\x1b[2J\u202e\n" in "".join(str(root[0].text))


@pytest.mark.parametrize(("factor", "dtype"), [(float("nan"), mx.float32), (1, mx.bfloat16)], ids=["nan", "bfloat16"])
def test_a_model_of_nan_or_of_half_precision_is_drawn(factor: float, dtype: mx.Dtype) -> None:
    model = random_model(vocab_size=257)
    model.update(tree_map(lambda weight: (weight * factor).astype(dtype), model.parameters()))
    root = parse(draw_diagram(model, Tokenizer.bytes(), TEXT, to_scale=True))
    places = ("x", "y", "width", "height", "fill-opacity")
    assert all(np.isfinite(float(node.get(name, 0))) for node in root.iter() for name in places)
    assert len(boxes(root, "activation")) == 31


def test_the_diagram_needs_nothing_outside_itself() -> None:
    svg = draw_diagram(random_model())
    root = parse(svg)
    assert not [node for node in root.iter() if node.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}use")]
    assert not re.search(r"url\(|@import|style=|javascript:", svg)
    assert root.get("role") == "img"
    named = {node.get("id") for node in root.iter() if node.get("id")}
    assert named == set(root.get("aria-labelledby", "").split())


@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (48, 25)])
def test_a_diagram_of_a_large_model_is_small_and_computes_no_activation(layers: int, heads: int) -> None:
    model = GPT(GPTConfig(n_embd=64 * heads, n_layer=layers, n_head=heads))  # its weights are not computed either
    before = mx.get_peak_memory()
    assert len(draw_diagram(model, to_scale=True)) < 150_000
    assert mx.get_peak_memory() == before


# The example

NUMBER = r"\d[\d,]*(?:\.\d+)?"
EXAMPLE = "One sunny morning, Lily went to the garden. She was kind. Lily had a red kite."
REMEDY = (
    f'draw it again: mlx-gpt lens weights/tinyworld "{EXAMPLE}" --layer 3 --head 0 --diagram examples/architecture.svg'
)


def exact_and_measured(root: ElementTree.Element) -> tuple[list[str], list[float]]:
    """What must be equal in a diagram, and the numbers that another machine's rounding may change."""
    exact, measured = [], []
    for node in root.iter():
        exact.append(node.tag)
        for name, value in [*sorted(node.items()), ("text", node.text or "")]:
            if name.startswith(("href", "data-")):
                exact.append(f"{name}={value}")
            else:
                exact.append(f"{name}={re.sub(NUMBER, '', value)}")
                measured += [float(found.replace(",", "")) for found in re.findall(NUMBER, value)]
    return exact, measured


def test_the_picture_in_examples_is_that_of_the_bundled_model_and_of_the_code_as_it_is() -> None:
    model, tokenizer = load(ROOT / "weights/tinyworld")
    drawn = parse(draw_diagram(model, tokenizer, EXAMPLE, name="tinyworld", layer=3, head=0))
    kept = ElementTree.parse(ROOT / "examples/architecture.svg").getroot()
    (exact, measured), (kept_exact, kept_measured) = exact_and_measured(drawn), exact_and_measured(kept)
    assert exact == kept_exact, REMEDY
    assert measured == pytest.approx(kept_measured, rel=0.02, abs=0.02), REMEDY


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "layer must be between 0 and 2, not 3"),
        ({"head": -1}, "head must be between 0 and 3, not -1"),
        ({"text": "a"}, "a text needs the model's tokenizer"),
        ({"text": "", "tokenizer": Tokenizer.bytes()}, "the text is empty"),
        ({"text": "a" * 25, "tokenizer": Tokenizer.bytes()}, "25 tokens long and the model's context is 24"),
    ],
)
def test_bad_input_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_diagram(random_model(vocab_size=257), **settings)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="must be between 0 and 36"):
        draw_diagram(random_model(vocab_size=37), Tokenizer.bytes(), "a")
