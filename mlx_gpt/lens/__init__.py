"""Every activation of a forward pass by name, to read and to edit; and readings made from them.

Begin with ``trace``, the forward pass spelled out. ``attribution`` and ``heads`` read one trace, ``circuits`` the
weights; ``patching``, ``paths`` and ``ablation`` compare runs with edits.
"""

from mlx_gpt.lens.ablation import ablate_heads
from mlx_gpt.lens.attribution import (
    decompose_resid,
    logit_attribution,
    logit_direction,
    logit_lens,
    logit_lens_top,
)
from mlx_gpt.lens.circuits import FactoredMatrix, composition_scores, ov_circuit, qk_circuit, singular_tokens
from mlx_gpt.lens.generation import generate
from mlx_gpt.lens.gradients import gradients, logit_difference
from mlx_gpt.lens.heads import attention_entropy, detect_heads, first_token_mass, head_scores, repeated_tokens
from mlx_gpt.lens.hooks import Activations, Edit
from mlx_gpt.lens.names import activation_names
from mlx_gpt.lens.patching import activation_patching, attribution_patching
from mlx_gpt.lens.paths import path_patching
from mlx_gpt.lens.trace import trace

__all__ = [
    "Activations",
    "Edit",
    "FactoredMatrix",
    "ablate_heads",
    "activation_names",
    "activation_patching",
    "attention_entropy",
    "attribution_patching",
    "composition_scores",
    "decompose_resid",
    "detect_heads",
    "first_token_mass",
    "generate",
    "gradients",
    "head_scores",
    "logit_attribution",
    "logit_difference",
    "logit_direction",
    "logit_lens",
    "logit_lens_top",
    "ov_circuit",
    "path_patching",
    "qk_circuit",
    "repeated_tokens",
    "singular_tokens",
    "trace",
]
