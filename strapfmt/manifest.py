"""The manifest of one rank: which shards are committed, as frozen records to and from checksummed JSON."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.errors import ArgumentError, CorruptError, UnsupportedError
from strapfmt.json_fields import Fields, refuse_constant, unique_keys
from strapfmt.records import BOOLEAN, TEXT, array, checked, text_like, whole
from strapfmt.schema import SiteSpec

__all__ = ["Counts", "Layout", "Manifest", "Part", "Shard", "SiteEntry", "TableEntry", "file_slug"]

Json = Any

LAYOUTS = ("rows", "strided", "plain")
ROLES = ("data", "tail", "index")
COUNTERS = ("row", "step", "sequence")

_SAFE_FILE = re.compile(r"(sites|tables)/[a-z0-9][a-z0-9._~-]{0,127}/[0-9]{6}[a-z0-9.]{1,40}")
_SAFE_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{32}")
_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def file_slug(name: str) -> str:
    """Return the directory name of a site: its own name where that is safe everywhere, else a readable part and a hash.

    Names are data, never paths: only `a-z 0-9 . _ -` are kept, and `~` only occurs before the hash.
    """
    if _SAFE_SLUG.fullmatch(name) and not name.endswith("."):
        return name
    kept = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60]
    return f"{kept or 'site'}~{digest(name.encode()).hex()[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a shard.

    Attributes
    ----------
    role : {"data", "tail", "index"}
        Readers ignore a role they do not know unless `must_understand`.
    file : str
        Path below the rank's directory.
    codec : str
        How the file's values are stored.
    must_understand : bool
        Whether a reader that does not know the role or the codec must refuse the shard.
    n_bytes : int
        The committed length. The file may be longer only while the shard is open.
    hash : str
        xxh3-128, 32 hexadecimal digits: of the bytes for an index, of the hashes in the index for data and tail.
    """

    role: str
    file: str
    codec: str = "none"
    must_understand: bool = True
    n_bytes: int
    hash: str


