"""The flags that say who may use a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import UseAppendAction, arg


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    api_key: Annotated[str | None, arg(metavar="KEY", help_behavior_hint="")] = field(default=None, repr=False)
    """answer only requests with the header Authorization: Bearer KEY (and /health); other users of this machine can
    read the flag, but not the environment variable MLX_GPT_API_KEY, which sets the key too"""
    cors: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="ORIGIN")] = ()
    """answer web pages of this origin, such as https://example.org; * is any"""
    allow_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """answer requests to this name of the server, such as that of a proxy; * is any"""
