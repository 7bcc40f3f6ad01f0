"""Views of a model: functions of a subject and options that return tables, which three renderers show.

A new view is a function here in ``VIEWS``; its options are flags of ``mlx-gpt lens``.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_gpt.lens.views.attention import attention
from mlx_gpt.lens.views.circuits import circuits
from mlx_gpt.lens.views.heads import heads
from mlx_gpt.lens.views.patch import patch
from mlx_gpt.lens.views.residual import attribution, logit_lens, neurons
from mlx_gpt.lens.views.view import View

VIEWS: dict[str, Callable[..., View]] = {
    "attention": attention,
    "logit-lens": logit_lens,
    "attribution": attribution,
    "heads": heads,
    "patch": patch,
    "neurons": neurons,
    "circuits": circuits,
}