@dataclass(frozen=True, kw_only=True)  # without slots, as `text` is kept
class Shard:
    """One immutable run of rows of a site or a table; `first_row` and `last_row` are None for tables."""

    n_rows: int
    first_row: int | None = None
    last_row: int | None = None
    is_sealed: bool
    session: int
    parts: tuple[Part, ...]

    def part(self, role: str) -> Part | None:
        """Return the part of this role, or None."""
        return next((part for part in self.parts if part.role == role), None)

    @cached_property
    def text(self) -> str:
        """Its JSON, kept: each commit lists all shards again, and most are as they were."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _dumps({**fields, "parts": [_fields_of(part) for part in self.parts]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How activations lie in the data files.

    Attributes
    ----------
    kind : {"rows", "strided", "plain"}
        "rows": every body begins at a multiple of the row's bytes (and of 64), the file is one 2-D tensor.
        "strided": bodies begin at multiples of 64, at one stride where the columns allow it. "plain": no promise.
    batch_rows : int
        Rows of every record batch but a shard's last; 0 where batches vary (ragged sites, tables).
    """

    kind: str = "plain"
    batch_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows a site should hold, holds, and lost to a full ring."""

    expected: int = 0
    written: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEntry:
    """One site in a manifest. `derived_from` names the sites a derived one is computed from (none in version 1)."""

    spec: SiteSpec
    layout: Layout
    counts: Counts = Counts()
    derived_from: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def n_rows(self) -> int:
        """Committed rows."""
        return sum(shard.n_rows for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One table in a manifest."""

    name: str
    shards: tuple[Shard, ...] = ()

    @property
    def n_rows(self) -> int:
        """Committed rows."""
        return sum(shard.n_rows for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one rank has committed.

    Attributes
    ----------
    rank : int
    writer_id : str
        Random, made when the rank's directory was.
    commit : int
        Counts from 0, the empty commit of a new rank.
    is_clean : bool
        Whether the writer closed; False while it runs and after a crash.
    created_ns, committed_ns : int
        Unix time.
    counters : mapping
        The next free `n` of rows, steps and sequences.
    sessions : tuple of mappings
        Provenance, one entry a writer that worked here (append adds one).
    sites, tables : tuples of entries
    optional_features : tuple of str
        Kept, never needed.
    format_version : int
        Of the writer; one that is older than this must not append.
    """

    rank: int
    writer_id: str
    commit: int
    is_clean: bool
    created_ns: int
    committed_ns: int
    counters: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    sessions: tuple[Mapping[str, Json], ...] = ()
    sites: tuple[SiteEntry, ...] = ()
    tables: tuple[TableEntry, ...] = ()
    optional_features: tuple[str, ...] = ()
    format_version: int = spec.FORMAT_VERSION

    def files(self) -> set[str]:
        """Return the paths of all parts, below the rank's directory."""
        shards = [shard for entry in self.sites for shard in entry.shards]
        shards += [shard for entry in self.tables for shard in entry.shards]
        return {part.file for shard in shards for part in shard.parts}

    def n_rows_of_table(self, name: str) -> int:
        """Return how many rows a table has."""
        return sum(table.n_rows for table in self.tables if table.name == name)

    def encode(self) -> bytes:
        """Return the file's bytes; the checksum of all before it comes last."""
        head = _dumps(_head(self))[:-1]
        tables = ",".join(_with_shards({"name": table.name}, table.shards) for table in self.tables)
        sites = ",".join(_with_shards(_site_to_json(site), site.shards) for site in self.sites)
        body = f'{head},"tables":[{tables}],"sites":[{sites}]'.encode()
        return body + b',"hash":"' + digest(body).hex().encode() + b'"}\n'

    @classmethod
    def decode(cls, data: bytes, where: str) -> "Manifest":
        """Check and decode a manifest.

        Parameters
        ----------
        data : bytes
        where : str
            The file's name, for errors.

        Raises
        ------
        CorruptError
            With every problem found: the checksum first, then each wrong field by its path.
        UnsupportedError
            If a newer version wrote it, or it requires a feature that this reader does not have.
        """
        return _from_json(_checked_json(data, where), where)


def _head(manifest: Manifest) -> Json:
    return {
        "format": spec.FORMAT_NAME,
        "format_version": spec.FORMAT_VERSION,
        "min_reader_version": 1,
        "required_features": [],
        "optional_features": list(manifest.optional_features),
        "rank": manifest.rank,
        "writer_id": manifest.writer_id,
        "commit": manifest.commit,
        "is_clean": manifest.is_clean,
        "created_ns": manifest.created_ns,
        "committed_ns": manifest.committed_ns,
        "counters": dict(manifest.counters),
        "sessions": [dict(session) for session in manifest.sessions],
    }


def _site_to_json(site: SiteEntry) -> Json:
    return {
        **_fields_of(site.spec),
        "layout": _fields_of(site.layout),
        "counts": _fields_of(site.counts),
        "derived_from": site.derived_from,
    }


def _with_shards(entry: Json, shards: tuple[Shard, ...]) -> str:
    return f'{_dumps(entry)[:-1]},"shards":[{",".join(shard.text for shard in shards)}]}}'


def _fields_of(record: Any) -> dict[str, Json]:
    """Return the fields of a record; `dataclasses.asdict` copies deeply, which is slow for thousands of shards."""
    return {name: getattr(record, name) for name in record.__slots__}


def _checked_json(data: bytes, where: str) -> Json:
    size = spec.MANIFEST_HASH_SUFFIX_BYTES
    if not size < len(data) <= spec.MAX_MANIFEST_BYTES:
        raise CorruptError(f"{where}: expected {size} to {spec.MAX_MANIFEST_BYTES} bytes, got {len(data)}")
    body, suffix = data[:-size], data[-size:]
    if suffix != b',"hash":"' + digest(body).hex().encode() + b'"}\n':
        raise CorruptError(
            f"{where}: the manifest's checksum does not match its bytes; it was damaged or edited by hand, "
            "`strapfmt repair` can rescue what the shards hold"
        )
    try:
        return json.loads(data, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not valid JSON: {error}") from error


def _from_json(value: Json, where: str) -> Manifest:
    problems: list[str] = []
    fields = Fields(value, "", problems)
    if fields.text("format") != spec.FORMAT_NAME and not problems:
        problems.append(f"format: expected {spec.FORMAT_NAME!r}, got {fields.text('format')!r}")
    needed = fields.integer("min_reader_version", 1)
    features = fields.texts("required_features")
    if not problems and (needed > spec.FORMAT_VERSION or features):
        raise UnsupportedError(
            f"{where}: needs a reader of version {needed} with {', '.join(features) or 'no features'}; this one "
            f"knows version {spec.FORMAT_VERSION} and no features: install a newer strapfmt"
        )
    counters = fields.inner("counters")
    manifest = Manifest(
        rank=fields.integer("rank", 0, spec.MAX_RANK),
        writer_id=fields.text("writer_id", pattern=_HASH),
        commit=fields.integer("commit"),
        is_clean=fields.boolean("is_clean"),
        created_ns=fields.integer("created_ns"),
        committed_ns=fields.integer("committed_ns"),
        counters={name: counters.integer(name, 0, 1 << spec.COUNTER_BITS) for name in COUNTERS},
        sessions=tuple(fields.get("sessions", "an array of objects", _are_objects, [])),
        sites=tuple(
            _site(Fields(site, f"sites.{i}", problems))
            for i, site in enumerate(fields.array("sites", spec.MAX_SITES))
        ),
        tables=tuple(
            _table(Fields(table, f"tables.{i}", problems))
            for i, table in enumerate(fields.array("tables"))
            if not _is_newer_table(table)
        ),
        optional_features=fields.texts("optional_features"),
        format_version=fields.integer("format_version", 1),
    )
    for kind, names in (
        ("sites", [site.spec.name for site in manifest.sites]),
        ("tables", [table.name for table in manifest.tables]),
    ):
        if len(set(names)) != len(names) and not problems:
            problems.append(f"{kind}: expected distinct names")
    problems.extend(_rows_of_others(manifest))
    if problems:
        shown = "\n  ".join(problems[:20])
        raise CorruptError(f"{where}: {len(problems)} problem(s):\n  {shown}", problems)
    return manifest


def _is_newer_table(table: Json) -> bool:
    """Whether a later version added this table, which readers of this one ignore."""
    name = table.get("name") if isinstance(table, dict) else None
    return isinstance(name, str) and name not in spec.TABLES


def _rows_of_others(manifest: Manifest) -> Iterator[str]:
    for i, site in enumerate(manifest.sites):
        for k, shard in enumerate(site.shards):
            first, last = shard.first_row or 0, shard.last_row or 0
            if not first >> spec.RANK_SHIFT == last >> spec.RANK_SHIFT == manifest.rank:
                yield f"sites.{i}.shards.{k}: expected rows of rank {manifest.rank}, got {first}..{last}"


def _are_objects(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _site(fields: Fields) -> SiteEntry:
    layout, counts = fields.inner("layout"), fields.inner("counts")
    shape = fields.get(
        "shape",
        "an array of int",
        lambda v: isinstance(v, list) and all(type(n) is int and -1 <= n <= spec.MAX_ROW_VALUES for n in v),
        [],
    )
    values = {
        key: fields.text(key) for key in ("name", "dtype", "row_space", "codec", "module_path", "hook_point")
    }
    statistics = fields.texts("statistics")
    try:
        site = SiteSpec(shape=tuple(shape), statistics=statistics, **values)
    except ArgumentError as error:
        fields.problems.append(f"{fields.path}: {error}")
        site = SiteSpec(name="?", dtype="uint8", shape=())
    return SiteEntry(
        spec=site,
        layout=Layout(
            kind=layout.text("kind", LAYOUTS), batch_rows=layout.integer("batch_rows", 0, spec.MAX_BATCH_ROWS)
        ),
        counts=Counts(
            expected=counts.integer("expected"),
            written=counts.integer("written"),
            dropped=counts.integer("dropped"),
        ),
        derived_from=fields.texts("derived_from"),
        shards=_shards(fields, has_rows=True),
    )


def _table(fields: Fields) -> TableEntry:
    return TableEntry(name=fields.text("name", spec.TABLES), shards=_shards(fields, has_rows=False))


def _shards(fields: Fields, *, has_rows: bool) -> tuple[Shard, ...]:
    shards = []
    previous = -1
    for i, value in enumerate(fields.array("shards", spec.MAX_SHARDS)):
        path = f"{fields.path}.shards.{i}"
        shard = _shard(value, path, fields.problems, has_rows=has_rows)
        if shard.first_row is not None and shard.last_row is not None:
            if not previous < shard.first_row <= shard.last_row - shard.n_rows + 1:
                fields.problems.append(
                    f"{path}: expected {shard.n_rows} rows after {previous}, "
                    f"got {shard.first_row}..{shard.last_row}"
                )
            previous = shard.last_row
        shards.append(shard)
    return tuple(shards)


def _shard(value: Json, path: str, problems: list[str], *, has_rows: bool) -> Shard:
    values = checked(value, _SITE_SHARD if has_rows else _TABLE_SHARD, path, problems)
    parts = [
        Part(**checked(part, _PART, f"{path}.parts.{i}", problems)) for i, part in enumerate(values["parts"])
    ]
    roles = [part.role for part in parts if part.role in ROLES]
    if len(roles) != len(set(roles)) or "data" not in roles or "index" not in roles:
        problems.append(f"{path}.parts: expected one data, one index and at most one tail, got {roles}")
    return Shard(**{**values, "parts": tuple(parts)})


_PART = {
    "role": TEXT,
    "file": text_like(_SAFE_FILE),
    "codec": TEXT,
    "must_understand": BOOLEAN,
    "n_bytes": whole(),
    "hash": text_like(_HASH),
}
_TABLE_SHARD = {"n_rows": whole(1), "is_sealed": BOOLEAN, "session": whole(), "parts": array(spec.MAX_PARTS)}
_SITE_SHARD = {**_TABLE_SHARD, "first_row": whole(), "last_row": whole()}
