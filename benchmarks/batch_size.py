"""Record batches: how large they should be, by what writing, gathering and checking cost."""

from __future__ import annotations

import torch

from benchmarks.files import n_bytes_below
from benchmarks.formats import remove
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, filesystem, in_rounds, scratch
from benchmarks.workloads import SITE, activations, drop_cached, some_ordinals, store
from strapfmt.reader import Reader
from strapfmt.spec import BATCH_TARGET_BYTES

__all__ = ["measure"]

_WIDTH = 2_048
_GATHERED = 4_096
_SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)


def measure(settings: Settings) -> Report:
    """Write and read the same matrix in batches of many sizes."""
    torch.set_num_threads(1)
    n_rows, n_gathered = settings.size(65_536, 2_048), settings.size(_GATHERED, 64)
    x = activations(n_rows, _WIDTH)
    n_bytes = x.numel() * x.element_size()
    report = Report(
        "One matrix of bfloat16 in record batches of several sizes. `one row, checked` opens the dataset, reads a row "
        "and compares the checksum of the batch it lies in: what `verify='always'` pays at a first touch. A writer "
        "holds up to two batches a site in memory, and a commit writes what does not fill one again."
    )
    report.setup = {"rows": n_rows, "width": _WIDTH, "gathered": n_gathered, "default": BATCH_TARGET_BYTES}
    names = {size: f"{size >> 10:,} KiB" for size in _SIZES[: settings.size(len(_SIZES), 3)]}
    reference = names[BATCH_TARGET_BYTES]
    with scratch(settings) as directory:
        paths = {size: directory / f"{size}.strap" for size in names}

        def write(size: int) -> Case:
            path = directory / "w.strap"
            return Case(
                run=lambda: store(path, x, batch_bytes=size), after=lambda: remove(path), repeats=DISK_REPEATS
            )

        seconds = in_rounds({name: write(size) for size, name in names.items()}, settings)
        report.add("durable write", seconds, reference=reference, n_bytes=n_bytes, is_rate=True)
        for size, path in paths.items():
            store(path, x, batch_bytes=size)
        report.facts["size_ratio"] = {names[s]: n_bytes_below(p) / n_bytes for s, p in paths.items()}
        report.facts["batches"] = {names[s]: Reader(p)[SITE].n_batches for s, p in paths.items()}
        out = torch.empty(n_gathered, _WIDTH, dtype=x.dtype)
        ordinals = some_ordinals(n_rows, n_gathered)
        sites = {size: Reader(path)[SITE] for size, path in paths.items()}
        gathers = {
            names[size]: Case(run=lambda site=site: site.gather(ordinals, out=out))
            for size, site in sites.items()
        }
        seconds = in_rounds(gathers, settings, more=5)
        report.add("warm gather", seconds, reference=reference, n_bytes=out.nbytes)
        del sites, gathers

        def one_row(size: int, *, is_cold: bool) -> Case:
            def run() -> None:
                Reader(paths[size], verify="always")[SITE].gather(ordinals[:1], out=out[:1])

            return Case(run=run, before=lambda: drop_cached(paths[size]) if is_cold else None)

        in_memory = filesystem(settings.directory) == "tmpfs"  # never cold
        for is_cold in (False,) if in_memory else (False, True):
            cases = {name: one_row(size, is_cold=is_cold) for size, name in names.items()}
            seconds = in_rounds(cases, settings)
            report.add(f"one row, checked, {'cold' if is_cold else 'warm'}", seconds, reference=reference)
    return report
