"""Load the arguments of ``examine`` from a function in a user's Python file: ``my_gpt.py:build``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_gpt.check.doctor.case import TimeIsUp, silenced, time_limit
from mlx_gpt.check.doctor.examine import examine
from mlx_gpt.errors import UsageError
from mlx_gpt.files import expand_user

SECONDS = 300.0  # that loading the file and calling the function may take
KNOWN = list(inspect.signature(examine).parameters)


def built_arguments(name: str) -> dict[str, Any]:
    """Return what the function returns that is named as ``my_gpt.py:build``.

    The file is loaded as a module of its own name, with its folder on ``sys.path``, and nothing is written there. What
    it prints is dropped. Raises ``UsageError``.
    """
    file_name, _, function_name = name.rpartition(":")
    file = expand_user(file_name or name)
    if not file_name or not function_name:
        raise UsageError(f"{name}: expected a file and a function, such as {file.name or 'my_gpt.py'}:build")
    if not file.is_file():
        raise UsageError(f"{file}: expected a Python file, found {'something else' if file.exists() else 'none'}")
    with explained(name, file), silenced():
        function = function_of(load(file), function_name, file)
        found = function()
    return checked_names(found, name)


def load(file: Path) -> ModuleType:
    """Execute a file as a module, named as the file unless a loaded module or one of Python's has that name."""
    stem = file.stem if file.stem not in {*sys.stdlib_module_names, *sys.modules} else f"{file.stem}_examined"
    spec = importlib.util.spec_from_file_location(stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: expected a Python file, with a name that ends in .py")
    sys.dont_write_bytecode = True  # no __pycache__ in the user's folder
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function_of(module: ModuleType, name: str, file: Path) -> Any:
    function = getattr(module, name, None)
    if callable(function):
        return function
    own = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if function is not None:
        raise UsageError(f"{file}: {name} must be a function without arguments, not {type(function).__name__}")
    raise UsageError(f"{file}: has no function {name}{closest(name, own)}; define it, without arguments")


def checked_names(arguments: Any, name: str) -> dict[str, Any]:
    """Return the arguments if all have names that ``examine`` knows."""
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise UsageError(f"{name}: must return a dict of the arguments of examine(), such as forward, not {kind}")
    for key in arguments:
        if key not in KNOWN:
            raise UsageError(f"{name}: returned {key!r}, which examine() does not know{closest(str(key), KNOWN)}")
    return dict(arguments)


def closest(name: str, names: list[str]) -> str:
    """Return the end of an error's message: the closest of the known names, else all of them."""
    close = get_close_matches(name, names, n=1) or get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; it knows {', '.join(names)}" if names else ""


@contextmanager
def explained(name: str, file: Path) -> Iterator[None]:
    """Raise ``UsageError`` with one line for what the user's code raises, with the place in the user's file."""
    try:
        with time_limit(SECONDS):
            yield
    except (KeyboardInterrupt, UsageError):
        raise
    except TimeIsUp:
        raise UsageError(f"{name}: took more than {SECONDS:g} s and was stopped; build a smaller model") from None
    except SyntaxError as error:
        raise UsageError(f"{error.filename or file}:{error.lineno or 1}: {error.msg}; repair it") from error
    except BaseException as error:
        raise UsageError(f"{place_of(error, file)}: {type(error).__name__}: {error}; repair it") from error


def place_of(error: BaseException, file: Path) -> str:
    """Return file and line of the last call in the user's folder that led to an exception."""
    folder = str(file.resolve().parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
