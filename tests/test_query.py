"""SQL over a dataset: what it sees, what it answers, and everything it must not reach."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import flip_byte_of, random_values, statistics_of, token_columns, write_dataset, write_site

from strapfmt import spec
from strapfmt.dataset import Dataset
from strapfmt.errors import ArgumentError, CorruptError, MissingExtraError, QueryError
from strapfmt.query import Result, Source, run_query
from strapfmt.query.decode import DECODED, float8_values
from strapfmt.query.relations import Relations
from strapfmt.query.run import _connect
from strapfmt.query.statement import read_statement
from strapfmt.writer import DatasetWriter

PRE, POST = "blocks.0.resid_pre", "blocks.0.resid_post"
N = 100
WIDE = spec.MAX_DUCKDB_ARRAY + 1
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
NATIVE = (
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


@pytest.fixture(scope="module")
def values():
    return {
        PRE: random_values(N, 2, 4, dtype=torch.bfloat16, seed=1),
        POST: random_values(N, 8, dtype=torch.float16, seed=2),
        "packed": random_values(N, 8, dtype=torch.bfloat16, seed=3),
        "logits": random_values(3, 8, seed=4),
        "wide": random_values(2, WIDE, dtype=torch.bfloat16, seed=5),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("query") / "run.strap"
    writer = DatasetWriter(path, batch_bytes=1024)
    rows = np.arange(N) + writer.reserve("row", N)
    write_site(writer, PRE, values[PRE], rows, module_path="model.layers.0")
    write_site(writer, POST, values[POST], rows)
    write_site(writer, "packed", values["packed"], rows, codec="zstd", statistics=("l2_norm",))
    write_site(
        writer, "logits", values["logits"], None, row_space="own", token_row=np.array([19, 39, -1]), call=0
    )
    write_site(writer, "wide", values["wide"], rows[:2], statistics=())
    writer.write_table("tokens", token_columns(rows, ["the", "cat", "\x1b[31m\u202e</script>"]))
    writer.close()
    return path


@pytest.fixture(scope="module")
def ds(path):
    with Dataset(path) as dataset:
        yield dataset


# What it answers.


def test_tokens_join_a_site_by_row(ds, values):
    result = ds.sql(
        f'select token, avg(l2_norm) a from tokens join "{PRE}" using (row) group by token order by token'
    )
    norms = statistics_of(values[PRE])["l2_norm"]
    expected = [norms[i::3].mean() for i in (2, 1, 0)]  # ESC sorts before "cat" and "the"
    assert [row[1] for row in result] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("site", [PRE, POST, "packed"])
def test_activations_are_the_stored_values(ds, values, site):
    got = ds.sql(f'select row, activation from "{site}" order by row').to_torch()
    assert got["row"].tolist() == list(range(N))
    assert torch.equal(got["activation"], values[site].float().flatten(1))


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_pattern_has_torchs_value(name):
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(float8_values(name), expected)
    assert (np.signbit(float8_values(name)) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("name", sorted(DECODED))
def test_every_pattern_of_a_small_float_is_decoded_in_sql(tmp_path, name):
    integer = torch.uint8 if name in FLOAT8 else torch.uint16
    bits = torch.arange(1 << 8 * integer.itemsize, dtype=torch.int32).to(integer)
    values = bits.view(getattr(torch, name)).unsqueeze(0)
    write_dataset(tmp_path / "a.strap", {"x": values}, statistics=())
    with Dataset(tmp_path / "a.strap") as dataset:
        (row,) = dataset.sql("select activation from x").to_torch()["activation"]
    torch.testing.assert_close(row, values[0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NATIVE)
def test_types_duckdb_has_keep_theirs(tmp_path, name):
    numbers = [[0, 1, 1], [1, 0, 1]] if name == "bool" else [[0, 1, 100], [3, 4, 5]]
    values = torch.tensor(numbers).to(getattr(torch, name))
    write_dataset(tmp_path / "a.strap", {"x": values}, statistics=())
    with Dataset(tmp_path / "a.strap") as dataset:
        got = dataset.sql("select activation from x order by row").to_torch()["activation"]
        long = dataset.sql("select list_sum(activation) from activations order by row").fetchall()
    assert got.dtype == values.dtype
    assert torch.equal(got, values)
    assert [row[0] for row in long] == values.double().sum(dim=1).tolist()


def test_rows_beyond_an_array_are_lists(ds, values):
    result = ds.sql("select row, len(activation), activation[100_001] from wide order by row")
    last = values["wide"][:, -1].float().tolist()
    assert result.fetchall() == [(0, WIDE, last[0]), (1, WIDE, last[1])]


def test_ragged_rows_are_lists_with_their_shape(tmp_path):
    from strapfmt.schema import SiteSpec

    writer = DatasetWriter(tmp_path / "a.strap")
    writer.add_site(SiteSpec(name="pattern", dtype="bfloat16", shape=(2, -1), statistics=()))
    flat = torch.arange(10, dtype=torch.bfloat16)
    shapes = np.array([[2, 1], [2, 4]], np.int32)
    first = writer.reserve("row", 2)
    writer.write("pattern", flat.view(torch.uint16).numpy(), rows=np.arange(first, first + 2), shapes=shapes)
    writer.wait()
    writer.close()
    with Dataset(tmp_path / "a.strap") as dataset:
        rows = dataset.sql("select shape, activation from pattern order by row").fetchall()
    assert rows == [([2, 1], [0.0, 1.0]), ([2, 4], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])]


def test_a_site_with_its_own_rows_is_joined_by_token_row(ds):
    rows = ds.sql("""select position, own_row, call from logits left join tokens on tokens.row = token_row
                     order by own_row""")
    assert rows.fetchall() == [(19, 0, 0), (19, 1, 0), (None, 2, 0)]


def test_joining_own_rows_as_if_they_were_tokens_is_an_error_that_says_how(ds):
    with pytest.raises(QueryError, match=r'ON tokens.row = "logits".token_row'):
        ds.sql("select * from tokens join logits using (row)")


def test_stats_hold_all_sites_below_one_another(ds, values):
    rows = ds.sql(
        "select site, count(*), sum(l2_norm), count(row), count(own_row), count(std) from stats group by 1"
    )
    got = {site: rest for site, *rest in rows}
    assert {site: rest[0] for site, rest in got.items()} == {
        PRE: N,
        POST: N,
        "packed": N,
        "logits": 3,
        "wide": 2,
    }
    assert got[POST][1] == pytest.approx(float(statistics_of(values[POST])["l2_norm"].sum()), rel=1e-5)
    assert got["logits"][2:] == [0, 3, 3]
    assert got["packed"][4] == 0  # only l2_norm was stored
    assert got["wide"][1] is None


def test_stats_can_be_filtered_by_site(ds):
    assert ds.sql("select count(*) from stats where site = ? and row < 10", [POST]).fetchall() == [(10,)]


def test_activations_hold_all_sites_as_lists(ds, values):
    rows = ds.sql(
        "select site, activation from activations where row = 7 or own_row = 1 order by site"
    ).fetchall()
    got = dict(rows)
    assert sorted(got) == sorted([PRE, POST, "packed", "logits"])
    assert got[PRE] == values[PRE][7].float().flatten().tolist()
    assert got["logits"] == values["logits"][1].tolist()


def test_sites_table_describes_every_site(ds):
    rows = ds.sql(
        "select name, module_path, dtype, shape, n_rows, row_space, codec, written from sites"
    ).fetchall()
    assert rows[0] == (PRE, "model.layers.0", "bfloat16", [2, 4], N, "tokens", "none", N)
    assert rows[3] == ("logits", "", "float32", [8], 3, "own", "none", 3)


@pytest.mark.parametrize(
    "query",
    [
        "describe {}",
        "explain select row from {}",
        "/**/ explain /**/ analyze--\nfrom {}",
        "summarize {}",
        "from {}",
        "table {}",
    ],
)
def test_statements_that_only_look_are_answered(ds, query):
    assert len(ds.sql(query.format(f'"{PRE}"'))) > 0


@pytest.mark.parametrize(
    "sample", ["using sample 10%", "tablesample reservoir(7 rows)", "using sample 3% (bernoulli, 42)"]
)
def test_samples_are_answered(ds, sample):
    assert len(ds.sql(f"select row from tokens {sample}")) <= N
    assert len(ds.sql(f'select activation from "{PRE}" {sample}')) <= N


def test_show_tables_lists_every_name_and_opens_none(ds):
    names = dict(ds.sql("show tables").fetchall())
    assert set(names) == {*ds.tables, "sites", "marks", "stats", "activations", *ds.names}
    assert names[PRE] == "site"
    assert names["tokens"] == "table"


def test_names_are_found_in_any_case(ds):
    assert len(ds.sql(f'select * from TOKENS join "{PRE.upper()}" using (row)')) == N


def test_sites_that_differ_in_case_are_both_reachable_but_not_together(tmp_path):
    write_dataset(tmp_path / "a.strap", {"Mlp": torch.zeros(2, 1), "mlp": torch.ones(2, 1)})
    with Dataset(tmp_path / "a.strap") as dataset:
        assert dataset.sql('select max(abs_max) from "Mlp"').fetchall() == [(0.0,)]
        assert dataset.sql('select max(abs_max) from "mlp"').fetchall() == [(1.0,)]
        with pytest.raises(QueryError, match="differ only in case"):
            dataset.sql('select * from "mlp" join "Mlp" using (row)')
        with pytest.raises(QueryError, match="write it exactly"):
            dataset.sql('select * from "MLP"')


def test_a_site_called_like_a_table_gets_a_prefix(tmp_path):
    write_dataset(tmp_path / "a.strap", {"tokens": torch.ones(3, 1)})
    with Dataset(tmp_path / "a.strap") as dataset:
        assert len(dataset.sql("select token from tokens")) == 3
        assert dataset.sql('select sum(abs_max) from "site:tokens"').fetchall() == [(3.0,)]


def test_prefixes_are_added_until_a_name_is_free(tmp_path):
    fills = {"tokens": 1.0, "site:tokens": 2.0, "Site:Site:Tokens": 3.0, "STATS": 4.0, "__strap_0": 5.0}
    write_dataset(tmp_path / "a.strap", {name: torch.full((3, 1), fill) for name, fill in fills.items()})
    with Dataset(tmp_path / "a.strap") as dataset:
        names = {
            "site:site:site:tokens": 1.0,
            "site:tokens": 2.0,
            "Site:Site:Tokens": 3.0,
            "site:STATS": 4.0,
            "site:__strap_0": 5.0,
        }
        assert {*names} < set(dict(dataset.sql("show tables").fetchall()))
        for name, fill in names.items():
            assert dataset.sql(f'select max(abs_max) from "{name}"').fetchall() == [(fill,)]
        for name, fill in fills.items():
            assert sum(len(batch) for batch in dataset[name].scan(where=f"abs_max = {fill}")) == 3
        assert len(dataset.sql("select * from activations join stats using (site, row)")) == 15


def test_hostile_site_names_are_only_names(tmp_path):
    names = ['a"; drop table tokens; --', "it's", "x' union select 1 --", "ü\n\u202e"]
    write_dataset(tmp_path / "a.strap", {name: torch.ones(2, 1) for name in names})
    with Dataset(tmp_path / "a.strap") as dataset:
        for name in names:
            quoted = name.replace('"', '""')
            assert len(dataset.sql(f'select row from "{quoted}"')) == 2
        assert [row[0] for row in dataset.sql("select distinct site from activations order by 1")] == sorted(
            names
        )


def test_an_empty_dataset_answers(tmp_path):
    DatasetWriter(tmp_path / "a.strap").close()
    with Dataset(tmp_path / "a.strap") as dataset:
        for name in ("tokens", "steps", "sites", "stats", "activations"):
            assert len(dataset.sql(f"select * from {name}")) == 0


def test_many_shards_are_few_relations(tmp_path):
    n = 1_000
    sites = {"x": torch.arange(n)[:, None].float(), "y": torch.ones(n, 1)}
    write_dataset(tmp_path / "a.strap", sites, batch_bytes=1, shard_bytes=1, statistics=())
    with Dataset(tmp_path / "a.strap") as dataset:
        assert {len(entry.shards) for entry in dataset.manifests[0].sites} == {n}
        query = "select sum(activation[1]) from activations join tokens using (row) where site = 'x'"
        assert dataset.sql(query).fetchall() == [(n * (n - 1) / 2,)]
        with contextlib.closing(_connect(None)) as connection:
            statement = read_statement(connection, query)
            Relations(connection, dataset._source, statement, []).register()
            found = connection.execute(
                "select view_name, sql from duckdb_views() where not internal"
            ).fetchall()
        assert len(found) == 4  # tokens, x, y, and activations over these
        assert max(sql.count("UNION ALL") for _, sql in found if sql) == 1


def test_ranks_are_one_relation(tmp_path):
    write_dataset(tmp_path / "a.strap", {"x": torch.ones(3, 2)})
    write_dataset(tmp_path / "a.strap", {"x": torch.ones(4, 2)}, rank=1)
    with Dataset(tmp_path / "a.strap") as dataset:
        assert dataset.sql("select count(*), max(row >> 40) from tokens join x using (row)").fetchall() == [
            (7, 1)
        ]


# Parameters and limits.


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16", "numpy"])
def test_vectors_are_parameters(ds, values, kind):
    vector = random_values(8, seed=9).to(getattr(torch, "float32" if kind == "numpy" else kind))
    exact = vector.float()
    cast = "::double[8]" if kind == "float64" else ""
    param = vector.numpy() if kind == "numpy" else vector
    got = ds.sql(
        f'select array_inner_product(activation{cast}, ?) x from "{POST}" order by row', [param]
    ).to_torch()
    torch.testing.assert_close(got["x"].float(), values[POST].float() @ exact, rtol=1e-4, atol=1e-4)


def test_named_parameters_and_numpy_numbers(ds):
    assert ds.sql("select $a::int + $b::int", {"a": np.int64(2), "b": torch.tensor(3)}).fetchall() == [(5,)]


def test_a_vector_as_wide_as_a_wide_site_is_a_parameter(ds, values):
    vector = torch.ones(WIDE)
    query = "select list_inner_product(activation, ?) from wide order by row"
    got = [row[0] for row in ds.sql(query, [vector])]
    assert got == pytest.approx(values["wide"].float().sum(dim=1).tolist(), rel=1e-3, abs=0.5)


@pytest.mark.parametrize(
    "params",
    [
        "text",
        [np.zeros((2, 2))],
        [np.zeros(0)],
        [np.array(["a"])],
        5,
        torch.tensor(5),
        [torch.empty(2, device="meta")],
    ],
)
def test_parameters_that_are_no_values_are_refused(ds, params):
    with pytest.raises(ArgumentError, match="params"):
        ds.sql("select ?", params)


def test_a_query_stops_at_its_timeout(ds):
    started = time.monotonic()
    with pytest.raises(QueryError, match=r"timeout_s=0\.1"):
        ds.sql("select sum(a.range * b.range) from range(1000000) a, range(1000000) b", timeout_s=0.1)
    assert time.monotonic() - started < 10


def test_a_query_stops_at_ctrl_c(ds):
    # Whoever runs the tests may have had this process ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            ds.sql("select sum(a.range * b.range) from range(1000000) a, range(1000000) b", timeout_s=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 10
    assert ds.sql("select 1").fetchall() == [(1,)]


def test_a_query_stops_at_its_memory_limit(ds):
    with pytest.raises(QueryError, match="Out of Memory") as caught:
        ds.sql("select list(range) from range(100000000)", memory_limit="50MB")
    assert "memory_limit=" in str(caught.value)
    assert "SET " not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, "a", float("nan"), True, [1]])
def test_a_timeout_must_be_a_time(ds, timeout_s):
    with pytest.raises(ArgumentError, match="timeout_s: expected a number of seconds above 0"):
        ds.sql("select 1", timeout_s=timeout_s)


def test_a_timeout_may_be_endless(ds):
    assert ds.sql("select 1", timeout_s=math.inf).fetchall() == [(1,)]


def test_a_memory_limit_is_text(ds):
    with pytest.raises(ArgumentError, match="memory_limit: expected text such as '4GB'"):
        ds.sql("select 1", memory_limit=5)
    with pytest.raises(QueryError, match="Memory"):
        ds.sql("select 1", memory_limit="a lot")


def test_what_is_no_text_is_refused(ds):
    with pytest.raises(ArgumentError, match="SQL text"):
        ds.sql(None)
    with pytest.raises(QueryError, match="surrogate"):
        ds.sql("select '\ud800'")


# What it must not reach.

NOT_ONE_SELECT = [
    "",
    "-- nothing",
    "select 1; select 2",
    "copy tokens to '{out}'",
    "copy (select 1) to '{out}'",
    "export database '{out}'",
    "attach '{out}' as other",
    "attach ':memory:' as other",
    "install httpfs",
    "load httpfs",
    "pragma version",
    "pragma enable_profiling",
    "set enable_external_access = true",
    "reset all",
    "create table x as select 1",
    "create temp macro f(x) as x",
    "insert into tokens values (1)",
    "update tokens set row = 1",
    "delete from tokens",
    "drop view tokens",
    "call pragma_version()",
    "checkpoint",
    "begin",
    "use memory",
    "vacuum",
    "prepare p as select 1",
    "explain copy tokens to '{out}'",
    "explain analyze copy tokens to '{out}'",
    "explain create table x as select 1",
    "with x as (insert into tokens values (1) returning *) select * from x",
    "pivot tokens on token using count(*)",
    "show databases",
    "from (show tables)",
    "explain analyze /* /* */ select 1 -- */ from enable_profiling()",
    "explain analyze from enable_profiling()",
    "explain (format json) select 1",
]
NOT_THIS_DATASET = [
    "select * from read_csv('{file}')",
    "select * from read_csv_auto('{file}')",
    "select * from read_text('{file}')",
    "select * from read_blob('{file}')",
    "select * from read_json('{file}')",
    "select * from read_parquet('{file}')",
    "select * from parquet_scan('{file}')",
    "select * from parquet_metadata('{file}')",
    "select * from sniff_csv('{file}')",
    "select * from read_duckdb('{file}')",
    "select * from glob('{file}')",
    "select * from glob('/etc/*')",
    "select * from '{file}'",
    'select * from "{file}"',
    "select * from 'https://example.com/x.parquet'",
    "select * from read_csv('https://example.com/x.csv')",
    "select * from 's3://bucket/x.parquet'",
    "select (select count(*) from read_text('{file}'))",
    "with x as (select * from read_text('{file}')) select * from x",
    "select * from tokens where exists (from read_text('{file}'))",
    "from query('select 1')",
    "from query_table('tokens')",
    "from json_execute_serialized_sql(json_serialize_sql('select 1'))",
    "from enable_logging(storage = 'file', storage_path = '{out}')",
    "from enable_profiling()",
    "from arrow_scan(1, 2, 3)",
    "from python_arrow_scan()",
    "from pandas_scan(1)",
    "from python_map_function(1)",
    "from seq_scan(1)",
    "from duckdb_secrets()",
    "from duckdb_settings()",
    "from pg_settings",
    "select * from PG_CATALOG.PG_SETTINGS",
    "select current_setting('secret_directory')",
    "select system.main.Current_Setting('secret_directory')",
    "select * from tokens where token = current_setting('threads')::varchar",
    "from which_secret('{file}', 's3')",
    "select __internal_decompress_string(1::utinyint)",
    "select * from a_table_in_python",
    "select * from A_MODULE_TABLE",
]

A_MODULE_TABLE = pa.table({"secret": [1]})


@pytest.mark.parametrize("query", NOT_ONE_SELECT)
def test_anything_but_one_select_is_refused(ds, tmp_path, query):
    out = tmp_path / "out"
    with pytest.raises(QueryError):
        ds.sql(query.format(out=out))
    assert not out.exists()


@pytest.mark.parametrize("query", NOT_THIS_DATASET)
def test_files_network_and_python_variables_are_out_of_reach(ds, tmp_path, query):
    a_table_in_python = pa.table({"secret": [1]})
    (tmp_path / "file.csv").write_text("secret\n1\n")
    with pytest.raises(QueryError):
        ds.sql(query.format(file=tmp_path / "file.csv", out=tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.csv"]
    assert a_table_in_python.num_rows == 1


def test_duckdb_itself_is_closed_off_behind_the_statement_check(tmp_path):
    a_table_in_python = pa.table({"secret": [1]})
    (tmp_path / "file.csv").write_text("secret\n1\n")
    connection = _connect(None)
    try:
        for query in (
            f"select * from read_csv('{tmp_path}/file.csv')",
            f"select * from '{tmp_path}/file.csv'",
            f"copy (select 1) to '{tmp_path}/out.csv'",
            f"attach '{tmp_path}/out.db'",
            "install httpfs",
            "load httpfs",
            "set enable_external_access = true",
            "set python_enable_replacements = true",
            "select * from a_table_in_python",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(query).fetchall()
    finally:
        connection.close()
    assert a_table_in_python.num_rows == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.csv"]


def test_a_query_too_deep_for_the_parser_is_an_error(ds):
    for query in ("select " + "not " * 600 + "true", "select " + "(" * 5000 + "1" + ")" * 5000):
        with pytest.raises(QueryError):
            ds.sql(query)


WORDS = st.sampled_from(
    f"""select from tokens * ( ) , row where with as "{PRE}" ' " -- /* group by order limit 1 . :: [ ] $1 ? ; x lambda
        describe explain union all pivot sample tablesample using 10% rows not null \0 \U0001f600""".split()
)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=12))
def test_any_text_is_answered_or_refused(ds, words):
    with contextlib.suppress(QueryError):
        assert isinstance(ds.sql(" ".join(words)), Result)


def test_nothing_is_leaked_at_exit(path):
    code = f"""
        import strapfmt
        ds = strapfmt.open({str(path)!r})
        ds.sql('select * from "{PRE}"')
        for query in ("select nothing", "select 1; select 2", "from nowhere", "select '", "from read_csv('x')"):
            try:
                ds.sql(query)
            except strapfmt.QueryError as error:
                kept = error
        ds.sql("select row from packed")
        raise kept
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].startswith("strapfmt.errors.QueryError")
    assert "leak" not in done.stderr
    assert done.returncode == 1


