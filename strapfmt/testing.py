"""Checks that every implementation of something must pass; shared by strapfmt's tests and those of extensions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from strapfmt.codecs import Codec, get_codec
from strapfmt.dtypes import DTYPES
from strapfmt.errors import CorruptError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

__all__ = ["check_codec"]

_N_ROWS, _WIDTH = 100, 24


def check_codec(name: str, directory: Path) -> None:
    """Check a registered codec: every dtype comes back bit for bit, damage is found, its record survives JSON.

    Parameters
    ----------
    name : str
        A key of `strapfmt.codecs.CODECS`.
    directory : Path
        An empty directory to write into.

    Raises
    ------
    AssertionError
        With what went wrong.
    """
    codec = get_codec(name)
    _equal(Codec(**json.loads(json.dumps(asdict(codec)))), codec, "the record through JSON")
    _equal(name in repr(codec), True, "the name in repr()")
    path = directory / f"{name}.strap"
    stored = _write(path, name)
    with Reader(path, verify="always") as reader:
        for dtype, values in stored.items():
            read = reader[dtype].to_arrow(["activation"]).column(0).combine_chunks().flatten().to_numpy()
            _equal(read.tobytes(), values.tobytes(), f"the bits of {dtype}")
    _check_damage(path)


def _write(path: Path, codec: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    stored = {}
    with DatasetWriter(path) as writer:
        rows = np.arange(_N_ROWS) + writer.reserve("row", _N_ROWS)
        for dtype in DTYPES.values():
            values = random.integers(0, 256, _N_ROWS * _WIDTH * dtype.item_bytes, np.uint8).view(dtype.numpy)
            stored[dtype.name] = values.reshape(_N_ROWS, _WIDTH)
            writer.add_site(
                SiteSpec(name=dtype.name, dtype=dtype.name, shape=(_WIDTH,), codec=codec, statistics=())
            )
            writer.write(dtype.name, stored[dtype.name], rows=rows, statistics={})
    return stored


def _check_damage(path: Path) -> None:
    (file,) = path.glob("rank-00000/sites/float32/*.arrow")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], _flipped(whole)):
        file.write_bytes(damaged)
        try:
            with Reader(path, verify="always") as reader:
                reader["float32"].tensor()
        except CorruptError:
            continue
        raise AssertionError(
            f"{file}: {len(damaged)} of {len(whole)} bytes, damaged, were read without an error"
        )
    file.write_bytes(whole)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, got {found!r}")
