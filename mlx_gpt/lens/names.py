"""The names of the activations, as in TransformerLens: its hook names, and the canonical names of version 3.

``{l}`` is the number of a layer. Where a group is listed, it is in the order of computation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError

EMBEDDING = ("hook_embed", "hook_pos_embed")
BLOCK = tuple(
    "blocks.{l}." + name
    for name in (
        "hook_resid_pre",
        "ln1.hook_scale",
        "ln1.hook_normalized",
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_attn_scores",
        "attn.hook_pattern",
        "attn.hook_z",
        "hook_attn_out",
        "hook_resid_mid",
        "ln2.hook_scale",
        "ln2.hook_normalized",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    )
)
FINAL = ("ln_final.hook_scale", "ln_final.hook_normalized")

# Stored only if asked for: ``hook_result`` is large, the others repeat a neighbor or are the logits.
BY_NAME = (
    "blocks.{l}.ln1.hook_out",
    "blocks.{l}.attn.q.hook_in",
    "blocks.{l}.attn.k.hook_in",
    "blocks.{l}.attn.v.hook_in",
    "blocks.{l}.attn.hook_result",
    "blocks.{l}.ln2.hook_out",
    "ln_final.hook_out",
    "hook_unembed",
)

# TransformerBridge's names for the same values (transformer_lens/model_bridge/generalized_components). An edit of an
# alias is one of the name: that of ln2.hook_in changes the residual stream, as hook_resid_mid does.
ALIASES = {
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_out": "hook_pos_embed",
    "blocks.{l}.hook_in": "blocks.{l}.hook_resid_pre",
    "blocks.{l}.ln1.hook_in": "blocks.{l}.hook_resid_pre",
    "blocks.{l}.attn.hook_in": "blocks.{l}.ln1.hook_out",
    "blocks.{l}.attn.q.hook_out": "blocks.{l}.attn.hook_q",
    "blocks.{l}.attn.k.hook_out": "blocks.{l}.attn.hook_k",
    "blocks.{l}.attn.v.hook_out": "blocks.{l}.attn.hook_v",
    "blocks.{l}.attn.o.hook_in": "blocks.{l}.attn.hook_z",
    "blocks.{l}.attn.o.hook_out": "blocks.{l}.hook_attn_out",
    "blocks.{l}.attn.hook_hidden_states": "blocks.{l}.hook_attn_out",
    "blocks.{l}.attn.hook_out": "blocks.{l}.hook_attn_out",
    "blocks.{l}.ln2.hook_in": "blocks.{l}.hook_resid_mid",
    "blocks.{l}.mlp.hook_in": "blocks.{l}.ln2.hook_out",
    "blocks.{l}.mlp.in.hook_in": "blocks.{l}.ln2.hook_out",
    "blocks.{l}.mlp.in.hook_out": "blocks.{l}.mlp.hook_pre",
    "blocks.{l}.mlp.out.hook_in": "blocks.{l}.mlp.hook_post",
    "blocks.{l}.mlp.out.hook_out": "blocks.{l}.hook_mlp_out",
    "blocks.{l}.mlp.hook_out": "blocks.{l}.hook_mlp_out",
    "blocks.{l}.hook_out": "blocks.{l}.hook_resid_post",
    "ln_final.hook_in": "blocks.{last}.hook_resid_post",
    "unembed.hook_in": "ln_final.hook_out",
    "unembed.hook_out": "hook_unembed",
}


class ActivationNames:
    """The names of a model's activations: ``stored`` by default, ``by_name`` on request, ``aliases`` of both."""

    def __init__(self, config: GPTConfig):
        self.n_layer = config.n_layer
        self.stored = [*EMBEDDING, *self._for_layers(BLOCK), *FINAL]
        self.by_name = self._for_layers(BY_NAME)
        pairs = [f"{alias} {name}" for alias, name in ALIASES.items()]
        self.aliases = dict(pair.split() for pair in self._for_layers(pairs))

    def find(self, pattern: str) -> dict[str, str]:
        """Return the names that a name or pattern means, and what each is an alias of.

        ``*`` stands for any characters, in the middle of a pattern for any but dots: ``blocks.*.hook_resid_pre``,
        ``blocks.0.*``, ``*hook_pattern``. A pattern means default names if it matches any, else those stored by name,
        else aliases. Raises ``UsageError`` with the closest name if it matches none.
        """
        regex = re.sub(r"(?<!^)\\\*(?!$)", "[^.]*", re.escape(pattern)).replace(r"\*", ".*")
        for group in (self.stored, self.by_name, self.aliases):
            if found := [name for name in group if re.fullmatch(regex, name)]:
                return {name: self.aliases.get(name, name) for name in found}
        names = [*reversed([*self.stored, *self.by_name, *self.aliases])]  # of equally close ones the first layer's
        known = {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}
        (closest,) = get_close_matches(pattern.replace("*", "0"), known, n=1, cutoff=0)
        raise UsageError(
            f"no activation is named {pattern!r}; the closest is {known[closest]!r} (layers 0 to {self.n_layer - 1})"
        )

    def _for_layers(self, templates: Sequence[str]) -> list[str]:
        """Fill in the number of a layer, layer by layer; then the templates without one."""
        of_layer = [template for template in templates if "{l}" in template]
        others = [template.format(last=self.n_layer - 1) for template in templates if "{l}" not in template]
        return [template.format(l=l) for l in range(self.n_layer) for template in of_layer] + others


def activation_names(config: GPTConfig) -> list[str]:
    """Return the names that ``trace`` stores by default, in the order of computation: 208 for GPT-2 small."""
    return ActivationNames(config).stored


def is_attention_map(name: str) -> bool:
    """Return whether an activation has the axes (B, H, T, S) instead of (B, T, ...)."""
    return name.endswith(("hook_attn_scores", "hook_pattern"))


def has_heads(name: str) -> bool:
    """Return whether an activation has an axis of heads."""
    ends = tuple(f"attn.{end}" for end in ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result"))
    ends += tuple(f"attn.{end}" for end in ("q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in"))
    return is_attention_map(name) or name.endswith(ends)