# Errors say what to do.


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("select * from blocks.0.resid_post", f'"{POST}"'),
        ("select blocks.0.resid_post.l2_norm from tokens", f'"{POST}".l2_norm'),
        ("select * from tokens join Blocks.0.Resid_Post using (row)", f'"{POST}"'),
        ("select * from blocks.1.resid_post", f'"{POST}"'),
        ('select * from "blocks.0.resid_pots"', f'"{POST}"'),
        ("select * from token", '"tokens"'),
        ("select * from zzz", "SHOW TABLES"),
        (f'show "{PRE}"', f'DESCRIBE "{PRE}" lists the columns'),
        ("show tokens", 'DESCRIBE "tokens"'),
        ("select * from memory.main.tokens", "write it alone"),
        ("select array_inner_product(activation, activation) from wide", "use list_inner_product()"),
        ("select array_distance(activation, [1, 2]) from wide", "use list_distance()"),
        (
            f'select l2_norm from "{PRE}" join "{POST}" using (row)',
            f'write "{PRE}".l2_norm or "{POST}".l2_norm',
        ),
        ("select nocolumn from tokens", "Referenced column"),
        ("select 'blocks.0.resid_post' frm tokens x y", "syntax error"),
    ],
)
def test_errors_name_what_was_probably_meant(ds, query, hint):
    with pytest.raises(QueryError) as caught:
        ds.sql(query)
    assert hint in str(caught.value)
    assert "pg_" not in str(caught.value)


