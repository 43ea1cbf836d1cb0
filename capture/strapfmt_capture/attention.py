"""Calls of the function that an attention module dispatches to, and the pattern that fused kernels never make.

Modules of Hugging Face find that function by name in a table, the `AttentionInterface` of their modelling file. While a
module is watched, the entry in use stands for a function that first tells the watchers of the module about its call and
then does what the entry did. Modules that nobody watches pass straight through. Watchers are an attribute of their
module, as hooks are: a compiler follows that, and layers that are watched alike share what it makes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from strapfmt.errors import CaptureError
from strapfmt_capture.compiled import original
from strapfmt_capture.eager import is_graph_made
from strapfmt_capture.heads import namespace

__all__ = ["AttentionCall", "check_watchable", "watched"]

_TABLE = "ALL_ATTENTION_FUNCTIONS"
# What a pattern made of queries, keys and a mask leaves out: sinks, biases, packed sequences, paged caches.
_NOT_COMPUTED = ("s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "block_table", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What an attention function is called with.

    Attributes
    ----------
    module : torch.nn.Module
        The attention module.
    implementation : str
        Name of the function: `"sdpa"`, `"flash_attention_2"`, ...
    query : torch.Tensor [n_sequences, heads, n_query, d_head]
    key : torch.Tensor [n_sequences, kv_heads, n_keys, d_head]
        All that are attended to, those in the cache as well.
    mask : object
        As this implementation takes it.
    options : mapping
        The keyword arguments: `scaling`, `sliding_window`, `softcap`, ...
    """

    module: torch.nn.Module
    implementation: str
    query: torch.Tensor
    key: torch.Tensor
    mask: Any
    options: Mapping[str, Any]

    def pattern(self) -> torch.Tensor:
        """Compute the attention probabilities, in float32 up to the end, without dropout.

        Returns
        -------
        torch.Tensor [n_sequences, heads, n_query, n_keys]
            A new tensor of the dtype of the queries.

        Raises
        ------
        CaptureError
            If this call has something that is not known how to compute.
        """
        if strange := [name for name in _NOT_COMPUTED if self.options.get(name) is not None]:
            raise self._refusal(f"it is given {', '.join(strange)}")
        bias = self._bias()
        with torch.no_grad():
            n_sequences, n_heads, *rest = self.query.shape
            n_kv_heads = self.key.shape[1]
            query = self.query.reshape(n_sequences, n_kv_heads, n_heads // n_kv_heads, *rest)
            scores = (query @ self.key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
            scaling, softcap = self.options.get("scaling"), self.options.get("softcap")
            scores = scores * (self.query.shape[-1] ** -0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if bias is not None and bias.dtype is torch.bool:
                scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
            elif bias is not None:
                scores = scores + bias
            return torch.softmax(scores, dim=-1, dtype=torch.float32).to(self.query.dtype)

    def _bias(self) -> torch.Tensor | None:
        """Which keys each query attends to (bool), or what is added to its scores: [*, n_query, n_keys]."""
        mask = self.mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            return mask[..., : self.key.shape[2]]
        if self.implementation == "sdpa" and mask is None:
            is_causal = self._is_causal and self.query.shape[2] > 1
            return self._places(self.query.shape[2] - 1, None) if is_causal else None
        if "flash" in self.implementation and (mask is None or (_is_tensor(mask) and mask.ndim == 2)):
            if mask is None:
                self._check_is_not_packed()
            places = self._places(self.key.shape[2] - 1, self.options.get("sliding_window"))
            return places if mask is None else places & mask[:, None, None, -self.key.shape[2] :].bool()
        raise self._refusal(f"{self.implementation!r} is given a mask of type {type(mask).__name__}")

    @property
    def _is_causal(self) -> bool:
        said = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)

    def _places(self, last_query: int, window: int | None) -> torch.Tensor:
        """Which keys each query attends to by their distance, if the last query is at place `last_query`."""
        n_query, n_keys = self.query.shape[2], self.key.shape[2]
        queries = torch.arange(last_query - n_query + 1, last_query + 1, device=self.query.device)[:, None]
        distance = queries - torch.arange(n_keys, device=self.query.device)
        seen = distance >= 0 if self._is_causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if window is None else seen & (distance.abs() < window)

    def _check_is_not_packed(self) -> None:
        """Refuse sequences of one row that flash attention tells apart by their positions, if it is given no mask."""
        positions = self.options.get("position_ids")
        if positions is None or len(self.query) != 1 or positions.shape[-1] == 1:
            return
        if is_graph_made():
            raise self._refusal(
                "whether several sequences are packed into one cannot be asked in a CUDA graph"
            )
        if bool((positions.diff(dim=-1) != 1).any()):
            raise self._refusal("several sequences are packed into one")

    def _refusal(self, why: str) -> CaptureError:
        return CaptureError(
            f"{type(self.module).__name__}: cannot recompute the attention pattern of this pass, as {why}; load the "
            'model with attn_implementation="eager", which computes it'
        )


Watcher = Callable[[AttentionCall], None]

# The attribute of a watched module that lists its watchers.
_WATCHERS = "_strapfmt_attention_watchers"


def check_watchable(module: torch.nn.Module) -> None:
    """Refuse an attention module that does not find its function in a table.

    Raises
    ------
    CaptureError
    """
    _entry(original(module))


@contextmanager
def watched(module: torch.nn.Module, watcher: Watcher) -> Iterator[None]:
    """Have `watcher` told of every call of the attention function by `module`; it is forgotten on exit.

    Raises
    ------
    CaptureError
        If the module does not dispatch, or to nothing that is in the table.
    """
    module = original(module)
    entry = _entry(module)
    with _changing:
        _entries.setdefault((id(entry.table), entry.name), entry)
        _entries[id(entry.table), entry.name].add(module, watcher)
    try:
        yield
    finally:
        with _changing:
            _entries[id(entry.table), entry.name].remove(module, watcher)


class _Entry:
    """One entry of a table while modules are watched."""

    def __init__(self, table: MutableMapping[str, Any], name: str) -> None:
        self.table, self.name = table, name
        self._n_watchers = 0
        self._original: Callable[..., Any]

    def add(self, module: torch.nn.Module, watcher: Watcher) -> None:
        if not self._n_watchers:
            self._original = self.table[self.name]
            self.table[self.name] = self._call
        self._n_watchers += 1
        vars(module).setdefault(_WATCHERS, []).append(watcher)

    def remove(self, module: torch.nn.Module, watcher: Watcher) -> None:
        watchers = vars(module)[_WATCHERS]
        watchers.remove(watcher)
        if not watchers:
            del vars(module)[_WATCHERS]
        self._n_watchers -= 1
        if not self._n_watchers:
            self._restore()

    def _restore(self) -> None:
        del _entries[id(self.table), self.name]
        if self.table.get(self.name) != self._call:  # somebody else has put another function there since
            return
        del self.table[self.name]  # what lies below, where the table is a layer over a common one
        if self.table.get(self.name) is not self._original:
            self.table[self.name] = self._original

    def _call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        """What stands in the table."""
        if watchers := getattr(module, _WATCHERS, None):
            call = AttentionCall(
                module=module,
                implementation=self.name,
                query=query,
                key=key,
                mask=attention_mask,
                options=options,
            )
            for watcher in list(watchers):
                watcher(call)
        return self._original(module, query, key, value, attention_mask, *args, **options)


# The entries of tables that are watched now, by the id of the table, which the entry keeps alive, and by name.
_entries: dict[tuple[int, str], _Entry] = {}
_changing = threading.Lock()


def _entry(module: torch.nn.Module) -> _Entry:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    names = inspect.unwrap(type(module).forward).__code__.co_names
    table = namespace(module).get(_TABLE) if _TABLE in names else None
    if table is None or not isinstance(name, str) or name not in table:
        raise CaptureError(
            f"{type(module).__name__} with attention {name!r} calls no function of the {_TABLE} of transformers, so "
            'its pattern cannot be recomputed; load the model with attn_implementation="eager"'
        )
    return _Entry(table, name)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
