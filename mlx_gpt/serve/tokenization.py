"""Text to ids and back, by vLLM's ``/tokenize`` and ``/detokenize``.

Requests and answers have the names of vLLM's ``TokenizeCompletionRequest``, ``TokenizeResponse``, ``DetokenizeRequest``
and ``DetokenizeResponse``.
"""

from __future__ import annotations

from typing import Any

from mlx_gpt.serve.fields import boolean, fields, refuse, shown
from mlx_gpt.serve.request import RequestReader
from mlx_gpt.text.vocab_files import write_name


def tokenize(reader: RequestReader, body: bytes) -> dict[str, Any]:
    """Return the ids of a text, and with ``return_token_strs`` their names in ``vocab.json``."""
    given = fields(body, ("model", "prompt", "add_special_tokens", "return_token_strs"), "/tokenize")
    reader.check_name(given.get("model", reader.name))
    text = given.get("prompt")
    if not isinstance(text, str):
        refuse("prompt", f"must be a text, not {shown(text)}")
    wants_special, wants_names = boolean(given, "add_special_tokens", True), boolean(given, "return_token_strs")
    ids = reader.encode(text)
    if wants_special:
        ids = reader.tokenizer.as_prompt(ids)
    return {
        "count": len(ids),
        "max_model_len": reader.n_positions,
        "tokens": ids,
        "token_strs": [write_name(reader.tokenizer.token_bytes(i)) for i in ids] if wants_names else None,
    }


def detokenize(reader: RequestReader, body: bytes) -> dict[str, Any]:
    """Return the text of some ids."""
    given = fields(body, ("model", "tokens"), "/detokenize")
    reader.check_name(given.get("model", reader.name))
    return {"prompt": reader.tokenizer.decode(reader.ids("tokens", given.get("tokens")))}
