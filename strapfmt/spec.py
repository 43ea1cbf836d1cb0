"""The constants of format version 1, each held once; `spec/strapfmt-1.md` states the same table."""

__all__ = [
    "ALIGNMENT_BYTES",
    "BATCH_TARGET_BYTES",
    "BODY_HASH_KEY",
    "COUNTER_BITS",
    "DATASET_SUFFIX",
    "DATA_SUFFIX",
    "EXTENSION_NAME",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "HEADER_HASH_KEY",
    "INDEX_BATCH_BYTES",
    "INDEX_HEADER_BYTES",
    "INDEX_MAGIC",
    "INDEX_RUN_BYTES",
    "INDEX_SUFFIX",
    "IPC_END",
    "IPC_MAGIC",
    "IPC_PREFIX",
    "LOCK_NAME",
    "MANIFEST_HASH_SUFFIX_BYTES",
    "MANIFEST_NAME",
    "MAX_BATCH_BYTES",
    "MAX_BATCH_ROWS",
    "MAX_DUCKDB_ARRAY",
    "MAX_HEADER_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_NAME_BYTES",
    "MAX_NDIM",
    "MAX_PARTS",
    "MAX_RANK",
    "MAX_ROW_VALUES",
    "MAX_SHARDS",
    "MAX_SITES",
    "OPEN_SUFFIX",
    "PAD_KEY",
    "RANK_DIRECTORY",
    "RANK_SHIFT",
    "SESSION_KEY",
    "SHARD_TARGET_BYTES",
    "SITES_DIRECTORY",
    "SPARE_LIMIT",
    "SPEC_KEY",
    "STATISTICS",
    "TABLES",
    "TABLES_DIRECTORY",
    "TABLE_KEY",
    "TAIL_SUFFIX",
    "TMP_SUFFIX",
    "VERSION_KEY",
]

FORMAT_NAME = "strapfmt"
FORMAT_VERSION = 1
DATASET_SUFFIX = ".strap"

# Files of one rank.
RANK_DIRECTORY = "rank-{rank:05d}"
MANIFEST_NAME = "manifest.json"
LOCK_NAME = "writer.lock"
SITES_DIRECTORY = "sites"
TABLES_DIRECTORY = "tables"
DATA_SUFFIX = ".arrow"
OPEN_SUFFIX = ".arrow.open"
TAIL_SUFFIX = ".tail.arrow"
INDEX_SUFFIX = ".idx"
TMP_SUFFIX = ".tmp"

# Numbers: `id = rank << RANK_SHIFT | n` for rows, steps and sequences alike.
RANK_SHIFT = 40
COUNTER_BITS = 40
MAX_RANK = (1 << 22) - 1

# Arrow IPC.
IPC_MAGIC = b"ARROW1"
IPC_PREFIX = b"ARROW1\x00\x00"
IPC_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
EXTENSION_NAME = "strapfmt.tensor"
BODY_HASH_KEY = "strapfmt.body"
HEADER_HASH_KEY = "strapfmt.header"
PAD_KEY = "strapfmt.pad"
SPEC_KEY = "strapfmt.site"
TABLE_KEY = "strapfmt.table"
SESSION_KEY = "strapfmt.session"
VERSION_KEY = "strapfmt.version"
ALIGNMENT_BYTES = 64
SPARE_LIMIT = 0.01
BATCH_TARGET_BYTES = 4 << 20
SHARD_TARGET_BYTES = 1 << 30

# The binary index of a shard.
INDEX_MAGIC = b"STRAPIDX"
INDEX_HEADER_BYTES = 128
INDEX_BATCH_BYTES = 96
INDEX_RUN_BYTES = 16

# The manifest ends in `,"hash":"<32 hex digits>"}` and a newline.
MANIFEST_HASH_SUFFIX_BYTES = 44

# Limits a reader enforces before it allocates or parses.
MAX_MANIFEST_BYTES = 256 << 20
MAX_INDEX_BYTES = 1 << 30
MAX_HEADER_BYTES = 64 << 20
MAX_BATCH_BYTES = 1 << 34
MAX_BATCH_ROWS = 1 << 32
MAX_NAME_BYTES = 1024
MAX_NDIM = 8
MAX_ROW_VALUES = (1 << 31) - 1
MAX_SITES = 100_000
MAX_SHARDS = 1_000_000
MAX_PARTS = 64
MAX_DUCKDB_ARRAY = 100_000

STATISTICS = ("l2_norm", "mean", "std", "abs_max", "n_nonfinite")
TABLES = ("tokens", "sequences", "steps", "row_events")
