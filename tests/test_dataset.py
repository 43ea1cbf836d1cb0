"""A dataset as a user holds it: opening, SQL conditions in scans, copies of it, and how it shows itself."""

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from stored import random_values, write_dataset, write_site

import strapfmt
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetChangedError,
    DatasetClosedError,
    DatasetNotFoundError,
    QueryError,
)
from strapfmt.reader import Reader
from strapfmt.writer import DatasetWriter

N = 100


@pytest.fixture(scope="module")
def values():
    return random_values(N, 4, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def path(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("dataset") / "run.strap"
    write_dataset(path, {"blocks.0.mlp_out": values}, batch_bytes=512)
    writer = DatasetWriter(path, mode="append")
    write_site(writer, "own", torch.ones(3, 2), None, row_space="own", token_row=np.array([5, 6, -1]), call=0)
    writer.close()
    return path


@pytest.fixture(scope="module")
def ds(path):
    with strapfmt.open(path) as dataset:
        yield dataset


def test_open_gives_a_dataset_that_is_a_reader(ds):
    assert type(ds) is strapfmt.Dataset
    assert isinstance(ds, Reader)
    assert ds.names == ["blocks.0.mlp_out", "own"]


def test_open_names_what_is_not_there(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"nothing\.strap"):
        strapfmt.open(tmp_path / "nothing.strap")
    with pytest.raises(ArgumentError, match="verify"):
        strapfmt.open(tmp_path, verify="never")


def test_open_passes_verify_on(path):
    with strapfmt.open(path, verify="always") as dataset:
        dataset.sql('select row from "blocks.0.mlp_out"')
        assert dataset["blocks.0.mlp_out"].n_unverified_bytes == 0


def test_scan_takes_an_sql_condition(ds, values):
    site = ds["blocks.0.mlp_out"]
    batches = list(site.scan(["row", "l2_norm"], where="token = 'cat' and position > 3 and l2_norm > 1.5"))
    norms = values.float().norm(dim=1)
    expected = [i for i in range(N) if i % 5 == 1 and i % 20 > 3 and norms[i] > 1.5]
    assert pa.Table.from_batches(batches)["row"].to_pylist() == expected


def test_scan_of_own_rows_sees_the_columns_of_their_tokens(ds):
    kept = [batch["row"].to_pylist() for batch in ds["own"].scan(where="position = 6")]
    assert kept == [[1]]
    kept = [batch["row"].to_pylist() for batch in ds["own"].scan(where="token_row is null")]
    assert kept == [[2]]


def test_scan_keeps_rows_of_every_shard_and_rank_and_reads_no_other_batch(tmp_path):
    path = tmp_path / "a.strap"
    for rank, fill in enumerate((1.0, 2.0)):
        values = torch.full((N, 4), fill) * torch.arange(N)[:, None]
        write_dataset(path, {"x": values}, batch_bytes=128, shard_bytes=2000, rank=rank, codec="zstd")
    with strapfmt.open(path) as dataset:
        site = dataset["x"]
        assert len(dataset.manifests[0].sites[0].shards) > 3
        kept = [row for rank in (0, 1) for row in ((rank << 40) + k for k in (3, 4, 40, 41, 42, 99))]
        table = pa.Table.from_batches(site.scan(where=f"row IN ({', '.join(map(str, kept))})"))
        assert table["row"].to_pylist() == kept
        norms = table["activation"].combine_chunks().flatten().to_numpy().reshape(-1, 4)[:, 0]
        assert norms.tolist() == [(1 + (row >> 40)) * (row & 0xFF) for row in kept]
        before = dataset["x"].n_unverified_bytes
        assert sum(len(batch) for batch in site.scan(where="row < 8", batch_size=4)) == 8
        assert dataset["x"].n_unverified_bytes == before  # no new record batch


def test_a_condition_is_resolved_once_and_cut_to_each_batch(tmp_path, monkeypatch):
    write_dataset(tmp_path / "a.strap", {"x": torch.ones(N, 4)}, batch_bytes=64)
    monkeypatch.setattr(np, "isin", None)  # whose cost is that of all kept rows, in every batch
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        assert dataset["x"].n_batches > 10
        assert sum(len(batch) for batch in dataset["x"].scan(where="position > 0")) == N - 5


def test_a_bare_row_in_a_condition_over_own_rows_is_refused(ds, tmp_path):
    writer = DatasetWriter(tmp_path / "no_tokens.strap")
    write_site(writer, "own", torch.ones(3, 2), None, row_space="own", token_row=np.array([5, 6, -1]), call=0)
    writer.close()
    with strapfmt.open(tmp_path / "no_tokens.strap") as without:
        for dataset in (ds, without):
            for where in ("row = 1", "ROW < 2", "exists (select 1 from range(3) t(a) where a = row)"):
                with pytest.raises(QueryError, match=r"`row` alone could mean two .*own_row.*token_row"):
                    dataset["own"].scan(where=where)
                with pytest.raises(QueryError, match="own_row"):
                    dataset.loader("own", batch_size=1, where=where)
            assert pa.Table.from_batches(dataset["own"].scan(where="own_row = 1"))["row"].to_pylist() == [1]
            kept = pa.Table.from_batches(dataset["own"].scan(where="token_row = 6"))
            assert kept["row"].to_pylist() == [1]
        kept = ds["own"].scan(where="tokens.row = 6 and token_row in (select row from tokens)")
        assert pa.Table.from_batches(kept)["row"].to_pylist() == [1]


def test_scan_keeps_nothing_where_nothing_fits(ds):
    assert list(ds["own"].scan(where="position > 1000")) == []


@pytest.mark.parametrize("where", ["nosuch > 1", "token = 'a'; drop table tokens", "row = "])
def test_a_wrong_condition_is_a_query_error(ds, where):
    with pytest.raises(QueryError):
        list(ds["blocks.0.mlp_out"].scan(where=where))


def test_a_pickled_dataset_opens_the_same_path(path, monkeypatch, tmp_path):
    monkeypatch.chdir(path.parent)
    with strapfmt.open(path.name, verify="always") as dataset:
        copied = pickle.dumps(dataset)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(copied) as again:  # noqa: S301 - written above
        assert again.names == ["blocks.0.mlp_out", "own"]
        assert again.verify == "always"


@pytest.mark.parametrize("kind", [strapfmt.Dataset, Reader])
def test_pickled_sites_and_tables_open_the_same_path(path, kind):
    with kind(path, verify="always") as dataset:
        copied = pickle.dumps((dataset["blocks.0.mlp_out"], dataset.tokens, dataset.sequence(1)))
        expected = dataset["blocks.0.mlp_out"].tensor(copy=True)
    site, tokens, sequence = pickle.loads(copied)  # noqa: S301 - written above
    assert torch.equal(site.tensor(), expected)
    assert len(tokens.to_arrow("row")) == N
    assert len(sequence["blocks.0.mlp_out"]) == 20
    if kind is strapfmt.Dataset:
        assert [len(batch) for batch in site.scan(where="row = 3")] == [1]


def test_pickled_sites_and_tables_refuse_a_dataset_that_grew(tmp_path):
    write_dataset(tmp_path / "a.strap", {"x": torch.ones(3, 2)})
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        copies = [pickle.dumps(dataset["x"]), pickle.dumps(dataset.tokens)]
    write_dataset(tmp_path / "a.strap", {"x": torch.ones(4, 2)}, mode="append")
    for copied in copies:
        with pytest.raises(DatasetChangedError, match="held 3 rows when it was pickled, and holds 7 now"):
            pickle.loads(copied)  # noqa: S301 - written above


def test_sql_follows_refresh(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": torch.ones(3, 2)})
    with strapfmt.open(path) as dataset:
        write_dataset(path, {"x": torch.ones(4, 2), "y": torch.ones(4, 2)}, mode="append")
        assert dataset.sql("select count(*) from x").fetchall() == [(3,)]
        assert dataset.refresh()
        assert dataset.sql("select count(*) from x join y using (row)").fetchall() == [(4,)]
        assert sum(batch.num_rows for batch in dataset["y"].scan(where="position < 2")) == 2


def test_repr_shows_counts_and_sites(ds):
    lines = repr(ds).splitlines()
    assert lines[0].endswith("run.strap: 100 tokens of 0 sequences in 0 steps")
    assert lines[1].split()[:2] == ["site", "rows"]
    assert [line.split()[0] for line in lines[2:]] == ["blocks.0.mlp_out", "own"]


def test_repr_says_when_it_was_not_closed(tmp_path):
    writer = DatasetWriter(tmp_path / "a.strap")
    write_site(writer, "x", torch.ones(2, 2), np.arange(2) + writer.reserve("row", 2))
    writer.commit()
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        assert "not closed" in repr(dataset)
    writer.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda ds: ds["own"],
        lambda ds: ds.sites,
        lambda ds: ds.names,
        lambda ds: ds.tokens,
        lambda ds: ds.tables,
        lambda ds: ds.report,
        lambda ds: ds.refresh(),
        lambda ds: ds.sql("select 1"),
        lambda ds: ds.tensors("own"),
        lambda ds: ds.sequence(0),
        lambda ds: ds.loader("own", batch_size=1),
        lambda ds: len(ds),
        lambda ds: "own" in ds,
    ],
)
def test_a_closed_dataset_says_so(path, use):
    dataset = strapfmt.open(path)
    dataset.close()
    with pytest.raises(DatasetClosedError, match=r"run\.strap: this dataset was closed"):
        use(dataset)


def test_what_was_taken_before_close_says_so_too(path):
    with strapfmt.open(path) as dataset:
        site = dataset["own"]
    with pytest.raises(DatasetClosedError, match=r"run\.strap: this dataset was closed"):
        list(site.scan(where="token_row is null"))
    assert len(list(site.scan())) == 1


def test_a_site_keeps_the_state_it_is_of(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": torch.ones(3, 2)})
    with strapfmt.open(path) as dataset:
        before = dataset["x"]
        write_dataset(path, {"x": torch.ones(4, 2)}, mode="append")
        assert dataset.refresh()
        assert [len(batch) for batch in before.scan(where="position >= 0")] == [3]


def test_closing_twice_and_showing_what_is_closed_are_fine(path):
    dataset = strapfmt.open(path)
    dataset.close()
    dataset.close()
    assert repr(dataset).endswith("run.strap: closed")
    with Reader(path) as reader:
        pass
    assert "closed" in repr(reader)


def test_a_relative_path_survives_a_change_of_directory(path, values, monkeypatch, tmp_path):
    monkeypatch.chdir(path.parent)
    with strapfmt.open("run.strap") as dataset:
        monkeypatch.chdir(tmp_path)
        assert dataset.path == path
        assert torch.equal(dataset["blocks.0.mlp_out"].tensor(), values)
        assert not dataset.refresh()


@pytest.mark.parametrize("wrong", [None, 3, b"run.strap"])
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(ArgumentError, match="path: expected"):
        strapfmt.open(wrong)


def test_row_ids_of_tokens_are_refused_by_a_site_of_own_rows(ds):
    site = ds["own"]
    with pytest.raises(ArgumentError, match=r"mean nothing there; take\(own_rows=\.\.\.\).*token_row"):
        site.take([0, 1])
    with pytest.raises(ArgumentError, match="own_rows="):
        site.take()
    assert torch.equal(site.take(own_rows=[2, 0]), torch.ones(2, 2))
    query = 'SELECT own_row FROM "own" WHERE token_row = 6'
    assert site.take(own_rows=ds.sql(query).to_arrow()["own_row"].to_numpy()).shape == (1, 2)


def test_own_rows_are_refused_by_a_site_of_tokens(ds, values):
    site = ds["blocks.0.mlp_out"]
    with pytest.raises(ArgumentError, match=r"take\(rows=\.\.\.\)"):
        site.take(own_rows=[0])
    with pytest.raises(ArgumentError, match="wants rows="):
        site.take()
    assert torch.equal(site.take(rows=[3]), values[3:4])


def test_one_site_may_be_named_alone(ds, values):
    rows, tensors = ds.tensors("blocks.0.mlp_out", rows=[4, 2])
    assert rows.tolist() == [4, 2]
    assert torch.equal(tensors["blocks.0.mlp_out"], values[[4, 2]])
    assert list(ds.sequence(0).tensors("blocks.0.mlp_out")) == ["blocks.0.mlp_out"]
    with pytest.raises(ArgumentError, match="rows: expected integers"):
        ds.tensors("blocks.0.mlp_out", rows=[0.5])
    for names in (None, 5, [None]):
        with pytest.raises(ArgumentError, match="names: expected a name or a list of names"):
            ds.tensors(names)


@pytest.mark.parametrize("key", ["a", [1, 2], 1.5, None, slice("a", None), slice(0, 1, 0)])
def test_what_is_no_ordinal_is_refused(ds, key):
    with pytest.raises(ArgumentError, match=r"ordinal|slice"):
        ds["own"][key]


@pytest.mark.parametrize("key", [3, None, ("own",)])
def test_what_is_no_name_is_refused(ds, key):
    with pytest.raises(ArgumentError, match="name of a site"):
        ds[key]
    assert key not in ds.sites
    assert "own" in ds.sites


@pytest.mark.parametrize(
    "where", ["row) or (1=1", "true) -- ", "true order by row", "true) union select (1", "1; select 1", "/* "]
)
def test_a_condition_is_one_expression(ds, where):
    with pytest.raises(QueryError, match="one SQL condition"):
        list(ds["own"].scan(where=where))


@pytest.mark.parametrize("where", [5, " ", ["true"]])
def test_a_condition_is_text(ds, where):
    with pytest.raises(ArgumentError, match="where: expected"):
        list(ds["own"].scan(where=where))


def test_a_condition_may_hold_brackets_comments_and_lists(ds):
    where = "(own_row IN (0, 1)) AND ')' <> '(' -- nothing )"
    assert [batch.num_rows for batch in ds["own"].scan(where=where)] == [2]


# A dataset that is replaced while it is read.


def _write(path, fill, n_rows=40, width=4, mode="create"):
    write_dataset(path, {"x": torch.full((n_rows, width), float(fill))}, batch_bytes=256, mode=mode)


@pytest.mark.parametrize("size", [{}, {"n_rows": 7}, {"n_rows": 90}, {"width": 3}])
@pytest.mark.parametrize("with_index", [False, True])
def test_a_dataset_that_was_replaced_says_so(tmp_path, size, with_index):
    path = tmp_path / "a.strap"
    _write(path, 1)
    with strapfmt.open(path) as dataset:
        site = dataset["x"]
        if with_index:
            assert site.n_batches > 1
        shutil.rmtree(path)
        _write(path, 2, **size)
        for use in (site.tensor, lambda: site.take([0]), lambda: list(site.scan()), site.to_arrow):
            with pytest.raises(DatasetChangedError, match="replaced"):
                use()
        assert dataset.refresh()
        assert dataset["x"].take([0])[0, 0] == 2


def test_what_was_read_before_a_replacement_stays(tmp_path):
    path = tmp_path / "a.strap"
    _write(path, 1)
    with strapfmt.open(path) as dataset:
        whole = dataset["x"].tensor()
        shutil.rmtree(path)
        _write(path, 2)
        assert torch.equal(whole, torch.ones(40, 4))
        assert dataset["x"].take([3])[0, 0] == 1


def test_damage_is_no_replacement(tmp_path):
    path = tmp_path / "a.strap"
    _write(path, 1)
    (index,) = path.glob("rank-00000/sites/*/*.idx")
    data = bytearray(index.read_bytes())
    data[40] ^= 1
    index.write_bytes(data)
    with strapfmt.open(path) as dataset, pytest.raises(CorruptError):
        dataset["x"].tensor()
