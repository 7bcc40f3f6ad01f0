"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_gpt.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Limits on each request and on all of them together."""

    rows: int = 16
    """texts computed in one batch; the others wait"""
    max_requests: int = 256
    """requests waiting or in progress; more are answered 429"""
    max_choices: int = 128
    """texts per request: its prompts times n, or best_of"""
    max_tokens: int = 4096
    """the largest max_tokens of a request"""
    max_body: int = 1 << 20
    """bytes per request; longer ones are answered 413"""
    max_connections: int = 1024
    """open connections; for one more, the one is closed that has been idle longest"""
    receive_timeout: float = 10.0
    """seconds for the head of a request to arrive, and for its body; then it is answered 408"""
    timeout: float = 300.0
    """seconds per request, waiting included; then it is answered 504"""
    grace: float = 10.0
    """seconds for requests in progress to finish when the server is stopped; then they are answered 503"""

    def check(self) -> None:
        """Raise ``UsageError`` for invalid values."""
        for name in ("rows", "max_requests", "max_choices", "max_tokens", "max_body", "max_connections"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or above, not {getattr(self, name)}")
        for name in ("timeout", "receive_timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0 seconds, not {getattr(self, name)}")
        if not self.grace >= 0:
            raise UsageError(f"--grace must be 0 seconds or above, not {self.grace}")
