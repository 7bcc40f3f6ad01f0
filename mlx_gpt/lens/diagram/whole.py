"""The left column: the whole model, with a row for each block."""

from __future__ import annotations

from itertools import groupby

from mlx_gpt.lens.diagram.columns import Column, shape_line
from mlx_gpt.lens.diagram.parts import Tensor, total
from mlx_gpt.lens.diagram.svg import Element, element, label, link, number, rect
from mlx_gpt.model.block import Block
from mlx_gpt.model.gpt import GPT
from mlx_gpt.model.ops import LayerNorm

STACK, TALL, LOW = 264, 30, 12  # height of the stack of blocks, while its rows are not taller or lower than these
BARS = 62  # where the bars of a row begin
Row = tuple[float, float, str]


def draw_model(column: Column, fold: bool) -> tuple[float, float]:
    """Draw the model from ids to logits, and return the top and bottom of the opened block's row."""
    anatomy = column.anatomy
    column.open_part("tokens", "Tokens", GPT.embed)
    column.boxes(anatomy.ids)
    column.open_part("embed", "Token embedding", GPT.embed)
    column.boxes(*anatomy.parameters("wte"))
    start = column.adds(column.activations("hook_embed"), "stream")
    column.open_part("pos_embed", "Position embedding", GPT.embed)
    column.boxes(*anatomy.parameters("wpe"))
    column.adds(column.activations("hook_pos_embed"), "stream")
    opened = draw_stack(column, fold)
    column.open_part("ln_final", "Final layer norm", LayerNorm.__call__)
    end = column.reads(column.y + 10)
    column.boxes(*anatomy.parameters("ln_f"))
    column.activations("ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out")
    column.open_part("unembed", "Unembedding", GPT.logits, right=column.flops("hook_unembed"))
    head = anatomy.parameters("lm_head")
    if not head:
        column.note("the head is wte.weight, transposed")
    column.boxes(*head)
    column.activations("hook_unembed")
    draw_next_tokens(column)
    column.draw_stream(start, end)
    return opened


def draw_stack(column: Column, fold: bool) -> tuple[float, float]:
    """Draw a row for each block, or one for several with equal numbers; return the ends of the opened one's row."""
    anatomy, L = column.anatomy, column.anatomy.model.config.n_layer
    blocks = [anatomy.block_parameters(layer) for layer in range(L)]
    count = f"{total(tensor for tensors in blocks for tensor in tensors):,} parameters"
    column.open_part("blocks", f"{L} block{'s' * (L > 1)}", Block.__call__, right=count)
    what = "|x| added" if column.measured else "weights"
    column.draw(label(column.x + BARS, column.y + 9, "attention", "small fill value"))
    column.draw(label(column.x + BARS + 60, column.y + 9, "MLP", "small fill mlp"))
    column.note(what, "stream" if column.measured else "block")
    rows = [row_values(column, layer, tensors) for layer, tensors in enumerate(blocks)]
    keys = [(layer == anatomy.layer, rows[layer]) if fold else layer for layer in range(L)]
    folded = [[*layers] for _, layers in groupby(range(L), keys.__getitem__)]
    height = max(LOW, min(TALL, STACK // len(folded)))
    longest = max(max(attn, mlp) for attn, mlp, _ in rows) or 1
    opened = (0.0, 0.0)
    for layers in folded:
        if anatomy.layer in layers:
            opened = (column.y, column.y + height - 2)
        row = draw_row(column, layers, rows[layers[0]], longest, height)
        title = [f"{total(blocks[l]):,} parameters in h.{l}: {', '.join(map(shape_line, blocks[l]))}" for l in layers]
        column.draw(link(Block.__call__, row, title=title, code=column.code))
        column.y += height
    return opened


def draw_row(column: Column, layers: list[int], values: Row, longest: float, height: int) -> Element:
    """Return the row of one or several blocks: names, the bars of attention and MLP, and a number."""
    middle, bar = column.y + height / 2 - 1, min((height - 8) / 2, 8)
    style, frame = ("mono", "frame") if height >= 16 else ("mono tiny", "panel")
    frame = "outline stream" if column.anatomy.layer in layers else frame
    attn, mlp, right = values
    number_width = 60 if column.measured else 110
    left, unit = column.x + BARS, (column.width - BARS - number_width) / longest
    first, last = layers[0], layers[-1]
    ends, times = (f"{first}", "") if first == last else (f"{first}…{last}", f"{len(layers)} × ")
    return element(
        "g",
        rect(column.x, column.y, column.width, height - 2, frame, rx=3),
        label(column.x + 8, middle + 4, f"h.{ends}", style),
        rect(left, middle - bar - 0.5, unit * attn, bar, "fill value"),
        rect(left, middle + 0.5, unit * mlp, bar, "fill mlp"),
        label(column.x + column.width - 8, middle + 4, times + right, style + " muted end", number_width - 12),
        data_part=f"blocks.{ends}",
    )


def row_values(column: Column, layer: int, tensors: list[Tensor]) -> Row:
    """Return what the bars of attention and MLP show for a block, and the number beside them."""
    if column.measured:
        attn, mlp, stream = (
            column.measured.norms[f"blocks.{layer}.hook_{end}"] for end in ("attn_out", "mlp_out", "resid_post")
        )
        return attn, mlp, number(stream)
    attn, mlp = (total(t for t in tensors if f".{part}." in t.name) for part in ("attn", "mlp"))
    return attn, mlp, f"{total(tensors):,}"


def draw_next_tokens(column: Column) -> None:
    """Draw the most probable next tokens as bars."""
    if not column.measured:
        return
    column.note("most probable next tokens")
    for text, probability in column.measured.next_tokens:
        width = (column.width - 160) * probability
        column.draw(
            label(column.x + 92, column.y + 12, text, "mono end", 88),
            rect(column.x + 100, column.y + 4, max(width, 0.5), 9, "fill stream"),
            label(column.x + 106 + width, column.y + 12, f"{probability:.1%}", "mono muted"),
        )
        column.y += 17