@pytest.mark.parametrize("query", [f'show "{PRE}"', "show tokens", "select * from memory.main.tokens"])
def test_no_hint_proposes_what_was_written(ds, query):
    with pytest.raises(QueryError) as caught:
        ds.sql(query)
    assert "did you mean" not in str(caught.value)


def test_a_name_inside_a_text_gives_no_hint(ds):
    with pytest.raises(QueryError) as caught:
        ds.sql("select 'blocks.0.resid_post' from zzz")
    assert "double quotes" not in str(caught.value)


def test_damage_in_a_compressed_site_keeps_its_type(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": random_values(N, 16)}, codec="zstd")
    flip_byte_of(path, "x", 0.5)
    with Dataset(path) as dataset, pytest.raises(CorruptError, match="checksum"):
        dataset.sql("select activation from x")


def test_sql_hashes_plain_data_only_where_asked_to(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": random_values(N, 512)}, batch_bytes=1 << 20)
    flip_byte_of(path, "x", 0.5)
    with Dataset(path) as dataset:
        assert len(dataset.sql("select activation from x")) == N
    with Dataset(path, verify="always") as dataset, pytest.raises(CorruptError, match="checksum"):
        dataset.sql("select activation from x")


# Only what a query names is touched.


class Recorded:
    """A site that notes which columns were asked for."""

    def __init__(self, site):
        self.site, self.spec, self.asked = site, site.spec, []

    def to_arrow(self, columns=None, *, verify=True):
        self.asked.append(columns)
        return self.site.to_arrow(columns, verify=verify)

    def scan(self, columns=None):
        self.asked.append(columns)
        return self.site.scan(columns)


def test_only_what_a_query_names_is_opened(ds):
    opened = []
    sites = {name: Recorded(ds[name]) for name in ds.names}
    tables = {name: lambda name=name: opened.append(name) or ds.tables[name].to_arrow() for name in ds.tables}
    run_query(Source(tables=tables, sites=sites), f'select count(*) from tokens join "{POST}" using (row)')
    assert opened == ["tokens"]
    assert [name for name, site in sites.items() if site.asked] == [POST]


@pytest.mark.parametrize("site", [POST, "packed"])
@pytest.mark.parametrize(
    ("select", "is_needed"),
    [
        ("select l2_norm from {}", False),
        ("select s.l2_norm from {} s where s.row > 3", False),
        ("select count(*) from {}", False),
        ("select activation from {}", True),
        ("select s.Activation[1] from {} s", True),
        ("select * from {}", True),
        ("from {}", True),
        ("select s from {} s", True),
        ("select columns('act.*') from {}", True),
        ("select c from {} as s(a, b, c)", True),
        ("select #1 from {}", True),
        ("select count(*) from {} a natural join {} b", True),
        ("select count(*) from {} a join {} b using (activation)", True),
    ],
)
def test_tensors_are_left_alone_unless_named(ds, site, select, is_needed):
    recorded = Recorded(ds[site])
    query = select.replace("{}", f'"{site}"')
    run_query(Source(tables={}, sites={site: recorded}), query)
    assert recorded.asked
    assert all((columns is None) == is_needed for columns in recorded.asked)


def test_what_was_read_once_serves_the_next_query(ds):
    recorded = Recorded(ds[POST])
    source = Source(tables={}, sites={POST: recorded})
    for select in ("row", "l2_norm", "activation", "std", "*"):
        run_query(source, f'select {select} from "{POST}"')
    run_query(source, "from stats")
    assert len(recorded.asked) == 2


def test_statement_lists_relations_as_written():
    connection = _connect(None)
    try:
        statement = read_statement(
            connection,
            'with c as (select x from a) select (select max(y) from main."B.c") from c, lateral (select * from d) l',
        )
    finally:
        connection.close()
    assert set(statement.relations) == {("a",), ("main", "B.c"), ("c",), ("d",)}


# Results.


@pytest.fixture
def result(ds):
    return ds.sql(
        f'select row, token, l2_norm, activation from tokens join "{PRE}" using (row) order by row limit 30'
    )


def test_a_result_is_a_sequence_of_rows(result):
    assert result.columns == ["row", "token", "l2_norm", "activation"]
    assert len(result) == 30
    assert list(result) == result.fetchall()
    assert result.fetchall()[1][:2] == (1, "cat")


def test_a_result_becomes_arrow_pandas_and_polars(result):
    assert result.to_arrow().column("row").to_pylist() == list(range(30))
    assert pa.table(result).num_rows == 30
    assert result.df()["token"][0] == "the"
    frame = result.pl()
    assert frame["activation"].dtype.shape == (8,)
    assert frame.height == 30


@pytest.mark.parametrize(("package", "method"), [("polars", "to_polars"), ("pandas", "to_pandas")])
def test_a_missing_package_names_its_extra(result, monkeypatch, package, method):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"strapfmt\[{package}\]"):
        getattr(result, method)()


def test_a_result_becomes_tensors(ds):
    got = ds.sql(
        f'select row, l2_norm > 2 as big, activation, [1, 2] pair, 1.5::decimal(4, 2) d from "{PRE}"'
    ).to_torch()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in got.items()} == {
        "row": (torch.int64, (N,)),
        "big": (torch.bool, (N,)),
        "activation": (torch.float32, (N, 8)),
        "pair": (torch.int32, (N, 2)),
        "d": (torch.float64, (N,)),
    }
    got["activation"].zero_()  # the caller's own memory


