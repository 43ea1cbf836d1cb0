"""Batches for training: every row once an epoch, exact resumption, bounded memory."""

import itertools
import json
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from stored import flip_byte_of, random_values, write_dataset, write_site

from strapfmt.dataset import Dataset
from strapfmt.dtypes import DTYPES
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetChangedError,
    QueryError,
    RowNotFoundError,
    SiteNotFoundError,
)
from strapfmt.loader import Loader, Order
from strapfmt.writer import DatasetWriter

N, D = 230, 8
SHUFFLES = [False, "full", "block"]
OPTIONS = {"batch_size": 16, "pool_rows": 50, "with_rows": True}


@pytest.fixture(scope="module")
def values():
    return {
        "a": random_values(N, D, dtype=torch.bfloat16, seed=1),
        "b": random_values(N, D, dtype=torch.bfloat16, seed=2),
        "c": random_values(N, 2, 3, dtype=torch.float32, seed=3),
        "packed": random_values(N, D, dtype=torch.float16, seed=4),
        "odd": random_values(N // 2, D, dtype=torch.bfloat16, seed=5),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("loader") / "run.strap"
    write_dataset(path, {name: values[name] for name in "abc"}, batch_bytes=320)
    writer = DatasetWriter(path, mode="append", batch_bytes=320)
    write_site(writer, "packed", values["packed"], np.arange(N), codec="lz4")
    write_site(writer, "odd", values["odd"], np.arange(1, N, 2))
    own = random_values(6, D)
    write_site(writer, "own", own, None, row_space="own", token_row=np.arange(6) * 10, call=0)
    writer.close()
    return path


@pytest.fixture(scope="module")
def ds(path):
    with Dataset(path) as dataset:
        yield dataset


def rows_of(batches):
    return torch.cat([rows for _, rows in batches]).tolist()


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(r, s) for (a, r), (b, s) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shuffle", [*SHUFFLES, True])
@pytest.mark.parametrize("site", ["a", "packed"])
def test_an_epoch_holds_every_row_once_with_its_values(ds, values, site, shuffle):
    batches = list(ds.loader(site, shuffle=shuffle, **OPTIONS))
    assert [len(batch) for batch, _ in batches] == [16] * 14 + [6]
    assert sorted(rows_of(batches)) == list(range(N))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), values[site][rows_of(batches)])
    assert (rows_of(batches) == list(range(N))) == (shuffle is False)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_every_dtype_is_loaded_bit_for_bit(tmp_path, name, shuffle):
    bits = torch.randint(
        0, 2 if name == "bool" else 256, (40, 3 * DTYPES[name].item_bytes), dtype=torch.uint8
    )
    stored = bits.view(DTYPES[name].torch)
    write_dataset(tmp_path / "a.strap", {"x": stored}, statistics=(), batch_bytes=64)
    with Dataset(tmp_path / "a.strap") as dataset:
        batches = list(dataset.loader("x", batch_size=16, pool_rows=16, shuffle=shuffle, with_rows=True))
    got = torch.cat([batch.view(torch.uint8) for batch, _ in batches])
    assert batches[0][0].dtype == stored.dtype
    assert torch.equal(got, bits[rows_of(batches)])


def test_true_means_full_where_small_and_plain_and_block_where_compressed(ds):
    assert ds.loader("a", batch_size=4, shuffle=True).shuffle == "full"
    assert ds.loader("packed", batch_size=4, shuffle=True).shuffle == "block"
    assert ds.loader("a", batch_size=4).shuffle == "none"


def test_without_rows_a_batch_is_a_tensor(ds, values):
    (batch,) = ds.loader("c", batch_size=1000)
    assert torch.equal(batch, values["c"])


def test_a_dtype_converts(ds, values):
    (batch,) = ds.loader("a", batch_size=1000, dtype=torch.float32)
    assert torch.equal(batch, values["a"].float())


