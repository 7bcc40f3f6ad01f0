"""The middle column: one block, opened."""

from __future__ import annotations

from mlx_gpt.lens.diagram.columns import Column
from mlx_gpt.lens.diagram.parts import total
from mlx_gpt.lens.diagram.svg import element, label, rect
from mlx_gpt.model.attention import MultiHeadAttention
from mlx_gpt.model.block import Block
from mlx_gpt.model.mlp import MLP
from mlx_gpt.model.ops import LayerNorm

STRIP = 30  # height of the strip of heads


def draw_block(column: Column) -> tuple[float, float]:
    """Draw the opened block, and return the top and bottom of its strip of heads."""
    anatomy, l = column.anatomy, column.anatomy.layer
    count = f"{total(anatomy.block_parameters(l)):,} parameters"
    names = f"h.{l}.* and blocks.{l}.*"
    column.open_part(f"blocks.{l}", f"Block {l}", Block.__call__, names, count)
    column.draw(label(column.x + column.width, column.y - 7, column.flops(f"blocks.{l}."), "small muted end"))
    start = column.activations("blocks.{l}.hook_resid_pre")
    draw_norm(column, "ln1", "ln_1")
    flops = column.flops(f"blocks.{l}.attn.", f"blocks.{l}.hook_attn_out")
    column.open_part(f"blocks.{l}.attn", "Attention", MultiHeadAttention.__call__, right=flops)
    column.boxes(*anatomy.parameters(f"h.{l}.attn.c_attn"))
    heads = draw_heads(column)
    column.boxes(*anatomy.parameters(f"h.{l}.attn.c_proj"))
    column.adds(column.activations("blocks.{l}.hook_attn_out"), "value")
    column.close_part()
    middle = column.activations("blocks.{l}.hook_resid_mid")
    draw_norm(column, "ln2", "ln_2")
    flops = column.flops(f"blocks.{l}.mlp.", f"blocks.{l}.hook_mlp_out")
    column.open_part(f"blocks.{l}.mlp", f"MLP ({anatomy.model.config.activation_function})", MLP.__call__, right=flops)
    column.boxes(*anatomy.parameters(f"h.{l}.mlp.c_fc"))
    column.activations("blocks.{l}.mlp.hook_pre", "blocks.{l}.mlp.hook_post")
    column.boxes(*anatomy.parameters(f"h.{l}.mlp.c_proj"))
    column.adds(column.activations("blocks.{l}.hook_mlp_out"), "mlp")
    column.close_part()
    end = column.activations("blocks.{l}.hook_resid_post")
    column.draw_stream(start - 16, end + 16, start, middle, end)
    return heads


def draw_norm(column: Column, name: str, hub: str) -> None:
    """Draw a layer norm, which reads the stream."""
    l = column.anatomy.layer
    column.open_part(f"blocks.{l}.{name}", "Layer norm", LayerNorm.__call__)
    column.reads(column.y + 10)
    column.boxes(*column.anatomy.parameters(f"h.{l}.{hub}"))
    column.activations(*(f"blocks.{l}.{name}.{end}" for end in ("hook_scale", "hook_normalized", "hook_out")))


def draw_heads(column: Column) -> tuple[float, float]:
    """Draw the heads beside each other, the opened one marked, and with a text what each adds; return the ends."""
    anatomy, H = column.anatomy, column.anatomy.model.config.n_head
    values = column.measured.heads if column.measured else [1.0] * H
    text = "|x| that each head adds" if column.measured else f"{H} head{'s' * (H > 1)}"
    column.note(text, f"head {anatomy.head} is opened")
    step, top, highest = column.width / H, column.y, max(values) or 1
    width = max(step - 3, 0.6 * step)
    for i, value in enumerate(values):
        x, height = column.x + i * step, STRIP * value / highest
        frame = "outline value" if i == anatomy.head else "frame"
        group = element(
            "g",
            rect(x, top, width, STRIP, frame, rx=2),
            rect(x, top + STRIP - height, width, height, "tint value", rx=2),
            label(x + width / 2, top + STRIP - 5, str(i), "mono middle") if width > 14 else None,
            data_part=f"blocks.{anatomy.layer}.attn.head.{i}",
        )
        column.draw(group)
    column.y += STRIP + 5
    return top, top + STRIP
