"""Stopping early: a forward pass that ends before a block, and what the call then returns.

A hook before the block raises, and the outermost call of a row module catches: its `forward` is replaced by one that
does, for as long as the capture runs. All hooks of the model run as usual, and the pass counts as complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch

from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError, CaptureError, StoppedPassError
from strapfmt_capture.decoders import find_decoder, named_decoders
from strapfmt_capture.hookpoints import HookPoint

__all__ = ["Stop", "StoppedPass"]


class StoppedPass:
    """What a forward pass that ended early returns: nothing that could be taken for logits.

    Asking it for anything raises `StoppedPassError`: an attribute, an item, what is in it, its length. It has no
    `__iter__`, by which it would be taken for a tuple of outputs.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> NoReturn:
        self._raise(f"no {name!r}")

    def __getitem__(self, key: object) -> NoReturn:
        self._raise("no logits, nor anything else")

    def __len__(self) -> NoReturn:
        self._raise("no length")

    def __bool__(self) -> bool:
        return True  # or __len__ would be asked

    def __repr__(self) -> str:
        return f"<forward pass that ended before block {self.__dict__.get('_layer')}>"

    def _raise(self, what: str) -> NoReturn:
        layer = self.__dict__.get("_layer")
        raise StoppedPassError(
            f"this forward pass ended before block {layer}, as capture was told by stop_at_layer={layer}: it has {what}"
            "; call the model for its sites only (generate() needs logits), or leave out stop_at_layer"
        )


class Stop:
    """Where the passes of a model end, found and checked before anything is attached.

    Parameters
    ----------
    model : torch.nn.Module
        Of a known architecture.
    points : iterable of HookPoint
        The sites; all must come before the block.
    layer : int
        How many blocks run.

    Raises
    ------
    ArgumentError
        If the model's blocks are not known, there are fewer, or a site comes later.
    """

    def __init__(self, model: torch.nn.Module, points: Iterable[HookPoint], layer: int) -> None:
        decoder = find_decoder(model)
        if decoder is None:
            raise ArgumentError(
                f"stop_at_layer: expected a model whose blocks are known (see strapfmt_capture.architectures), got a "
                f"{type(model).__name__}"
            )
        if len(named_decoders(model)) > 1:
            raise ArgumentError(
                "stop_at_layer: expected a model of one stack of blocks, got an encoder-decoder model; capture one of "
                "its stacks, model.get_encoder(), or leave stop_at_layer out"
            )
        self._path = decoder.below(decoder.architecture.blocks)
        self._blocks = model.get_submodule(self._path)
        self.layer = as_integer("stop_at_layer", layer, least=0)
        names = [name for name, _ in self._blocks.named_children()]
        if self.layer > len(names):
            raise ArgumentError(
                f"stop_at_layer: expected 0 to {len(names)}, the number of blocks; got {layer}"
            )
        late = [f"{self._path}.{name}" for name in names[self.layer :]]
        late += [decoder.below(path) for path in [decoder.architecture.final_norm] if path]
        late += [path for path in [decoder.head] if path is not None]
        for point in points:
            around = point.where == "out" and _is_inside(self._path, point.module_path)
            if around or any(_is_inside(point.module_path, path) for path in late):
                raise ArgumentError(
                    f"stop_at_layer={self.layer}: expected sites that the blocks before it make, but site "
                    f"{point.site!r} at {point.hook_point} comes later; leave it out, or stop later"
                )
        self._depth = 0
        self._is_over = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Stop:
        # A copy of a hooked model takes its hooks along; they are these.
        return self

    def __reduce__(self) -> tuple[Callable[[], _Over], tuple[()]]:
        # A model that is stored meanwhile stops nowhere.
        return _Over, ()

    @contextmanager
    def attached(self, model: torch.nn.Module, row_modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """End passes early inside the block; the model is as it was on exit, whatever happened.

        Raises
        ------
        CaptureError
            If another capture does the same to this model.
        """
        with ExitStack() as undo:
            for module in row_modules:
                if module is model or any(each is self._blocks for each in module.modules()):
                    self._replace_forward(module, undo)
            blocks = list(self._blocks.children())
            if self.layer < len(blocks):
                handle = blocks[self.layer].register_forward_pre_hook(self.stop)
            else:
                handle = blocks[-1].register_forward_hook(self.stop)
            undo.callback(handle.remove)
            undo.callback(self._end)
            yield

    def stop(self, module: torch.nn.Module, args: object, output: object = None) -> None:
        """Run where the pass ends."""
        if not self._is_over and self._depth:
            raise _Stopped

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a forward that may be ended, and if it is the outermost, catch that."""
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        except _Stopped:
            if self._depth > 1:
                raise
            return StoppedPass(self.layer)
        finally:
            self._depth -= 1

    def _replace_forward(self, module: torch.nn.Module, undo: ExitStack) -> None:
        before = vars(module).get("forward")  # of its own: accelerate puts one there
        if isinstance(before, _Forward):
            raise CaptureError(
                "another capture of this model runs with stop_at_layer; only one at a time can end its passes"
            )
        module.forward = _Forward(self, module.forward)
        if before is None:
            undo.callback(delattr, module, "forward")
        else:
            undo.callback(setattr, module, "forward", before)

    def _end(self) -> None:
        self._is_over = True


class _Stopped(Exception):  # noqa: N818 - it is none
    """Ends a pass. No BaseException: hooks that are always called would be left out."""


class _Forward:
    """A module's `forward` by way of `Stop.run`."""

    def __init__(self, stop: Stop, forward: Callable[..., Any]) -> None:
        self.__wrapped__, self._stop = forward, stop  # its signature is that of what it wraps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stop.run(self.__wrapped__, args, kwargs)


class _Over:
    """What is left of `Stop` in a model that was stored meanwhile: it does nothing."""

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it."""
        return forward(*args, **kwargs)

    def stop(self, *args: object) -> None:
        """Do nothing."""


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
