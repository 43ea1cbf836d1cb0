"""Small values take a short way through the ring: what is stored is the same as by the long one, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.errors import CaptureError
from strapfmt.schema import SiteSpec
from strapfmt_capture import hooks as hooks_module
from strapfmt_capture.ring import Ring
from strapfmt_capture.rings import Rings
from strapfmt_capture.small_values import Gatherer
from strapfmt_capture.turn import values_of

SPEC = SiteSpec(name="s", dtype="float32", shape=(4,))
ROWS = np.arange(2)


def values_in(ring: Ring[Any]) -> list[tuple[list[int], list[float]]]:
    """Rows and first numbers of each value that waits."""
    return [
        (
            values.rows.tolist(),
            values.memory.view(values.start, torch.float32, (2, 4))[:, 0].tolist(),
        )
        for item in ring.take(1 << 20, wait=False)
        for values in values_of([item])
        if values.rows is not None
    ]


def test_values_of_one_slot_come_out_one_by_one_and_in_order() -> None:
    ring: Ring[Any] = Ring(1 << 16)
    gatherer = Gatherer()
    for number in range(40):  # more than the first slot has room for
        x = torch.full((2, 4), float(number))
        assert gatherer.has_room(ring, x.nbytes, ROWS)
        gatherer.add(SPEC, x, x.nbytes)
    gatherer.flush()
    gatherer.flush()
    ring.close()
    assert values_in(ring) == [([0, 1], [number, number]) for number in range(40)]
    ring.release(ring.position)
    assert ring.n_used == 0


def test_other_rows_have_a_slot_of_their_own() -> None:
    ring: Ring[Any] = Ring(1 << 16)
    gatherer = Gatherer()
    for number, rows in enumerate([ROWS, ROWS + 2]):
        x = torch.full((2, 4), float(number))
        assert gatherer.has_room(ring, x.nbytes, rows)
        gatherer.add(SPEC, x, x.nbytes)
    gatherer.flush()
    ring.close()
    assert values_in(ring) == [([0, 1], [0, 0]), ([2, 3], [1, 1])]


def test_what_is_no_small_part_of_the_ring_goes_the_long_way() -> None:
    gatherer = Gatherer()
    assert not gatherer.has_room(Ring(1024), 512, ROWS)
    gone: Ring[Any] = Ring(1 << 16)
    gone.abort()
    assert not gatherer.has_room(gone, 32, ROWS)


def test_everything_else_comes_behind_what_was_gathered_before_it() -> None:
    rings = Rings(Ring(1 << 16))
    x = torch.ones(2, 4)
    assert rings.has_room(x.nbytes, ROWS)
    rings.add_small(SPEC, x, x.nbytes)
    slot = rings.of(torch.device("cpu")).reserve(64)
    assert slot is not None
    assert slot.start >= 64, "the slot of what was gathered is not given away"
    rings.publish(SPEC)
    items = rings.host.take(1 << 20, wait=False) or rings.host.take(1 << 20)
    assert [type(item).__name__ for item in items] == ["Block", "SiteSpec"]


@pytest.mark.parametrize("drain", ["thread", "process"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_short_way_stores_what_the_long_way_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: Any, padded: bool
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = not padded
    ways: list[int] = []
    gathers = hooks_module.Hooks._gathers

    def counted(*arguments: Any) -> bool:
        is_short = gathers(*arguments)
        ways[-1] += is_short
        return is_short

    def run(path: Path) -> None:
        ways.append(0)
        sites = ["blocks.*.*", "logits", "model.layers.0.mlp"]
        with strapfmt.capture(model, path, sites=sites, drain=drain, quiet=True):
            model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            model.generate(ids[:1], max_new_tokens=3, do_sample=False)

    monkeypatch.setattr(hooks_module.Hooks, "_gathers", counted)
    run(tmp_path / "short.strap")
    monkeypatch.setattr(hooks_module.Hooks, "_gathers", lambda *arguments: False)
    run(tmp_path / "long.strap")
    assert ways[0] > 40
    with strapfmt.open(tmp_path / "short.strap") as got, strapfmt.open(tmp_path / "long.strap") as wanted:
        assert list(got.sites) == list(wanted.sites)
        for name, site in wanted.sites.items():
            assert got[name].to_arrow().equals(site.to_arrow())


class Twice(torch.nn.Module):
    """Runs one layer twice, or once, or gives it something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()

    def forward(self, input_ids: torch.Tensor, x: torch.Tensor, n: int = 1) -> torch.Tensor:
        for _ in range(n):
            x = self.layer(x)
        return x


def test_what_does_not_fit_is_refused_or_stored_as_ever(tmp_path: Path) -> None:
    model, ids = Twice(), torch.tensor([[5, 6]])
    plain = torch.randn(1, 2, 4)
    others = [
        torch.randn(1, 4, 2).transpose(1, 2),  # not contiguous
        torch._neg_view(torch.randn(1, 2, 4)),
        torch.randn(1, 2, 8)[..., ::2],
    ]
    with strapfmt.capture(model, tmp_path / "x.strap", sites="layer", quiet=True):
        for x in [plain, *others, plain]:
            model(ids, x)
        with pytest.raises(CaptureError, match="fired twice"):
            model(ids, plain, n=2)
        with pytest.raises(CaptureError, match=r"found float64 \[1, 2, 4\]"):
            model(ids, plain.double())
    with strapfmt.open(tmp_path / "x.strap") as ds:
        stored = ds["layer"].tensor()[:10]
    assert torch.equal(stored, torch.cat([plain, *others, plain]).flatten(0, 1))