# Several sites.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_sites_of_one_shape_are_stacked(ds, values, shuffle):
    batches = list(ds.loader(["a", "b"], shuffle=shuffle, **OPTIONS))
    got = torch.cat([batch for batch, _ in batches])
    assert torch.equal(got, torch.stack([values["a"], values["b"]], dim=1)[rows_of(batches)])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_sites_of_other_shapes_come_as_a_dict(ds, values, shuffle):
    for batch, rows in ds.loader(["a", "c"], shuffle=shuffle, **OPTIONS):
        assert torch.equal(batch["a"], values["a"][rows])
        assert torch.equal(batch["c"], values["c"][rows])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_sites_are_paired_on_the_rows_that_all_hold(ds, values, shuffle):
    batches = list(ds.loader(["a", "odd"], shuffle=shuffle, **OPTIONS))
    assert sorted(rows_of(batches)) == list(range(1, N, 2))
    for batch, rows in batches:
        assert torch.equal(batch[:, 0], values["a"][rows])
        assert torch.equal(batch[:, 1], values["odd"][rows // 2])


def test_ranks_are_one_site(tmp_path):
    for rank in (0, 1):
        write_dataset(
            tmp_path / "a.strap", {"x": torch.full((20, 4), float(rank))}, rank=rank, batch_bytes=64
        )
    with Dataset(tmp_path / "a.strap") as dataset:
        batches = list(dataset.loader("x", batch_size=7, shuffle="block", with_rows=True))
    assert sorted(rows_of(batches)) == [*range(20), *range(1 << 40, (1 << 40) + 20)]
    assert all(torch.equal(batch[:, 0].long(), rows >> 40) for batch, rows in batches)


# Choosing rows.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_where_chooses_rows_by_their_tokens_and_statistics(ds, values, shuffle):
    where = "token = 'cat' and not is_special and l2_norm > 2.5 -- and a comment"
    batches = list(ds.loader("a", where=where, shuffle=shuffle, **OPTIONS))
    norms = values["a"].float().norm(dim=1)
    expected = [i for i in range(N) if i % 5 == 1 and i % 20 and norms[i] > 2.5]
    assert sorted(rows_of(batches)) == expected
    assert torch.equal(torch.cat([batch for batch, _ in batches]), values["a"][rows_of(batches)])


def test_where_over_two_sites_names_them(ds, values):
    batches = list(ds.loader(["a", "b"], where="a.l2_norm > b.l2_norm and position < 10", **OPTIONS))
    norms = [values[name].float().norm(dim=1) for name in "ab"]
    assert rows_of(batches) == [i for i in range(N) if norms[0][i] > norms[1][i] and i % 20 < 10]


def test_where_on_a_site_with_own_rows_sees_their_tokens(ds):
    ((_, rows),) = ds.loader("own", where="position = 10", **OPTIONS)
    assert rows.tolist() == [1, 3, 5]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_rows_are_chosen_by_id(ds, shuffle):
    chosen = [200, 3, 77, 78, 5]
    assert sorted(rows_of(ds.loader("a", rows=chosen, shuffle=shuffle, **OPTIONS))) == sorted(chosen)
    assert rows_of(ds.loader("a", rows=chosen, where="row < 100", **OPTIONS)) == [3, 5, 77, 78]


def test_rows_a_site_does_not_hold_are_named(ds):
    with pytest.raises(RowNotFoundError, match="row 2"):
        ds.loader("odd", batch_size=2, rows=[1, 2])


# Order.


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_the_order_depends_on_seed_and_epoch_alone(ds, shuffle):
    def order(seed, epoch=0):
        loader = ds.loader("a", shuffle=shuffle, seed=seed, **OPTIONS)
        loader.epoch = epoch
        return rows_of(loader)

    assert order(0) == order(0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_order_of_a_seed_never_changes():
    def first(kind):
        order = Order(n_rows=100, kind=kind, seed=7, block_starts=np.arange(0, 101, 10), pool_rows=20)
        return order.epoch(3).rows(0, 6).tolist()

    assert first("none") == [0, 1, 2, 3, 4, 5]
    assert first("full") == [22, 85, 30, 62, 11, 82]
    assert first("block") == [93, 50, 96, 92, 90, 56]


def test_block_shuffle_mixes_record_batches_from_everywhere(ds):
    first_pool = rows_of(
        list(ds.loader("a", shuffle="block", batch_size=16, pool_rows=64, with_rows=True))[:4]
    )
    assert max(first_pool) - min(first_pool) > 100
    assert first_pool != sorted(first_pool)


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_going_through_again_goes_on_to_the_next_epoch(ds, shuffle):
    loader = ds.loader("a", shuffle=shuffle, **OPTIONS)
    once, twice = list(loader), list(loader)
    assert loader.epoch == 2
    both = list(ds.loader("a", shuffle=shuffle, epochs=2, **OPTIONS))
    assert same(once + twice, both)
    assert not same(once, twice)


@pytest.mark.parametrize("epoch", [-1, 0.5, "1", None, True])
def test_an_epoch_is_a_count(ds, epoch):
    loader = ds.loader("a", **OPTIONS)
    with pytest.raises(ArgumentError, match="epoch: expected a whole number of at least 0"):
        loader.epoch = epoch


def test_breaking_off_begins_the_epoch_again(ds):
    loader = ds.loader("a", shuffle="full", **OPTIONS)
    first = next(iter(loader))
    assert same([first], [next(iter(loader))])


def test_no_end_means_no_length(ds):
    loader = ds.loader("a", epochs=None, batch_size=100)
    batches = iter(loader)
    assert [len(next(batches)) for _ in range(7)] == [100, 100, 30, 100, 100, 30, 100]
    with pytest.raises(TypeError, match="n_batches"):
        len(loader)


def test_length_counts_the_batches_of_an_iteration(ds):
    for options in ({}, {"drop_last": True}, {"epochs": 3}, {"shard": (1, 3)}, {"rows": [1, 2, 3]}):
        loader = ds.loader("a", batch_size=16, **options)
        assert len(loader) == sum(1 for _ in loader)


# Shards.


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_share_out_every_row(ds, shuffle, count):
    loaders = [ds.loader("a", shuffle=shuffle, shard=(i, count), epochs=2, **OPTIONS) for i in range(count)]
    shares = [rows_of(loader) for loader in loaders]
    for epoch in (0, 1):
        parts = [share[epoch * len(share) // 2 : (epoch + 1) * len(share) // 2] for share in shares]
        assert sorted(itertools.chain(*parts)) == list(range(N))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_drop_last_gives_every_shard_as_many_full_batches(ds, shuffle):
    loaders = [ds.loader("a", shuffle=shuffle, shard=(i, 3), drop_last=True, **OPTIONS) for i in range(3)]
    sizes = [[len(batch) for batch, _ in loader] for loader in loaders]
    assert sizes == [[16] * 4] * 3


# Resumption.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_state_resumes_after_every_batch(ds, shuffle):
    options = {"shuffle": shuffle, "epochs": 2, "seed": 3, **OPTIONS}
    loader, seen = ds.loader("a", **options), []
    states = [loader.state_dict()]
    for batch in loader:
        seen.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    for done, state in enumerate(states):
        resumed = ds.loader("a", **options)
        resumed.load_state_dict(state)
        assert same(list(resumed), seen[done:])


def test_after_what_was_resumed_the_next_epoch_follows(ds):
    loader = ds.loader("a", shuffle="full", **OPTIONS)
    next(iter(loader))
    resumed = ds.loader("a", shuffle="full", **OPTIONS)
    resumed.load_state_dict(loader.state_dict())
    list(resumed)
    second = ds.loader("a", shuffle="full", **OPTIONS)
    second.epoch = 1
    assert same(list(resumed), list(second))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"shuffle": "full"}, "shuffle"),
        ({"shard": (0, 2)}, "shard"),
        ({"rows": [1, 2]}, "n_rows"),
        ({"rows": list(range(1, N))}, "rows"),
        ({"pool_rows": 200}, "pool_rows"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_the_state_of_another_loader_is_refused(ds, change, named):
    state = ds.loader("a", shuffle="block", **OPTIONS).state_dict()
    with pytest.raises(ArgumentError, match=named):
        ds.loader("a", **{"shuffle": "block", **OPTIONS, **change}).load_state_dict(state)


def test_a_state_of_fewer_rows_says_that_the_site_has_grown(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": torch.ones(300, 2)})
    with Dataset(path) as dataset:
        state = dataset.loader("x", batch_size=8).state_dict()
        rows = dataset["x"].rows
    write_dataset(path, {"x": torch.ones(300, 2)}, mode="append")
    with Dataset(path) as dataset:
        with pytest.raises(ArgumentError, match=r"grown from 300 to 600.*rows=") as caught:
            dataset.loader("x", batch_size=8).load_state_dict(state)
        assert state["loader"]["rows"] not in str(caught.value)
        with pytest.raises(ArgumentError, match=r"\(rows: they are not the same ones\)"):
            dataset.loader("x", batch_size=8, rows=rows + 1).load_state_dict(state)


@pytest.mark.parametrize("state", [None, 5, "{}", [1]])
def test_what_is_no_state_is_refused(ds, state):
    with pytest.raises(ArgumentError, match="state_dict"):
        ds.loader("a", **OPTIONS).load_state_dict(state)


def test_a_state_beyond_the_end_is_refused(ds):
    loader = ds.loader("a", **OPTIONS)
    state = loader.state_dict()
    loader.load_state_dict({**state, "batch": loader.n_batches})
    for wrong in ({"batch": loader.n_batches + 1}, {"first_epoch": 1}, {"batch": True}, {"loader": 5}):
        with pytest.raises(ArgumentError, match="state: expected"):
            loader.load_state_dict({**state, **wrong})


def test_own_rows_are_chosen_by_their_own_numbers(ds):
    ((_, rows),) = ds.loader("own", own_rows=[4, 1], **OPTIONS)
    assert rows.tolist() == [1, 4]
    ((_, rows),) = ds.loader("own", own_rows=[4, 1], where="token_row = 40", **OPTIONS)
    assert rows.tolist() == [4]


@pytest.mark.parametrize("state", [{}, {"version": 2}, {"batch": -1}, {"epoch": "1"}, {"loader": {}}])
def test_a_damaged_state_is_refused(ds, state):
    loader = ds.loader("a", **OPTIONS)
    changed = {**loader.state_dict(), **state} if state else {}
    with pytest.raises(ArgumentError, match="state"):
        loader.load_state_dict(changed)


# Workers and pickling.


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_yields_the_same_batches_in_the_same_order(ds, shuffle, workers):
    loader = ds.loader("a", shuffle=shuffle, epochs=2, **OPTIONS)
    expected = list(ds.loader("a", shuffle=shuffle, epochs=2, **OPTIONS))
    got = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=workers)
    assert len(got) == len(expected)
    assert same(list(got), expected)


def through_workers(loader, context="fork", **options):
    options = {"num_workers": 2, "batch_size": None, "multiprocessing_context": context, **options}
    return torch.utils.data.DataLoader(loader, **options)


def test_the_place_in_workers_is_told_from_the_place_here(ds):
    loader = ds.loader("a", shuffle="full", **OPTIONS)
    state = loader.state_dict()
    first = list(through_workers(loader))
    with pytest.raises(ArgumentError, match=r"workers of a DataLoader .*count its batches"):
        loader.state_dict()
    loader.load_state_dict({**state, "batch": 5})  # 5 of them were counted
    assert same(list(loader), first[5:])
    assert loader.state_dict()["epoch"] == 1  # it went through the rest here
    list(through_workers(loader))
    loader.epoch = 1
    assert loader.state_dict()["epoch"] == 1
    assert len(next(iter(loader))) == 2
    pickle.loads(pickle.dumps(loader)).state_dict()  # noqa: S301 - written here


def test_each_pass_of_new_workers_begins_where_the_loader_stands(ds):
    loader = ds.loader("a", shuffle="full", **OPTIONS)
    once, again = list(through_workers(loader)), list(through_workers(loader))
    assert same(once, again)
    loader.epoch = 1
    assert not same(once, list(through_workers(loader)))
    persistent = through_workers(ds.loader("a", shuffle="full", **OPTIONS), persistent_workers=True)
    assert same(list(persistent), once)
    assert not same(list(persistent), once)


def test_spawned_workers_print_nothing_and_tell_their_place(path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import strapfmt, sys, torch

if __name__ == "__main__":
    loader = strapfmt.open({str(path)!r}).loader("a", batch_size=16, shuffle=True)
    state = loader.state_dict()
    options = dict(batch_size=None, num_workers=1, multiprocessing_context="spawn")
    print(len(list(torch.utils.data.DataLoader(loader, **options))), "duckdb" in sys.modules)
    try:
        loader.state_dict()
    except strapfmt.ArgumentError as error:
        print(str(error)[:12])
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "15 False\nstate_dict()\n"
    assert done.stderr == ""


def test_workers_resume_too(ds):
    loader = ds.loader("a", shuffle="block", **OPTIONS)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    rest = list(batches)
    resumed = ds.loader("a", shuffle="block", **OPTIONS)
    state = {**loader.state_dict(), "first_epoch": 0, "epoch": 0, "batch": 5}
    resumed.load_state_dict(state)
    assert same(list(torch.utils.data.DataLoader(resumed, batch_size=None, num_workers=2)), rest)


def test_a_pickled_loader_opens_the_path_anew(ds, path, monkeypatch, tmp_path):
    loader = ds.loader("a", shuffle="block", where="position > 3", **OPTIONS)
    batches = iter(loader)
    next(batches)
    copied = pickle.dumps(loader)
    monkeypatch.chdir(tmp_path)
    expected = list(ds.loader("a", shuffle="block", where="position > 3", **OPTIONS))
    assert same(list(pickle.loads(copied)), expected)  # noqa: S301 - written above
    assert len(copied) < 10_000


def test_a_pickled_loader_refuses_a_dataset_that_grew(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": torch.ones(4, 2)})
    with Dataset(path) as dataset:
        copied = pickle.dumps(dataset.loader("x", batch_size=2))
    write_dataset(path, {"x": torch.ones(4, 2)}, mode="append")
    with pytest.raises(DatasetChangedError, match=r"\[4\] rows when .* \[8\] now"):
        pickle.loads(copied)  # noqa: S301 - written above


def test_a_loader_stays_with_the_commit_it_was_made_from(tmp_path):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": torch.ones(4, 2)})
    with Dataset(path) as dataset:
        loader = dataset.loader("x", batch_size=3)
        write_dataset(path, {"x": torch.zeros(4, 2)}, mode="append")
        assert dataset.refresh()
        assert torch.equal(torch.cat(list(loader)), torch.ones(4, 2))


# Checksums and memory.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_damage_is_found_when_it_is_reached(tmp_path, shuffle):
    path = tmp_path / "a.strap"
    write_dataset(path, {"x": random_values(400, 16)}, batch_bytes=1024)
    flip_byte_of(path, "x", 0.5)
    with Dataset(path) as dataset:
        loader = dataset.loader("x", batch_size=8, pool_rows=32, shuffle=shuffle)
        with pytest.raises(CorruptError, match="record batch"):
            list(loader)
        if shuffle is False:
            assert 15 < loader.state_dict()["batch"] < 30  # it lies in the middle of 50


def test_an_epoch_verifies_everything(ds, path):
    with Dataset(path) as dataset:
        loader = dataset.loader("a", batch_size=16, shuffle="block", pool_rows=32)
        before = dataset["a"].n_unverified_bytes
        next(iter(loader))
        assert 0 < dataset["a"].n_unverified_bytes < before
        list(loader)
        assert dataset["a"].n_unverified_bytes == 0


def test_batches_are_the_callers_to_keep_and_to_change(ds, values):
    kept = []
    for batch, rows in ds.loader("a", shuffle="full", **OPTIONS):
        kept.append((batch[::2], rows))
        batch[1::2] = 0
    assert all(torch.equal(half, values["a"][rows][::2]) for half, rows in kept)


def test_memory_of_batches_that_are_gone_is_used_again(ds):
    addresses = {batch.data_ptr() for batch in ds.loader("a", batch_size=10, epochs=3)}
    assert len(addresses) <= 4


def test_block_shuffle_holds_one_pool_and_its_batches(tmp_path):
    n, d, pool = 20_000, 64, 1_000
    write_dataset(tmp_path / "a.strap", {"x": torch.zeros(n, d)}, batch_bytes=16 << 10, statistics=())
    with Dataset(tmp_path / "a.strap") as dataset:
        loader = dataset.loader("x", batch_size=100, shuffle="block", pool_rows=pool)
        next(iter(loader))
        tracemalloc.start()
        for _ in loader:
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    pool_bytes = pool * d * 4
    assert pool_bytes < peak < 2 * pool_bytes < n * d * 4 / 8


# Mistakes.


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ("a", {"batch_size": 0}, "batch_size"),
        ("a", {"epochs": 0}, "epochs"),
        ("a", {"pool_rows": 0}, "pool_rows"),
        ("a", {"shuffle": "some"}, "shuffle"),
        ("a", {"shard": (2, 2)}, "shard"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"rows": [1, 1]}, "each row once"),
        ("a", {"rows": [0.5]}, "rows: expected integers"),
        ("a", {"rows": []}, "rows: expected at least one"),
        ("a", {"rows": [1], "where": "row = 2"}, "none of the 1 rows"),
        ("a", {"own_rows": [1]}, r"loader\(rows=\.\.\.\)"),
        ("own", {"rows": [0]}, r"mean nothing there; loader\(own_rows="),
        ("own", {"own_rows": []}, "at least one"),
        ("a", {"batch_size": 10**9, "drop_last": True}, "no full batch"),
        ("a", {"batch_size": N, "drop_last": True, "shard": (0, 2)}, "no full batch"),
        ("a", {"batch_size": 2.5}, "batch_size"),
        ("a", {"batch_size": "5"}, "batch_size"),
        ("a", {"batch_size": None}, "batch_size"),
        ("a", {"batch_size": True}, "batch_size"),
        ("a", {"rows": [[1], [1, 2]]}, "rows: expected integers"),
        (None, {}, "sites: expected a name"),
        (["a", "b"], {"where": "l2_norm > 1"}, "write a.l2_norm or b.l2_norm"),
        ("a", {"epochs": 1.5}, "epochs"),
        ("a", {"shuffle": []}, "shuffle"),
        ("a", {"seed": "a"}, "seed"),
        ("a", {"seed": 0.5}, "seed"),
        ("a", {"shard": 3}, "shard"),
        ("a", {"shard": (0, 1.5)}, "shard"),
        ("a", {"shard": "01"}, "shard"),
        ("a", {"dtype": "float32"}, "torch.dtype"),
        ("a", {"where": "  "}, "where"),
        ("a", {"where": "row < 0"}, "no row"),
        ([], {}, "one or more"),
        (["a", "a"], {}, "different names"),
        (["a", "own"], {}, "token_row"),
    ],
)
def test_mistakes_are_named(ds, sites, options, message):
    with pytest.raises((ArgumentError, QueryError), match=message):
        ds.loader(sites, **{"batch_size": 4, **options})


def test_a_site_that_is_not_stored_is_named(ds):
    with pytest.raises(SiteNotFoundError, match="did you mean"):
        ds.loader("pack", batch_size=4)


def test_ragged_sites_are_refused(tmp_path):
    from strapfmt.schema import SiteSpec

    writer = DatasetWriter(tmp_path / "a.strap")
    writer.add_site(SiteSpec(name="pattern", dtype="float32", shape=(-1,), statistics=()))
    rows = np.arange(2) + writer.reserve("row", 2)
    writer.write("pattern", np.ones(3, np.float32), rows=rows, shapes=np.array([[1], [2]], np.int32))
    writer.wait()
    writer.close()
    with Dataset(tmp_path / "a.strap") as dataset, pytest.raises(ArgumentError, match="scan"):
        dataset.loader("pattern", batch_size=1)


def test_sites_without_a_common_row_are_refused(tmp_path):
    writer = DatasetWriter(tmp_path / "a.strap")
    rows = np.arange(4) + writer.reserve("row", 4)
    write_site(writer, "x", torch.ones(2, 1), rows[:2])
    write_site(writer, "y", torch.ones(2, 1), rows[2:])
    writer.close()
    with Dataset(tmp_path / "a.strap") as dataset, pytest.raises(ArgumentError, match="no row in common"):
        dataset.loader(["x", "y"], batch_size=1)


def test_a_site_without_rows_gives_no_batches(tmp_path):
    writer = DatasetWriter(tmp_path / "a.strap")
    from strapfmt.schema import SiteSpec

    writer.add_site(SiteSpec(name="x", dtype="float32", shape=(2,)))
    writer.close()
    with Dataset(tmp_path / "a.strap") as dataset:
        for shuffle in SHUFFLES:
            assert list(dataset.loader("x", batch_size=2, shuffle=shuffle, epochs=None)) == []


def test_repr_says_what_it_will_do(ds):
    loader = ds.loader("a", batch_size=16, shuffle="block")
    assert isinstance(loader, Loader)
    assert repr(loader) == "Loader(a: 230 rows in 15 batches of 16, shuffle='block', epoch 0)"