def test_nothing_selected_gives_tensors_of_no_rows(ds):
    got = ds.sql(f'select row, activation from "{PRE}" where row < 0').to_torch()
    assert got["activation"].shape == (0, 8)


def test_a_null_becomes_nan_and_is_refused_in_whole_numbers(ds):
    got = ds.sql("select 1.5::float union all select null order by 1").to_torch()
    assert math.isnan(next(iter(got.values()))[1])
    with pytest.raises(ArgumentError, match="coalesce"):
        ds.sql("select 1 as n union all select null").to_torch()


def test_a_row_without_a_tensor_is_named_as_the_reason(ds):
    result = ds.sql("select activation from tokens left join wide using (row) limit 4")
    with pytest.raises(ArgumentError, match=r"NULL.* in 2 of 4 rows.*WHERE \"activation\" IS NOT NULL"):
        result.to_torch()
    result = ds.sql(f'select activation as a from tokens left join (from "{PRE}" where row < 3) using (row)')
    with pytest.raises(ArgumentError, match=r"NULL.* in 97 of 100 rows"):
        result.to_torch()


@pytest.mark.parametrize(
    ("select", "message"), [("'text' as t", "not numbers"), ("[[1]] as t", "not numbers")]
)
def test_what_is_no_number_gives_no_tensor(ds, select, message):
    with pytest.raises(ArgumentError, match=message):
        ds.sql(f"select {select}").to_torch()


