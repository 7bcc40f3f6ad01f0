"""Look into a module of MLX or torch: find it, compute it in float32, and call its blocks by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any

from mlx_gpt.check.doctor.case import Case
from mlx_gpt.check.doctor.modules import is_mlx, is_module

# Called in place of a submodule: (its name, its own call, *arguments, **settings) -> what the submodule returns.
Watcher = Callable[..., Any]


def module_of(case: Case) -> Any:
    """Return the module under examination: the one given, else the largest that ``forward`` refers to, or None."""
    if case.has("module"):
        return getattr(case.given["module"], "_orig_mod", case.given["module"])
    modules = [
        getattr(module, "_orig_mod", module) for module in referred(case.given.get("forward")) if is_module(module)
    ]
    return max(modules, key=lambda module: len(list(named_modules(module))), default=None)


def referred(function: Any, depth: int = 3) -> Iterator[Any]:
    """Yield the objects that a function refers to, and those that functions among them refer to.

    These are the object it is bound to and that object's attributes, its own attributes, closure and globals.
    """
    owner = getattr(function, "__self__", None)
    code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    values = [owner, *getattr(owner, "__dict__", {}).values(), *getattr(function, "__dict__", {}).values()]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not assigned yet
            values.append(cell.cell_contents)
    values += [known[name] for name in getattr(code, "co_names", ()) if name in known]
    for value in values:
        yield value
        if depth and isinstance(value, (FunctionType, MethodType)):
            yield from referred(value, depth - 1)


def named_modules(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of each submodule and the submodule."""
    yield from module.named_modules()


def has_half(module: Any) -> bool:
    return any(str(array.dtype).endswith("float16") for array in arrays_of(module))


def arrays_of(module: Any) -> list[Any]:
    """Return a module's parameters, and in torch its buffers."""
    if is_mlx(module):
        from mlx.utils import tree_flatten

        return list(dict(tree_flatten(module.parameters())).values())
    return [*module.parameters(), *module.buffers()]


@contextmanager
def in_float32(module: Any) -> Iterator[None]:
    """Convert the parameters to float32, and put the original ones back at the end."""
    if is_mlx(module):
        import mlx.core as mx
        from mlx.utils import tree_map

        kept = module.parameters()
        try:
            half = (mx.float16, mx.bfloat16)
            module.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype in half else a, kept))
            yield
        finally:
            module.update(kept)
        return
    tensors = [tensor for tensor in arrays_of(module) if str(tensor.dtype).endswith("float16")]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


@contextmanager
def watched(modules: dict[str, Any], watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` in place of each of the submodules, which are given by name."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context((watched_mlx if is_mlx(module) else watched_torch)(name, module, watcher))
        yield


@contextmanager
def watched_mlx(name: str, module: Any, watcher: Watcher) -> Iterator[None]:
    own = type(module)

    def call(self: Any, *arguments: Any, **settings: Any) -> Any:
        return watcher(name, lambda *given, **more: own.__call__(self, *given, **more), *arguments, **settings)

    object.__setattr__(module, "__class__", type(own.__name__, (own,), {"__call__": call}))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", own)


@contextmanager
def watched_torch(name: str, module: Any, watcher: Watcher) -> Iterator[None]:
    own = module.forward
    had = "forward" in vars(module)

    def forward(*arguments: Any, **settings: Any) -> Any:
        return watcher(name, own, *arguments, **settings)

    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = own
        else:
            del module.forward
