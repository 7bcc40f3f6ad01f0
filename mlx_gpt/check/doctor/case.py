"""The model under examination: calls of the user's functions, none of which can end the examination."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from mlx_gpt.check.doctor.arrays import NotNumbers, as_numpy, back_to, misnamed, named_arrays, same, wrong_shape
from mlx_gpt.check.doctor.calls import TimeIsUp, exit_raised, silenced, time_limit
from mlx_gpt.check.doctor.modules import logits_of

Made = TypeVar("Made")
PRIMINGS = 32  # calls, after which the state of a model that halves it at each call is below 1e-9
CALL_SECONDS = 20.0  # the longest that one call may take
LEAST = 2.0  # seconds after which a function that has not yet returned from any call is taken to block
BLOCKS = 100  # a call is taken to block after this many times the longest call that returned
STOPS = 2  # calls that were stopped, after which a function is not called again
GRACE = 4.0  # seconds in which a call that was stopped should end


class CallFailed(Exception):
    """A function of the user's raised, blocked, or returned something of the wrong kind."""

    def __init__(self, name: str, code: str, message: str):
        super().__init__(message)
        self.name, self.code, self.message = name, code, message


class BudgetSpent(Exception):
    """The time of the examination, or of the group of checks, is over."""


class Case:
    """The arguments of ``examine``, by name in ``given``, and methods that call them timed, silenced and checked.

    Evidence that several checks use is made once, by ``case.once(function)``.
    """

    def __init__(self, given: Mapping[str, Any], vocab_size: int, n_positions: int, minutes: float, seed: int = 0):
        self.given = {name: value for name, value in given.items() if value is not None}
        self.vocab_size, self.n_positions = vocab_size, n_positions
        self.end = self.group_end = time.monotonic() + 60 * minutes
        self.stops: dict[str, list[CallFailed]] = defaultdict(list)  # calls that were too slow, by function
        self.waited: dict[str, float] = defaultdict(float)  # seconds of all calls that were stopped
        self.longest: dict[str, float] = {}  # seconds of a call that returned
        self.current: tuple[str, float] | None = None  # the function that is called, and when it is stopped
        self.rng = np.random.default_rng(seed)
        self.one_row = False  # forward takes one row at a time
        self.slow = False  # forward is slow, so its texts are short
        self.changed_inputs: set[str] = set()  # functions that wrote into their arguments
        self.found: dict[str, dict[str, Any]] = {}  # code -> fields of the findings so far
        self.primer: np.ndarray | None = None  # ids read before each call, so that all begin in the same state
        self._made: dict[Any, Any] = {}
        self._back: dict[str, Callable[[np.ndarray], Any]] | None = None
        self._loads = False  # load_parameters has been seen to change the parameters

    def has(self, *names: str) -> bool:
        return all(name in self.given for name in names)

    def seconds_left(self) -> float:
        """Return the seconds that are left to the group of checks that is being examined."""
        return self.group_end - time.monotonic()

    def begin_group(self, groups_left: int) -> None:
        """Give the next group of checks twice its equal share of the time that is left; all of it to the last."""
        now = time.monotonic()
        self.group_end = now + (self.end - now) * 2 / (groups_left + 1)

    def once(self, make: Callable[[Case], Made]) -> Made:
        """Return ``make(self)``, computed at the first call; what it raised is raised again."""
        if make not in self._made:
            try:
                self._made[make] = (make(self), None)
            except CallFailed as error:
                self._made[make] = (None, error)
        made, failure = self._made[make]
        if failure is not None:
            raise failure
        return made

    def prime(self, ids: np.ndarray | None) -> None:
        """Let the model read ids before each further call, and drop the evidence made without that."""
        self.primer, self._made = ids, {}

    def call(self, name: str, *arguments: Any, **settings: Any) -> Any:
        """Call a function of the user's. Raises ``CallFailed`` or ``BudgetSpent``."""
        return self.call_function(name, self.given[name], *arguments, **settings)

    def call_function(self, name: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        left, start = self.seconds_left(), time.monotonic()
        if left <= 0:
            raise BudgetSpent
        if len(self.stops[name]) >= (STOPS if name in self.longest else 1):
            raise self.stops[name][-1]
        before = [np.copy(argument) for argument in arguments if isinstance(argument, np.ndarray)]
        interrupts: list[int] = []
        limit = min(CALL_SECONDS, left)
        try:
            with silenced(), exit_raised(), self.called(name, limit), time_limit(limit, interrupts):
                result = function(*arguments, **settings)
        except BaseException as error:
            if interrupts:
                raise
            if (seconds := time.monotonic() - start) >= limit:
                raise self.stopped(name, seconds) from None
            raise raised(name, error, settings) from error
        if (seconds := time.monotonic() - start) >= CALL_SECONDS:
            raise self.stopped(name, seconds)
        self.longest[name] = max(self.longest.get(name, 0.0), seconds)
        after = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        if any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
            self.changed_inputs.add(name)
            for argument, original in zip(after, before, strict=True):
                argument[...] = original
        return result

    @contextmanager
    def called(self, name: str, seconds: float) -> Iterator[None]:
        self.current = name, time.monotonic() + seconds
        try:
            yield
        finally:
            self.current = None

    def blocked(self) -> CallFailed | None:
        """Return the failure of a call that has not ended though it was stopped."""
        name, end = self.current or ("", np.inf)
        if time.monotonic() < end + GRACE:
            return None
        return CallFailed(name, "too-slow", f"{name} does not return, and could not be stopped")

    def stopped(self, name: str, seconds: float) -> CallFailed | BudgetSpent:
        """Return the failure of a call that was stopped: too slow, or no time was left for one that may be sound."""
        self.waited[name] += seconds
        longest = self.longest.get(name, 0.0)
        if seconds < CALL_SECONDS and self.waited[name] < max(LEAST, BLOCKS * longest):
            return BudgetSpent()
        what = f"one call of {name} took more than {seconds:.2g} s"
        if not longest:
            what = f"{name} did not return in {self.waited[name]:.2g} s"
        self.stops[name].append(CallFailed(name, "too-slow", what))
        return self.stops[name][-1]

    def logits(self, ids: Any, name: str = "forward", function: Callable[..., Any] | None = None) -> np.ndarray:
        """Return the logits of ids (B, T): (B, T, V) float32. Reads row by row where forward takes one row only.

        ``function`` is called in place of the argument ``name``.
        """
        ids = np.asarray(ids, np.int32)
        if self.one_row and len(ids) > 1:
            return np.concatenate([self.logits(row[None], name, function) for row in ids])
        call = self.given[name] if function is None else function
        if self.primer is not None:
            for _ in range(PRIMINGS):
                self.call_function(name, call, self.primer.copy())
        logits = self.call_function(name, lambda x: as_numpy(logits_of(call(x))), ids.copy())
        if logits.shape != (*ids.shape, self.vocab_size):
            raise CallFailed(name, "wrong-shape", wrong_shape(name, logits.shape, ids.shape, self.vocab_size))
        return logits.astype(np.float32)

    def arrays(self, name: str, *arguments: Any) -> dict[str, np.ndarray]:
        """Return the arrays that ``parameters`` or ``gradient`` returns, by name."""
        arrays_by_name: dict[str, np.ndarray] = self.call_function(
            name, lambda *given: named_arrays(self.given[name](*given)), *arguments
        )
        of_parameters = name == "gradient" and self.has("parameters")
        if of_parameters and (message := misnamed(arrays_by_name, self.once(parameter_shapes))):
            raise CallFailed(name, "wrong-shape", message)
        return arrays_by_name

    def number(self, name: str, *arguments: Any, function: Callable[..., Any] | None = None) -> float:
        """Return the number that ``loss`` or ``step`` returns."""
        call = self.given[name] if function is None else function
        value: np.ndarray = self.call_function(name, lambda *given: as_numpy(call(*given)), *arguments)
        if value.size != 1:
            raise CallFailed(name, "wrong-shape", f"{name} returned shape {value.shape}; expected one number")
        return float(value.reshape(-1)[0])

    def ids(self, rows: int, length: int) -> np.ndarray:
        """Return random ids (rows, length), int32."""
        return self.rng.integers(0, self.vocab_size, (rows, length)).astype(np.int32)

    @contextmanager
    def parameters_restored(self) -> Iterator[None]:
        """Put the parameters back at the end, where they can be read and loaded."""
        if not self.has("parameters", "load_parameters"):
            yield
            return
        saved = self.arrays("parameters")
        self.converters()  # calls ``parameters``, for which there may be no time at the end
        try:
            yield
        finally:
            self.load(saved)

    def converters(self) -> dict[str, Callable[[np.ndarray], Any]]:
        """Return for each parameter of the user's a function that converts NumPy to its library and type."""
        if self._back is None:
            self._back = {str(name): back_to(array) for name, array in dict(self.call("parameters")).items()}
        return self._back

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Load parameters, as arrays of the library and type that the user's own have."""
        converters = self.converters()
        theirs = {name: converters[name](value) for name, value in values.items()}
        others = self.other_than(values)
        try:  # not by ``call``, which refuses when the time is up: the parameters must be put back
            with silenced(), self.called("load_parameters", CALL_SECONDS), time_limit(CALL_SECONDS):
                self.given["load_parameters"](theirs)
        except TimeIsUp:
            raise self.stopped("load_parameters", CALL_SECONDS) from None
        except Exception as error:
            raise raised("load_parameters", error) from error
        if others:
            now = self.arrays("parameters")
            self._loads = any(not same(before, now[name]) for name, before in others.items())
            if not self._loads:
                what = f"load_parameters left {next(iter(others))} as it was"
                raise CallFailed("load_parameters", "wrong-shape", what)

    def other_than(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the present parameters that differ from values, until loading has been seen to change some.

        Nothing where these are few: ``load_parameters`` may leave out what the model does not use.
        """
        with suppress(BudgetSpent, CallFailed):  # values must be loaded all the same
            if not self._loads:
                now = self.arrays("parameters")
                others = {name: now[name] for name in now if name in values and not same(now[name], values[name])}
                return others if 2 * len(others) > len(values) else {}
        return {}


def raised(name: str, error: BaseException, settings: Mapping[str, Any] | None = None) -> CallFailed:
    """Return the failure of a function that raised, with the settings it was called with, or returned no numbers."""
    if isinstance(error, NotNumbers):
        return CallFailed(name, "wrong-shape", f"{name} returned {error}")
    try:
        text = f": {error}"
    except Exception:  # of the error's own __str__
        text = ""
    given = " with " + ", ".join(f"{key} = {value:g}" for key, value in settings.items()) if settings else ""
    return CallFailed(name, "raises", f"{name} raised {type(error).__name__}{given}{text}")


def parameter_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in case.arrays("parameters").items()}
