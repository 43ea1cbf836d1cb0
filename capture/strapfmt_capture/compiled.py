"""Compiled code around the hooks: what is kept out of it, which modules run it, and how it is forgotten.

A hook that Dynamo traces puts its value on its `Tap`, and the graph returns it there: see `hooks.Hooks`. All else that
a capture does is Python that no graph may hold.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from strapfmt.errors import CompiledModelError

__all__ = [
    "Around",
    "attached_around",
    "check_not_compiled",
    "forget_compiled_code",
    "guard_hooks",
    "inlined",
    "is_below_compiler",
    "is_compiled",
    "named_originals",
    "original",
    "resumed",
    "untraced",
    "wrappers_of",
]


class Around(Protocol):
    """What runs around compiled code; `enter` and `leave` bound a call of a model whose rows are known."""

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> None:
        """Run before a model."""

    def leave(self, module: torch.nn.Module, args: Any, output: Any, /) -> None:
        """Run after it, also when it has failed."""

    def before_graph(self, module: torch.nn.Module, args: Any, /) -> None:
        """Run before any other compiled module, and between `enter` and a compiled model."""

    def after_graph(self, module: torch.nn.Module, args: Any, output: Any, /) -> None:
        """Run after any other compiled module."""


_Function = TypeVar("_Function", bound=Callable[..., Any])

# Asking and marking must not import the compiler, which takes a second.
_frames = torch._C._dynamo.eval_frame
_frame_compiler: Callable[[], object] = getattr(_frames, "get_eval_frame_callback", lambda: None)
_HOOK_GUARDS = "skip_nnmodule_hook_guards"
_REASON = (
    "strapfmt: a pass of a captured model begins and ends outside of compiled code; enter the capture after the model "
    "or its parts were compiled (torch.compile(model), model.compile()), compile no function around it, or leave out "
    "fullgraph=True"
)


def untraced(function: _Function) -> _Function:
    """Keep a function and all that it calls out of compiled code: a graph ends before it, or fails as a fullgraph."""
    if not hasattr(_frames, "set_code_exec_strategy"):
        disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled
    _cut_graphs_at(function)
    _skip(function, callees=True)
    return function


def inlined(function: _Function) -> _Function:
    """Let a function be traced as a part of a graph, but never be one of its own."""
    if hasattr(_frames, "set_code_exec_strategy"):
        _skip(function, callees=False)
    return function


def original(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside what `torch.compile` makes of one."""
    while isinstance(inner := getattr(module, "_orig_mod", None), torch.nn.Module):
        module = inner
    return module