def test_lists_of_several_lengths_give_no_tensor(ds):
    with pytest.raises(ArgumentError, match="lists of 1 to 2 values"):
        ds.sql("select [1] as t union all select [1, 2]").to_torch()


def test_sums_of_whole_numbers_are_whole_numbers(ds):
    ((total, huge),) = ds.sql("select sum(row), sum(row)::hugeint * 10 ** 30::int from tokens").fetchall()
    assert type(total) is int
    assert total == N * (N - 1) // 2
    assert huge > 2**64


def test_columns_of_one_name_stay_apart(ds):
    result = ds.sql("select 1 as a, 2 as a")
    assert result.columns == ["a", "a_1"]
    assert {name: tensor.item() for name, tensor in result.to_torch().items()} == {"a": 1, "a_1": 2}


def test_text_shows_no_control_characters(result):
    shown = repr(result)
    assert r"\x1b[31m\u202e</script>" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_text_is_short_aligned_and_says_what_is_left_out(result):
    lines = repr(result).splitlines()
    assert len(lines) == 2 + 21 + 1
    assert lines[-1] == "30 rows x 4 columns, the first and last 10 shown"
    assert "8 in all]" in lines[2]
    assert {line.rindex("[") for line in lines[2:-1] if "[" in line} == {lines[0].index("activation")}


def test_text_of_many_columns_leaves_out_the_middle(ds):
    shown = repr(ds.sql("select " + ", ".join(f"{i} as column_{i}" for i in range(50))))
    assert max(map(len, shown.splitlines())) <= 170
    assert "column_0 " in shown
    assert "column_49" in shown
    assert "column_25" not in shown


def test_text_of_no_rows_keeps_the_header(ds):
    assert repr(ds.sql("select 1 as a where false")).splitlines() == ["a", "─", "0 rows x 1 column"]


def test_explain_prints_its_plan(ds):
    assert "Projection" in repr(ds.sql("explain select row + 1 from tokens"))


def test_html_is_escaped(result):
    shown = result._repr_html_()
    assert "</script>" not in shown
    assert "&lt;/script&gt;" in shown
    assert "\x1b" not in shown


def test_datasets_path_may_be_relative(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with Dataset(Path(path.name)) as dataset:
        assert dataset.sql("select count(*) from tokens").fetchall() == [(N,)]
