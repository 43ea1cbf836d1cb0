"""What is stored as which Arrow columns: sites (one row an activation) and the tables that say what a row is."""

import json
import math
import numbers
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa

from strapfmt import spec
from strapfmt.codecs import get_codec
from strapfmt.dtypes import DType, get_dtype
from strapfmt.errors import ArgumentError

__all__ = ["ROW_SPACES", "TABLE_SCHEMAS", "SiteSpec", "read_site", "site_schema", "with_session"]

ROW_SPACES = ("tokens", "own")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXTS = ("name", "dtype", "row_space", "codec", "module_path", "hook_point")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """What one site holds; its structure is checked when it is made, `check_known` looks its names up.

    Attributes
    ----------
    name : str
        The stored name, such as `blocks.3.resid_post`.
    dtype : str
        Element type, a key of `strapfmt.dtypes.DTYPES`.
    shape : tuple of int
        Shape of one row; a list, and sizes of other integer types, become that. -1 marks a dimension that differs from
        row to row, which makes the site ragged.
    row_space : {"tokens", "own"}
        "tokens": a row number is that of a row of the `tokens` table. "own": the site numbers its rows itself, and
        `token_row` (null where unknown) and `call` say where each came from.
    codec : str
        Key of `strapfmt.codecs.CODECS`.
    statistics : tuple of str
        The statistics stored with every row, a subset of `strapfmt.spec.STATISTICS` in that order.
    module_path, hook_point : str
        Where in the model it was taken: `model.layers.3` and `model.layers.3:out`.

    Raises
    ------
    ArgumentError
        If a field is not as described.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_space: str = "tokens"
    codec: str = "none"
    statistics: tuple[str, ...] = spec.STATISTICS
    module_path: str = ""
    hook_point: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _plain_shape(self.shape))
        problems = _type_problems(self) or _problems(self)
        if problems:
            raise ArgumentError(f"site {self.name!r}: {'; '.join(problems)}")

    @property
    def stored_dtype(self) -> DType:
        """The element type's record."""
        return get_dtype(self.dtype)

    def check_known(self) -> None:
        """Raise `ArgumentError` when this version has no such element type or codec."""
        get_dtype(self.dtype)
        get_codec(self.codec)

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in shape."""
        return -1 in self.shape

    @property
    def row_values(self) -> int:
        """Elements in one row (not for ragged sites)."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's activation (not for ragged sites)."""
        return self.row_values * self.stored_dtype.item_bytes


def _plain_shape(shape: object) -> object:
    """Return a shape with its sizes as `int`; what is no shape stays, to be refused."""
    if not isinstance(shape, (tuple, list)):
        return shape
    is_size = [isinstance(size, numbers.Integral) and not isinstance(size, bool) for size in shape]
    return tuple(operator.index(size) if fits else size for size, fits in zip(shape, is_size, strict=True))


def _type_problems(site: SiteSpec) -> list[str]:
    problems = []
    for name in _TEXTS:
        value = getattr(site, name)
        if not isinstance(value, str):
            problems.append(f"{name}: expected text, got {value!r}")
        elif _SURROGATE.search(value):
            problems.append(f"{name}: expected text that UTF-8 can hold, got {value!r}")
    if not isinstance(site.shape, tuple) or any(type(size) is not int for size in site.shape):
        problems.append(f"shape: expected a tuple of whole numbers, got {site.shape!r}")
    if not isinstance(site.statistics, tuple) or not all(isinstance(name, str) for name in site.statistics):
        problems.append(f"statistics: expected a tuple of names, got {site.statistics!r}")
    return problems


def _problems(site: SiteSpec) -> list[str]:
    problems = []
    if not site.name or len(site.name.encode()) > spec.MAX_NAME_BYTES or "\0" in site.name:
        problems.append(f"name: expected 1 to {spec.MAX_NAME_BYTES} bytes of UTF-8, without NUL")
    if len(site.shape) > spec.MAX_NDIM:
        problems.append(f"shape: expected at most {spec.MAX_NDIM} dimensions, got {len(site.shape)}")
    if any(size == 0 or size < -1 for size in site.shape):
        problems.append(f"shape: expected sizes >= 1, or -1 for a varying one; got {site.shape}")
    elif not site.is_ragged and site.row_values > spec.MAX_ROW_VALUES:
        problems.append(
            f"shape: expected at most {spec.MAX_ROW_VALUES} values in a row, got {site.row_values}"
        )
    if site.row_space not in ROW_SPACES:
        problems.append(f"row_space: expected one of {', '.join(ROW_SPACES)}; got {site.row_space!r}")
    if site.statistics != tuple(name for name in spec.STATISTICS if name in site.statistics):
        problems.append(
            f"statistics: expected a subset of {spec.STATISTICS} in that order, got {site.statistics}"
        )
    return problems


