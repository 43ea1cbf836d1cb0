"""What PyTorch is doing in this thread while a hook runs: compiling, repeating a pass, or just running the model."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.utils.checkpoint

from strapfmt.errors import CompiledModelError

__all__ = ["check_runs_eagerly", "has_values", "is_repetition"]

# What compiles the Python frames of this thread; asking must not import the compiler.
_frame_compiler: Callable[[], object] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None
)
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__


def check_runs_eagerly() -> None:
    """Refuse to run below torch.compile, be it while that traces or while it falls back to Python.

    Raises
    ------
    CompiledModelError
    """
    if _frame_compiler() not in (None, False) or torch.compiler.is_compiling():
        raise CompiledModelError(
            "the model runs under torch.compile, where hooks are not run reliably; capture first and compile "
            "afterwards, or capture a copy that is not compiled"
        )


def is_repetition() -> bool:
    """Whether this is the second forward pass of gradient checkpointing, made by autograd while it runs backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT_FILE:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def has_values(x: torch.Tensor) -> bool:
    """Whether a tensor is plain, dense memory with values: not on "meta", sharded, traced or inside `torch.func`."""
    return (
        x.layout is torch.strided
        and x.device.type != "meta"
        and not hasattr(x, "full_tensor")
        and not hasattr(x, "fake_device")
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
