"""Which rows a tensor is: decided at the first firing of a site, held to at every later one.

`[n_sequences, n_query, *shape]` and `[n_sequences * n_query, *shape]` are one row a token, and so is
`[n_sequences, heads, n_query, width]`, as heads `[heads, width]`. Anything else makes rows of its own: of a tensor with
up to three dimensions every leading one counts rows and the last is a row's shape; of a larger one the first counts
rows. (A tensor of one's own kind that happens to begin with the sizes of the batch cannot be told from tokens.)

The head of a language model may be told to compute some positions only, `[n_sequences, k, d_vocab]` (`logits_to_keep`).
They are rows of tokens, like all of them would be, so that the row space of logits does not depend on which pass comes
first. A uniform site that is neither, in a pass that has tokens, is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt.schema import SiteSpec
from strapfmt_capture.channels import Channels
from strapfmt_capture.eager import has_values
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.passes import Step

__all__ = ["Layout", "Placement", "check_known", "declare"]

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The rows of one firing.

    Attributes
    ----------
    n_rows : int
        Rows to store.
    index : int64 [n_rows] or None
        Which of the rows of the tensor (its leading dimensions flattened) they are; None for all.
    rows : int64 [n_rows] or None
        Their row ids, in the row space of the tokens.
    token_row : int64 [n_rows] or None
        In a site's own row space, the token each belongs to, if that is known (of a head that was first run on
        something else than tokens).
    """

    n_rows: int
    index: _Int64 | None
    rows: _Int64 | None = None
    token_row: _Int64 | None = None

    def at(self, places: _Int64) -> Placement:
        """Return the rows at `places` among these."""
        return Placement(
            n_rows=len(places),
            index=places if self.index is None else self.index[places],
            rows=None if self.rows is None else self.rows[places],
            token_row=None if self.token_row is None else self.token_row[places],
        )

    def among(self, rows: _Int64 | None) -> Placement:
        """Return those whose row ids are among `rows`."""
        assert self.rows is not None  # of tokens
        assert rows is not None
        return self.at(np.flatnonzero(np.isin(self.rows, rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tensors of one site are read as rows.

    Attributes
    ----------
    spec : SiteSpec
    dtype : torch.dtype
    shape : tuple of int
        Shape of a row; -1 where it varies.
    ndim : int or None
        Dimensions of the whole tensor, in a site's own row space.
    is_head : bool
        Whether the module may leave out all but the last positions.
    where : str
        The place in the model, for messages.
    heads_first : bool
        Whether the tensor is `[n_sequences, heads, n_query, width]`; `turned` makes it one row a token.
    channels : Channels or None
        Which elements of the last dimension are stored; `shape` is what is left.
    """

    spec: SiteSpec
    dtype: torch.dtype
    shape: tuple[int, ...]
    ndim: int | None
    is_head: bool
    where: str
    heads_first: bool = False
    channels: Channels | None = None

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is stored of a value, or of its gradient: `turned`, and the channels of it."""
        if self.heads_first:
            x = self.turned(x)
        return x if self.channels is None else self.channels.of(x)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Return a value with its tokens in front, a view."""
        return x.transpose(1, 2) if self.heads_first and x.ndim == 4 else x

    def place(self, x: torch.Tensor, step: Step, chosen: _Int64 | None = None) -> Placement:
        """Return the rows of `x` in `step`.

        Parameters
        ----------
        x : torch.Tensor
            What the site gave, `turned`.
        step : Step
        chosen : int64 [k], optional
            The positions at which a head computes; None: all.

        Raises
        ------
        CaptureError
            If `x` is neither of the dtype and shape declared nor in their row space.
        """
        tokens = self._tokens(x, step, chosen)
        if x.dtype is self.dtype and self.ndim is None and tokens is not None:
            index, rows = tokens
            return Placement(n_rows=len(rows), index=index, rows=rows)
        if x.dtype is self.dtype and self.ndim == x.ndim:
            if self.is_head and tokens is not None:
                index, rows = tokens
                return Placement(n_rows=len(rows), index=index, token_row=rows)
            lead = x.ndim - len(self.shape)
            if x.shape[lead:] == self.shape:
                return Placement(n_rows=math.prod(x.shape[:lead]), index=None)
        raise CaptureError(self._complaint(x, step))

    def _tokens(
        self, x: torch.Tensor, step: Step, chosen: _Int64 | None
    ) -> tuple[_Int64 | None, _Int64] | None:
        """Places in `x` and row ids of the tokens it holds, None if it is not rows of tokens."""
        lead = _token_dimensions(x, step, chosen, is_head=self.is_head)
        if not lead or not _matches(x.shape[lead:], self.shape):
            return None
        if self.is_head and chosen is not None:
            return _at_positions(step, chosen)
        return step.selected, step.rows

    def _complaint(self, x: torch.Tensor, step: Step) -> str:
        row = "x".join(map(str, self.shape)).replace("-1", "?") or "a scalar"
        lead = f"[{step.n_sequences}, {step.n_query}" if self.ndim is None else "[n"
        expected = f"{self.spec.dtype} {lead}, *({row})], as at its first call"
        return (
            f"site {self.spec.name!r} at {self.where}: expected {expected}, found "
            f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}; a site holds rows of one kind: capture "
            "this call into a dataset of its own, or leave the site out"
        )


def declare(
    point: HookPoint,
    x: torch.Tensor,
    step: Step,
    *,
    is_head: bool,
    codec: str,
    statistics: tuple[str, ...],
    known: SiteSpec | None = None,
    chosen: _Int64 | None = None,
    channels: Channels | None = None,
) -> Layout:
    """Decide at the first firing what a site holds.

    Parameters
    ----------
    point : HookPoint
    x : torch.Tensor
        The first value, as `HookPoint.read` gives it.
    step : Step
    is_head : bool
        Whether the module may leave out all but the last positions.
    codec, statistics
        As in `SiteSpec`.
    known : SiteSpec, optional
        What an earlier session, which is appended to, declared; its row space is kept.
    chosen : int64 [k], optional
        As in `Layout.place`.
    channels : Channels, optional
        As in `Layout`.

    Raises
    ------
    CaptureError
        If the tensor is of a kind that cannot be stored, or is not what `known` says.
    """
    if not has_values(x):
        raise CaptureError(
            f"site {point.site!r} at {point.hook_point}: expected a plain dense tensor with values, found "
            f"a {type(x).__name__} ({x.layout}, on {x.device}); leave this site out"
        )
    is_known = point.heads_first or point.split is not None or point.is_flat or point.is_last
    heads_first = not is_known and _is_heads_first(point, x, step)
    x = x.transpose(1, 2) if heads_first else x
    lead = _token_dimensions(x, step, chosen, is_head=is_head)
    if not lead and step.is_language and point.is_uniform:
        raise CaptureError(
            f"site {point.site!r} at {point.hook_point}: expected one row a token, [{step.n_sequences}, "
            f"{step.n_query}, *]; found {list(x.shape)}, whose tokens are not known; leave this site out, or name the "
            f"module itself ({point.module_path!r}), whose rows are then its own"
        )
    shape: tuple[int, ...]
    ndim: int | None
    if point.is_pattern and lead == 2 and x.ndim == 4:
        shape, ndim = (x.shape[2], -1), None
    elif lead and (known is None or known.row_space == "tokens"):
        shape, ndim = tuple(x.shape[lead:]), None
    else:
        lead = max(x.ndim - 1, 0) if x.ndim <= 3 else 1
        shape, ndim = tuple(x.shape[lead:]), x.ndim
    if channels is not None:
        shape = channels.shape(shape, f"site {point.site!r} at {point.hook_point}")
    try:
        spec = SiteSpec(
            name=point.site,
            dtype=dtype_of_torch(x.dtype).name,
            shape=shape,
            row_space="tokens" if ndim is None else "own",
            codec=codec,
            statistics=statistics,
            module_path=point.module_path,
            hook_point=point.hook_point,
        )
    except ArgumentError as error:
        raise CaptureError(
            f"site {point.site!r} at {point.hook_point}: its first value is {list(x.shape)}: {error}"
        ) from error
    check_known(known, spec)
    return Layout(
        spec=spec,
        dtype=x.dtype,
        shape=shape,
        ndim=ndim,
        is_head=is_head,
        where=point.hook_point,
        heads_first=heads_first,
        channels=channels,
    )


def check_known(known: SiteSpec | None, spec: SiteSpec) -> None:
    """Refuse to go on at a site of the dataset in another way.

    Raises
    ------
    CaptureError
        Naming what differs.
    """
    if known is not None and known != spec:
        names = ("dtype", "shape", "row_space", "codec", "statistics", "module_path", "hook_point")
        differing = [
            f"{name} {getattr(known, name)!r} (now {getattr(spec, name)!r})"
            for name in names
            if getattr(known, name) != getattr(spec, name)
        ]
        raise CaptureError(
            f"site {spec.name!r} at {spec.hook_point}: expected what the dataset already holds: "
            f"{', '.join(differing)}; write into a dataset of its own"
        )


def _is_heads_first(point: HookPoint, x: torch.Tensor, step: Step) -> bool:
    """Whether `x` is `[n_sequences, heads, n_query, width]`; raise where that cannot be told."""
    n, q = step.n_sequences, step.n_query
    if not step.is_language or x.ndim != 4 or (x.shape[0], x.shape[2]) != (n, q):
        return False
    if x.shape[1] != q:
        return True
    if q == 1:
        return False
    raise CaptureError(
        f"site {point.site!r} at {point.hook_point}: its first value is {list(x.shape)} in a pass over {q} places, in "
        f"which tokens and heads cannot be told apart; run a pass of another length first"
    )


def _token_dimensions(x: torch.Tensor, step: Step, chosen: _Int64 | None, *, is_head: bool) -> int:
    """How many leading dimensions of `x` are tokens of the step: 2, 1 if they are flattened, or 0 if none are."""
    if not step.is_language:
        return 0
    if is_head and chosen is not None:
        return 2 * (x.shape[:2] == (step.n_sequences, len(chosen)))
    if x.shape[:2] == (step.n_sequences, step.n_query):
        return 2
    return int(x.shape[:1] == (step.n_sequences * step.n_query,))


def _matches(found: torch.Size, declared: tuple[int, ...]) -> bool:
    if found == declared:
        return True
    return len(found) == len(declared) and all(
        size == wanted or wanted < 0 for size, wanted in zip(found, declared, strict=True)
    )


def _at_positions(step: Step, positions: _Int64) -> tuple[_Int64 | None, _Int64]:
    """Places in a tensor `[n_sequences, positions]` and row ids of its stored tokens, in the order of the rows."""
    all_rows = np.full(step.n_sequences * step.n_query, -1, np.int64)
    all_rows[slice(None) if step.selected is None else step.selected] = step.rows
    of_tensor = all_rows.reshape(step.n_sequences, step.n_query)[:, positions].ravel()
    rows, index = np.unique(of_tensor, return_index=True)  # a position that was chosen twice is one row
    rows, index = rows[rows >= 0], index[rows >= 0]
    return (None, rows) if np.array_equal(index, np.arange(len(of_tensor))) else (index, rows)
