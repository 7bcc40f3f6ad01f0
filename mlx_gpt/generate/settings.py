"""The settings of a generation: one frozen dataclass that validates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite, isnan
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from mlx_gpt.errors import UsageError

STOP, SLIDE = "stop", "slide"

Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]  # None is off
Words = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")]
Bias = Annotated[UseAppendAction[Mapping[int, float]], arg(metavar="ID BIAS")]


@dataclass(frozen=True)
class Length:
    """The length of the text."""

    max_tokens: int = 200
    """generate at most so many tokens"""
    stop: Words = ()
    """end the text before this string"""
    context: str = STOP
    """when the model's context is full: stop, or slide, which reads its last half again and continues; a longer prompt
    is refused, or read from its end on"""


@dataclass(frozen=True)
class Constraints:
    """Penalized, forbidden and forced tokens. The rules are applied in this order, before those for drawing."""

    logit_bias: Bias = field(default_factory=dict)
    """add a number to the logit of a token; -inf forbids it"""
    repetition_penalty: float = 1.0
    """above 1, make tokens of the text less probable, the prompt included; 1 is off"""
    frequency_penalty: float = 0.0
    """subtract this from a token's logit for each time it was generated; 0 is off"""
    presence_penalty: float = 0.0
    """subtract this from the logits of generated tokens; 0 is off"""
    no_repeat_ngram: int = 0
    """allow no sequence of N tokens twice; 0 is off"""
    ban: Words = ()
    """forbid a word"""
    min_tokens: int = 0
    """do not end the text before it has so many tokens"""
    force: Words = ()
    """require a word before the text ends"""


@dataclass(frozen=True)
class Drawing:
    """The distribution to draw from. The rules are applied in this order."""

    temperature: float = 0.8
    """0 takes the most probable token, 1 draws from the model's own distribution"""
    top_k: int = 0
    """draw only from the K most probable tokens; 0 is off"""
    top_p: float = 1.0
    """draw only from the most probable tokens that together have this probability; 1 is off"""
    min_p: float = 0.0
    """draw only from tokens at least this many times as probable as the most probable; 0 is off"""
    typical_p: float = 1.0
    """draw only from tokens whose surprise is nearest to the entropy, of this probability together; 1 is off"""
    seed: Number = None
    """the same seed gives the same text"""


@dataclass(frozen=True)
class BeamSearch:
    """Search for the most probable text instead of drawing one."""

    beams: int = 1
    """keep so many of the most probable texts; 1 is off"""
    length_penalty: float = 1.0
    """divide a text's log-probability by this power of its length; above 1 favours long texts"""


@dataclass(frozen=True)
class Speed:
    """Memory and speed."""

    cache_bits: Number = None
    """store the cache in half precision (16) or quantized (8, 4)"""
    guesses: int = 4
    """tokens that a draft proposes per step"""


@dataclass(frozen=True)
class GenerationSettings(Speed, BeamSearch, Drawing, Constraints, Length):
    """Every rule and limit of a generation. Raises ``UsageError`` (a ``ValueError``) for invalid values."""

    logprobs: Number = None
    """return each token's log-probability and those of the N most probable"""
    stop_token_ids: tuple[int, ...] = ()
    """end the text before any of these tokens too"""
    ignore_eos: bool = False
    """do not end the text where the model ends it; its end tokens have no text"""

    @classmethod
    def of(cls, *groups: Any, **more: Any) -> GenerationSettings:
        """Combine some of the groups above, and more settings by name; ``UsageError`` names a flag."""
        known = {field.name for field in fields(cls)}
        grouped = {name: value for group in groups for name, value in vars(group).items() if name in known}
        try:
            return cls(**grouped, **more)
        except UsageError as error:
            raise UsageError(f"--{error}") from None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens"):
            self._require(name, self._is_count(name), "0 or above")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**64, "0 or above (and under 2^64)")
        self._require("cache_bits", self.cache_bits in (None, 16, 8, 4), "16 (half precision), 8 or 4 (quantized)")
        self._require("beams", self._is_count("beams") and self.beams > 0, "1 (off) or above")
        self._require("length_penalty", isfinite(self.length_penalty), "a number")
        self._require("guesses", self._is_count("guesses") and self.guesses > 0, "1 or above")
        self._require("logprobs", self.logprobs is None or self._is_count("logprobs"), "0 or above")
        self._require("context", self.context in (STOP, SLIDE), f"{STOP} or {SLIDE}")
        self._require("temperature", 0 <= self.temperature < inf, "0 (greedy) or above")
        self._require("top_k", self._is_count("top_k"), "0 (off) or a number of ids")
        for name in ("top_p", "typical_p"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1 (off)")
        self._require("min_p", 0 <= self.min_p <= 1, "at least 0 (off) and at most 1")
        self._require("repetition_penalty", 0 < self.repetition_penalty < inf, "above 0; 1 is off")
        for name in ("frequency_penalty", "presence_penalty"):
            self._require(name, isfinite(getattr(self, name)), "a number; 0 is off")
        self._require("no_repeat_ngram", self._is_count("no_repeat_ngram"), "0 (off) or a number of tokens")
        for name in ("stop", "ban", "force"):
            texts = getattr(self, name)
            self._require(name, not isinstance(texts, str) and all(texts), "texts of at least one character")
        for token_id, bias in self.logit_bias.items():
            if isnan(bias) or bias == inf:
                raise UsageError(f"logit-bias of id {token_id} must be a number or -inf, not {bias}")
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min-tokens {self.min_tokens} is more than max-tokens {self.max_tokens}")

    def _is_count(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and value >= 0

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UsageError(f"{name.replace('_', '-')} must be {expected}, not {getattr(self, name)!r}")