def named_originals(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return all modules by their paths, which are the same whether or not `torch.compile` has wrapped some of them.

    A wrapped module is given as its wrapper, as that is what is called; what is inside can be reached through it.
    """
    prefix = "_orig_mod"
    return {
        ".".join(name for name in path.split(".") if name != prefix): module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] != prefix
    }


def wrappers_of(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return what `torch.compile` has made of these modules, wherever it is: they do not know of it."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return []
    kind = dynamo.eval_frame.OptimizedModule
    wanted = {id(module) for module in modules}
    return [each for each in gc.get_objects() if type(each) is kind and id(original(each)) in wanted]


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether a call of this very module runs compiled code, of its own or of a part of it.

    What `torch.compile` has made of it elsewhere does not count, as the module can still be called without.
    """
    return any(
        _has_compiled_forward(module) or module._compiled_call_impl is not None for module in model.modules()
    )


def check_not_compiled(model: torch.nn.Module) -> None:
    """Refuse a compiled model where values have to be gathered from other processes, which a graph does not do.

    Raises
    ------
    CompiledModelError
        Naming the first module that is compiled.
    """
    for path, module in model.named_modules():
        if _has_compiled_forward(module) or module._compiled_call_impl is not None:
            part = f"its module {path!r}" if path else "it"
            raise CompiledModelError(
                f"cannot capture {type(model).__name__}: {part} is compiled, and the model is split by tensor "
                "parallelism; capture it before it is compiled"
            )
    if wrappers_of([model]):
        raise CompiledModelError(
            f"cannot capture {type(model).__name__}: it was compiled by torch.compile, and is split by tensor "
            "parallelism; capture it before it is compiled"
        )


def _has_compiled_forward(module: torch.nn.Module) -> bool:
    """Whether the hooks of a module run outside of code that is compiled inside it."""
    if hasattr(module, "_orig_mod"):
        return True
    return _is_compiled_function(vars(module).get("forward")) or _is_compiled_function(
        getattr(type(module), "forward", None)
    )


@contextmanager
def attached_around(
    model: torch.nn.Module, row_modules: Sequence[torch.nn.Module], hooks: Around
) -> Iterator[None]:
    """Attach what runs before and after compiled code: around `row_modules`, and around parts of `model`."""
    with ExitStack() as handles:
        for wrapper in wrappers_of(row_modules):
            handles.callback(wrapper.register_forward_pre_hook(hooks.enter, with_kwargs=True).remove)
            handles.callback(wrapper.register_forward_pre_hook(hooks.before_graph).remove)
            handles.callback(wrapper.register_forward_hook(hooks.leave, always_call=True).remove)
        for module in model.modules():
            if _has_compiled_forward(module):
                handles.callback(module.register_forward_pre_hook(hooks.before_graph).remove)
                handles.callback(module.register_forward_hook(hooks.after_graph).remove)
            if module._compiled_call_impl is not None:
                handles.enter_context(_called_around(module, hooks, is_row_module=module in row_modules))
        yield


def guard_hooks(handles: ExitStack) -> bool:
    """Have what is compiled from now on, until `handles` are closed, notice the hooks of its modules.

    Code is shared by modules of one class, layers for example, and PyTorch takes them to be alike in their hooks. The
    setting is that of the whole process, as the model may run in any thread, and the capture be left in any.

    Returns
    -------
    bool
        False if there is nothing to set yet, as nothing has been compiled in this process.
    """
    config = sys.modules.get("torch._dynamo.config")
    if not hasattr(config, "_config"):  # not imported, or another thread is about to
        return False
    user = object()
    handles.callback(_hook_guards.release, config, user)
    _hook_guards.acquire(config, user)
    if getattr(config, _HOOK_GUARDS):  # this thread has a setting of its own, which only it can change
        setattr(config, _HOOK_GUARDS, False)
        handles.callback(_set_in, threading.get_ident(), config)
    return True


def forget_compiled_code() -> None:
    """Have everything compiled anew, as compiled code does not notice that hooks come and go."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


def resumed(frame: Any) -> Any:
    """Return the frame of a function of which this one is the rest, behind the end of a graph."""
    while frame.f_code.co_name.startswith("torch_dynamo_resume_in"):
        frame = frame.f_back
    return frame


def _set_in(thread: int, config: Any) -> None:
    if threading.get_ident() == thread:
        setattr(config, _HOOK_GUARDS, True)


class _HookGuards:
    """The setting for as long as any capture runs, of however many.

    PyTorch's settings are those of a thread; what they are in all others is their default.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[object] = set()
        #: What it was, while it is changed.
        self._before: bool | None = None

    def acquire(self, config: Any, user: object) -> None:
        """Set it for one more."""
        with self._lock:
            self._users.add(user)
            place, name = self._place(config)
            if self._before is None:
                self._before = getattr(place, name)
            setattr(place, name, False)

    def release(self, config: Any, user: object) -> None:
        """Put it back, if nobody else needs it."""
        with self._lock:
            self._users.discard(user)
            if not self._users and self._before is not None:
                place, name = self._place(config)
                setattr(place, name, self._before)
                self._before = None

    @staticmethod
    def _place(config: Any) -> tuple[Any, str]:
        """Return what holds the setting, and its name there; before PyTorch 2.6, settings are those of the process."""
        entry = config._config[_HOOK_GUARDS]
        return (entry, "default") if hasattr(entry, "default") else (config, _HOOK_GUARDS)


_hook_guards = _HookGuards()


@contextmanager
def _called_around(module: torch.nn.Module, hooks: Around, *, is_row_module: bool) -> Iterator[None]:
    """Run hooks around what `module.compile()` has made of a call, where its own hooks run inside."""
    compiled: Any = module._compiled_call_impl

    @inlined
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        output = None
        if is_row_module:
            hooks.enter(module, args, kwargs)
        hooks.before_graph(module, args)
        try:
            output = compiled(*args, **kwargs)
        finally:
            if is_row_module:
                hooks.leave(module, args, output)
            else:
                hooks.after_graph(module, args, output)
        return output

    module._compiled_call_impl = call
    try:
        yield
    finally:
        if module._compiled_call_impl is call:  # else it was compiled again meanwhile
            module._compiled_call_impl = compiled


def _is_compiled_function(function: object) -> bool:
    """Whether this is what torch.compile makes of a function; torch.compiler.disable leaves the same mark."""
    if hasattr(function, "_torchdynamo_disable"):
        return False
    return any(
        hasattr(each, "_torchdynamo_orig_callable")
        for each in (function, getattr(function, "__wrapped__", None))
    )


def _cut_graphs_at(function: Callable[..., Any]) -> None:
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]


def _skip(function: Callable[..., Any], *, callees: bool) -> None:
    action = _frames._FrameAction
    strategy = _frames._FrameExecStrategy(action.SKIP, action.SKIP if callees else action.DEFAULT)
    _frames.set_code_exec_strategy(function.__code__, strategy)


@inlined
def is_below_compiler() -> bool:
    """Whether PyTorch compiles what this thread calls, be it while that traces or while it falls back to Python."""
    return _frame_compiler() not in (None, False)


# Not `untraced`, below which there is no compiler.
_cut_graphs_at(is_below_compiler)
