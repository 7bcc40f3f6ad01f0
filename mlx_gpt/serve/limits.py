"""What a server takes upon itself."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_gpt.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how much may go on at once."""

    rows: int = 16
    """how many texts are computed side by side; the others wait for a place"""
    max_requests: int = 256
    """how many requests may wait or be under way; more are answered 429"""
    max_choices: int = 128
    """how many texts a request may ask for: its prompts times n, or best_of"""
    max_tokens: int = 4096
    """the most that a request may give as max_tokens"""
    max_body: int = 1 << 20
    """bytes of a request; longer ones are answered 413, unread"""
    timeout: float = 300.0
    """seconds that a request may take, waiting included; then it is answered 504"""
    grace: float = 10.0
    """seconds that requests under way have to finish when the server is stopped; then they are answered 503"""

    def check(self) -> None:
        """Raise ``UsageError`` for what cannot work."""
        for name in ("rows", "max_requests", "max_choices", "max_tokens", "max_body"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or above, not {getattr(self, name)}")
        if not self.timeout > 0:
            raise UsageError(f"--timeout must be above 0 seconds, not {self.timeout}")
        if not self.grace >= 0:
            raise UsageError(f"--grace must be 0 seconds or above, not {self.grace}")
