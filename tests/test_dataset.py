"""A dataset as a user holds it: opening, SQL conditions in scans, copies of it, and how it shows itself."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from stored import random_values, write_dataset, write_site

import strapfmt
from strapfmt.errors import ArgumentError, DatasetNotFoundError, QueryError
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


def test_closing_makes_the_data_unreachable(path):
    dataset = strapfmt.open(path)
    dataset.close()
    with pytest.raises(LookupError):
        dataset["own"]