def site_schema(site: SiteSpec) -> pa.Schema:
    """Return the Arrow schema of a site's shards; the activation column comes first.

    A fixed-shape row is `fixed_size_list<storage>[prod(shape)]`, a ragged one `list<storage>` with a `shape` column.
    """
    item = pa.field("item", site.stored_dtype.arrow, nullable=False)
    extension = json.dumps({"dtype": site.dtype, "shape": list(site.shape)}, separators=(",", ":"))
    metadata = {"ARROW:extension:name": spec.EXTENSION_NAME, "ARROW:extension:metadata": extension}
    activation = pa.list_(item) if site.is_ragged else pa.list_(item, site.row_values)
    fields = [pa.field("activation", activation, nullable=False, metadata=metadata)]
    if site.is_ragged:
        size = pa.field("item", pa.int32(), nullable=False)
        fields.append(pa.field("shape", pa.list_(size, len(site.shape)), nullable=False))
    fields.append(pa.field("row", pa.int64(), nullable=False))
    if site.row_space == "own":
        fields.append(pa.field("token_row", pa.int64()))
        fields.append(pa.field("call", pa.int64(), nullable=False))
    fields.extend(
        pa.field(name, pa.int32() if name == "n_nonfinite" else pa.float32(), nullable=False)
        for name in site.statistics
    )
    return pa.schema(
        fields, metadata={spec.SPEC_KEY: json.dumps(asdict(site)), spec.VERSION_KEY: str(spec.FORMAT_VERSION)}
    )


def with_session(schema: pa.Schema, session: int) -> pa.Schema:
    """Return `schema` with the number of the session that writes it, which repair needs."""
    return schema.with_metadata({**schema.metadata, spec.SESSION_KEY: str(session)})


def read_site(schema: pa.Schema) -> SiteSpec | None:
    """Return the site that a shard's schema describes, or None for a table's.

    Raises
    ------
    ArgumentError
        If the description is damaged.
    """
    text = (schema.metadata or {}).get(spec.SPEC_KEY.encode())
    if text is None:
        return None
    try:
        fields = json.loads(text)
        fields |= {"shape": tuple(fields["shape"]), "statistics": tuple(fields["statistics"])}
        site = SiteSpec(**fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArgumentError(f"the schema's description of its site is damaged: {error}") from error
    site.check_known()
    return site


def _table(name: str, columns: Mapping[str, tuple[pa.DataType, bool]]) -> pa.Schema:
    fields = [pa.field(column, kind, nullable=nullable) for column, (kind, nullable) in columns.items()]
    return pa.schema(fields, metadata={spec.TABLE_KEY: name, spec.VERSION_KEY: str(spec.FORMAT_VERSION)})


_I32, _I64, _TEXT = pa.int32(), pa.int64(), pa.utf8()

TABLE_SCHEMAS: dict[str, pa.Schema] = {
    "tokens": _table(
        "tokens",
        {
            "row": (_I64, False),
            "step": (_I64, False),
            "phase": (_TEXT, False),
            "batch_index": (_I32, False),
            "sequence_id": (_I64, False),
            "position": (_I32, False),
            "token_id": (_I32, True),
            "token": (_TEXT, True),
            "is_special": (pa.bool_(), True),
            "parent_row": (_I64, True),
            "dropped": (pa.bool_(), False),
        },
    ),
    "sequences": _table(
        "sequences",
        {
            "sequence_id": (_I64, False),
            "batch_index": (_I32, False),
            "first_step": (_I64, False),
            "parent_sequence_id": (_I64, True),
            "fork_position": (_I32, True),
            "n_prompt_tokens": (_I32, False),
            "prompt_token_ids": (pa.list_(_I32), True),
            "prompt": (_TEXT, True),
            "tags": (_TEXT, False),
        },
    ),
    "steps": _table(
        "steps",
        {
            "step": (_I64, False),
            "phase": (_TEXT, False),
            "n_sequences": (_I32, False),
            "n_query": (_I32, False),
            "n_rows": (_I64, False),
            "first_row": (_I64, False),
            "started_ns": (_I64, False),
            "duration_s": (pa.float64(), False),
            "status": (_TEXT, False),
            "reason": (_TEXT, True),
        },
    ),
    "row_events": _table(
        "row_events",
        {"row": (_I64, False), "step": (_I64, False), "event": (_TEXT, False), "detail": (_TEXT, True)},
    ),
}
