"""Text generation with edits of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_gpt.errors import UsageError
from mlx_gpt.generate import sampling
from mlx_gpt.generate.rng import key_at, row_keys
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.lens.hooks import Edit, Hooks
from mlx_gpt.lens.names import is_attention_map
from mlx_gpt.lens.trace import forward, trace
from mlx_gpt.model.gpt import GPT, as_ids


def generate(
    model: GPT,
    tokens: Any,
    max_tokens: int = 50,
    *,
    edits: Mapping[str, Edit] | None = None,
    cache: bool = True,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    end_id: int | None = None,
) -> mx.array:
    """Continue texts of one length, ids (B, T), under the edits of a trace: the new ids, (B, n).

    An edit is given the activation of the whole text, with and without ``cache``: every position so far, and square
    attention maps. The two agree if what an edit does to a position does not depend on the later ones or on the
    length; edit ``x[:, 3]``, not ``x[:, -1]``.

    Ends after ``max_tokens``, where the context is full, or where all rows have had ``end_id``. Temperature 0 takes the
    most probable id; draws are those of ``mlx_gpt.generate`` for the same settings. Raises ``UsageError`` like
    ``trace``, and for invalid settings.
    """
    ids = as_ids(tokens, model.config.vocab_size)
    settings = GenerationSettings(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    (B, T), room = ids.shape, model.config.n_positions - ids.shape[1]
    if room < 1:
        raise UsageError(f"the text is {T} tokens long, which fills the model's context; shorten it")
    edited = EditedModel(model, edits or {}) if cache else None
    keys = row_keys(seed, B)
    ended = mx.zeros((B,), mx.bool_)
    new = ids
    for n in range(min(max_tokens, room + 1)):
        logits = edited(new) if edited else trace(model, ids, edits, names=())[0]
        next_ids = choose(logits[:, -1].astype(mx.float32), settings, key_at(keys, n))
        new = next_ids.astype(mx.int32)[:, None]
        ids = mx.concatenate([ids, new], axis=1)
        mx.eval(ids)
        if end_id is not None:
            ended = ended | (new[:, 0] == end_id)
        if ended.all().item():
            break
    return ids[:, T:]


def choose(logits: mx.array, settings: GenerationSettings, keys: mx.array) -> mx.array:
    """Return the next id of each row: (B, V) -> (B,)."""
    if settings.temperature == 0:
        return sampling.greedy(logits)
    logits = sampling.with_temperature(logits, settings.temperature)
    if settings.top_k:
        logits = sampling.keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = sampling.keep_top_p(logits, settings.top_p)
    return sampling.draw(logits, keys)


class EditedModel:
    """The model under edits, with a cache: each call returns the logits of the ids that follow those before."""

    def __init__(self, model: GPT, edits: Mapping[str, Edit]):
        self.model = model
        self.cache = model.make_cache()
        self.hooks = HooksWithPast(model.config, edits.items(), ())

    def __call__(self, ids: mx.array) -> mx.array:
        """(B, T) -> (B, T, V)."""
        logits = forward(self.model, ids, self.hooks, self.cache)
        self.hooks.check()
        return logits


class HooksWithPast(Hooks):
    """Hooks that give edits the activation of the whole text, although only its last part is computed."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.past: dict[str, mx.array] = {}  # unedited activations so far, of names with an edit

    def edit(self, name: str, x: mx.array) -> mx.array:
        if name not in self.edits:
            return x
        axis = 2 if is_attention_map(name) else 1  # of the queries
        whole = x
        if (past := self.past.get(name)) is not None:
            if is_attention_map(name):  # earlier queries attend to none of the new keys
                masked = -mx.inf if name.endswith("hook_attn_scores") else 0
                past = mx.pad(past, [(0, 0)] * 3 + [(0, x.shape[3] - past.shape[3])], constant_values=masked)
            whole = mx.concatenate([past, x], axis=axis)
        self.past[name] = whole
        edited = super().edit(name, whole)
        return mx.split(edited, [whole.shape[axis] - x.shape[axis]], axis=axis)[1]
