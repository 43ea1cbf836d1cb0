"""Items as bytes, for the way to another process and for the spill file: JSON, and arrays behind it as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt.schema import SiteSpec
from strapfmt_capture.items import (
    Annotation,
    Boundary,
    Events,
    Finish,
    Item,
    Spilled,
    StepEnd,
    StepStart,
)
from strapfmt_capture.memory import Memory
from strapfmt_capture.passes import Column, Step, Tokens
from strapfmt_capture.turn import Block, Values

__all__ = ["ItemReader", "encode_items"]

_Json: TypeAlias = Any
_Int64 = npt.NDArray[np.int64]


def encode_items(items: Sequence[Item]) -> tuple[_Json, list[npt.NDArray[Any]]]:
    """Return items as a JSON-ready value and the arrays it refers to, in order; values keep their positions only."""
    writer = _ItemWriter()
    return [writer.item(item) for item in items], writer.arrays


class ItemReader:
    """Reads items in the order in which they were encoded.

    Parameters
    ----------
    specs : dict of str to SiteSpec
        Sites declared so far; those that items declare are added.
    """

    def __init__(self, specs: dict[str, SiteSpec]) -> None:
        self._specs = specs
        self._tail, self._at = b"", 0

    def decode(self, coded: _Json, tail: bytes, memory: Memory) -> list[Item]:
        """Return the items; `tail` holds the arrays one behind the other, and the values lie in `memory`."""
        self._tail, self._at = tail, 0
        return [_READERS[kind](self, fields, memory) for kind, *fields in coded]

    def _site(self, fields: Sequence[_Json], memory: Memory) -> SiteSpec:
        (named,) = fields
        spec = SiteSpec(**{**named, "statistics": tuple(named["statistics"])})
        self._specs[spec.name] = spec
        return spec

    def _values(self, fields: Sequence[_Json], memory: Memory) -> Values:
        site, shape, n_rows, start, rows, token_row, call = fields
        spec = self._specs[site]
        return Values(
            spec=spec,
            dtype=spec.stored_dtype.torch,
            shape=spec.shape if shape is None else tuple(shape),
            n_rows=n_rows,
            memory=memory,
            start=start,
            rows=self._column(rows),
            token_row=self._column(token_row),
            call=call,
        )

    def _block(self, fields: Sequence[_Json], memory: Memory) -> Block:
        sites, start, rows = fields
        specs = [self._specs[site] for site in sites]
        return Block(specs=specs, memory=memory, start=start, rows=self._column(rows))

    def _start(self, fields: Sequence[_Json], memory: Memory) -> StepStart:
        tokens, sequences, events, step = fields
        return StepStart(
            step=self._step(
                step,
                tokens=self._tokens(tokens),
                sequences=self._columns(sequences),
                events=self._columns(events),
            )
        )

    def _end(self, fields: Sequence[_Json], memory: Memory) -> StepEnd:
        step, started_ns, duration_s, status, reason, dropped, is_whole = fields
        return StepEnd(
            step=self._step(step),
            started_ns=started_ns,
            duration_s=duration_s,
            status=status,
            reason=reason,
            dropped=dropped,
            is_whole=is_whole,
        )

    def _events(self, fields: Sequence[_Json], memory: Memory) -> Events:
        return Events(columns=self._columns(fields[0]) or {})

    def _boundary(self, fields: Sequence[_Json], memory: Memory) -> Boundary:
        return Boundary(is_urgent=fields[0])

    def _annotation(self, fields: Sequence[_Json], memory: Memory) -> Annotation:
        return Annotation(record=fields[0])

    def _spilled(self, fields: Sequence[_Json], memory: Memory) -> Spilled:
        start, stop = fields
        return Spilled(start=start, stop=stop)

    def _finish(self, fields: Sequence[_Json], memory: Memory) -> Finish:
        facts, seen = fields
        return Finish(facts=facts, seen=seen)

    def _step(
        self,
        coded: Sequence[_Json],
        *,
        tokens: Tokens | None = None,
        sequences: dict[str, Column] | None = None,
        events: dict[str, Column] | None = None,
    ) -> Step:
        number, phase, n_sequences, n_query, rows = coded
        return Step(
            step=number,
            phase=phase,
            n_sequences=n_sequences,
            n_query=n_query,
            selected=None,
            rows=self._column(rows),
            tokens=tokens,
            sequences=sequences,
            events=events,
        )

    def _tokens(self, coded: Mapping[str, _Json] | None) -> Tokens | None:
        columns: dict[str, Any] | None = self._columns(coded)
        return None if columns is None else Tokens(**columns)

    def _columns(self, coded: Mapping[str, _Json] | None) -> dict[str, Column] | None:
        return None if coded is None else {name: self._column(column) for name, column in coded.items()}

    def _column(self, coded: _Json) -> Any:
        if not isinstance(coded, dict):
            return coded
        if "first" in coded:
            return np.arange(coded["first"], coded["first"] + coded["n"])
        array = np.frombuffer(self._tail, coded["dtype"], coded["n"], self._at)
        self._at += array.nbytes
        return array


_READERS: dict[str, Callable[[ItemReader, Sequence[_Json], Memory], Item]] = {
    "site": ItemReader._site,
    "values": ItemReader._values,
    "block": ItemReader._block,
    "start": ItemReader._start,
    "end": ItemReader._end,
    "events": ItemReader._events,
    "boundary": ItemReader._boundary,
    "annotation": ItemReader._annotation,
    "spilled": ItemReader._spilled,
    "finish": ItemReader._finish,
}


class _ItemWriter:
    """Turns items into JSON-ready values, and gathers the arrays that these refer to."""

    def __init__(self) -> None:
        self.arrays: list[npt.NDArray[Any]] = []

    def item(self, item: Item) -> list[_Json]:
        if isinstance(item, Values):
            shape = item.shape if item.spec.is_ragged else None
            rows, token_row = self.column(item.rows), self.column(item.token_row)
            return ["values", item.spec.name, shape, item.n_rows, item.start, rows, token_row, item.call]
        if isinstance(item, Block):
            return ["block", [spec.name for spec in item.specs], item.start, self.column(item.rows)]
        if isinstance(item, StepStart):
            step = item.step
            tokens = None if step.tokens is None else self.columns(_fields(step.tokens))
            tables = [tokens, self.columns(step.sequences), self.columns(step.events)]
            return ["start", *tables, self.step(step)]  # arrays come in the order of their reading
        if isinstance(item, StepEnd):
            about = [item.started_ns, item.duration_s, item.status, item.reason, item.dropped, item.is_whole]
            return ["end", self.step(item.step), *about]
        if isinstance(item, SiteSpec):
            return ["site", asdict(item)]
        if isinstance(item, Events):
            return ["events", self.columns(item.columns)]
        if isinstance(item, Boundary):
            return ["boundary", item.is_urgent]
        if isinstance(item, Annotation):
            return ["annotation", item.record]
        if isinstance(item, Spilled):
            return ["spilled", item.start, item.stop]
        return ["finish", dict(item.facts), dict(item.seen)]

    def step(self, step: Step) -> list[_Json]:
        rows = self.column(step.rows)
        return [step.step, step.phase, step.n_sequences, step.n_query, rows]

    def columns(self, table: Mapping[str, Column] | None) -> dict[str, _Json] | None:
        return None if table is None else {name: self.column(column) for name, column in table.items()}

    def column(self, column: Column | None) -> _Json:
        """Return a column as JSON, as a range, or as what stands for an array that goes behind."""
        if isinstance(column, pa.Array):
            return column.to_pylist()
        if not isinstance(column, np.ndarray):
            return column
        if column.dtype == np.int64 and len(column):
            first, last = int(column[0]), int(column[-1])
            if last - first == len(column) - 1 and (last - first < 2 or bool((np.diff(column) == 1).all())):
                return {"first": first, "n": len(column)}
        self.arrays.append(np.ascontiguousarray(column))
        return {"dtype": column.dtype.str, "n": len(column)}


def _fields(tokens: Tokens) -> dict[str, Column]:
    values = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    return {name: value for name, value in values.items() if value is not None}
