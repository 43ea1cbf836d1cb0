"""What PyTorch does while a hook runs: it repeats a pass, traces it, puts it into a graph, or just runs the model."""

from __future__ import annotations

import sys

import torch
import torch.utils.checkpoint

__all__ = ["checkpointed_call", "has_values", "is_graph_made", "is_repetition"]

_CHECKPOINT_FILE = torch.utils.checkpoint.__file__


def is_repetition() -> bool:
    """Whether this is the second forward pass of gradient checkpointing, made by autograd while it runs backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT_FILE:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def checkpointed_call() -> object | None:
    """Return what stands for the call of a reentrant checkpoint that this thread is in, the same in its repetition."""
    frame = sys._getframe(1)
    while frame is not None and not (
        frame.f_code.co_filename == _CHECKPOINT_FILE and "ctx" in frame.f_code.co_varnames
    ):
        frame = frame.f_back  # type: ignore[assignment]
    call: object | None = None if frame is None else frame.f_locals.get("ctx")
    return call


def has_values(x: torch.Tensor) -> bool:
    """Whether a tensor is plain, dense memory with values: not on "meta", sharded, traced or inside `torch.func`."""
    return (
        x.layout is torch.strided
        and x.device.type != "meta"
        and not hasattr(x, "full_tensor")
        and not hasattr(x, "fake_device")
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_graph_made() -> bool:
    """Whether what runs now is not computed but put into a CUDA graph."""
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()
