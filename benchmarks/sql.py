"""SQL: what a query costs on stored bfloat16, beside the same query on float32 that DuckDB reads as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import torch

import strapfmt
from benchmarks.measure import Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import SITE, activations, store

__all__ = ["measure"]

_WIDTH = 768


def measure(settings: Settings) -> Report:
    """Ask for the largest inner product with a direction, and for the largest norm."""
    torch.set_num_threads(1)
    x = activations(settings.size(65_536, 2_048), _WIDTH)
    query = x[0].float()
    largest = float((x.float() @ query).max())
    report = Report(
        "The largest inner product of a direction with every row, and the largest stored norm. The reference is DuckDB "
        "on an Arrow table of float32 in memory, without strapfmt; the limit is one torch product on that memory."
    )
    report.setup = {"rows": len(x), "width": _WIDTH}
    native = x.float()
    connection = duckdb.connect()
    try:
        with scratch(settings) as directory:
            connection.register("native", _table(native))
            stored = {name: directory / f"{name}.strap" for name in ("bfloat16", "float32")}
            store(stored["bfloat16"], x)
            store(stored["float32"], native)
            opened = {name: strapfmt.open(path) for name, path in stored.items()}
            text = f"SELECT max(array_inner_product(activation, $q::FLOAT[{_WIDTH}])) FROM "
            cases = {
                "DuckDB on float32 in memory": _checked(
                    lambda: connection.execute(text + "native", {"q": query.tolist()}).fetchall()[0][0],
                    largest,
                ),
                **{
                    f"strapfmt, {name}": _checked(_product(dataset, text, query), largest)
                    for name, dataset in opened.items()
                },
                "torch on float32 in memory": _checked(lambda: float((native @ query).max()), largest),
            }
            seconds = in_rounds(cases, settings, more=2)
            report.add("inner product", seconds, reference="DuckDB on float32 in memory")
            norm = float(x.float().norm(dim=1).max())
            norms = {
                "DuckDB on float32 in memory": _checked(
                    lambda: connection.execute("SELECT max(l2_norm) FROM native").fetchall()[0][0], norm
                ),
                "strapfmt, bfloat16": _checked(
                    lambda: opened["bfloat16"].sql(f'SELECT max(l2_norm) FROM "{SITE}"').fetchall()[0][0],
                    norm,
                ),
                "strapfmt, bfloat16, opened anew": _checked(_anew(stored["bfloat16"]), norm),
            }
            seconds = in_rounds(norms, settings, more=2)
            report.add("largest norm", seconds, reference="DuckDB on float32 in memory")
            for dataset in opened.values():
                dataset.close()
    finally:
        connection.close()
    return report


def _table(x: torch.Tensor) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), x.shape[1])
    return pa.table({"activation": column, "l2_norm": x.norm(dim=1).numpy()})


def _product(dataset: strapfmt.Dataset, text: str, query: torch.Tensor) -> Callable[[], float]:
    return lambda: dataset.sql(f'{text}"{SITE}"', {"q": query}).fetchall()[0][0]


def _anew(path: Path) -> Callable[[], float]:
    def run() -> float:
        with strapfmt.open(path) as dataset:
            return float(dataset.sql(f'SELECT max(l2_norm) FROM "{SITE}"').fetchall()[0][0])

    return run


def _checked(ask: Callable[[], float], expected: float) -> Case:
    def run() -> None:
        found = ask()
        if abs(found - expected) > 1e-3 * abs(expected):
            raise RuntimeError(f"expected {expected}, got {found}")

    return Case(run=run)
