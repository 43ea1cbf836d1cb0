"""What a capture tells of itself: the account so far or at its end, and which of its sites gave nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from strapfmt.errors import SiteNeverFiredError
from strapfmt_capture.accounts import CaptureReport, SiteAccount
from strapfmt_capture.drain import Progress
from strapfmt_capture.engine import Engine
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.taps import Tap

__all__ = ["empty_report", "report_of", "silence_of"]


def empty_report(
    path: Path, state: str, points: Iterable[HookPoint], remarks: Iterable[str]
) -> CaptureReport:
    """Return the account of a capture that was not entered."""
    return CaptureReport(
        path=path,
        state=state,
        sites=tuple(_account(Tap(point=point, is_head=False), Progress()) for point in points),
        notes=tuple(remarks),
    )


def report_of(engine: Engine, path: Path, state: str, remarks: Iterable[str]) -> CaptureReport:
    """Return the account of a capture that runs or has ended; `remarks` come before its notes."""
    steps, progress = engine.hooks.steps, engine.drain.progress
    return CaptureReport(
        path=path,
        state=state,
        sites=tuple(_account(tap, progress) for tap in engine.hooks.taps),
        n_tokens=steps.counts.n_tokens,
        n_steps=steps.counts.n_steps,
        n_dropped_steps=steps.counts.n_dropped_steps,
        n_abandoned_steps=steps.counts.n_abandoned_steps,
        n_paused_passes=steps.n_paused_passes,
        n_bytes=progress.n_bytes,
        stall_s=engine.rings.stall_s,
        peak_fill=engine.rings.peak_fill,
        notes=(*remarks, *_notes(engine)),
    )


def silence_of(engine: Engine, report: CaptureReport, model_name: str) -> SiteNeverFiredError | None:
    """Return the error that says which sites gave nothing, and why; None if all gave something."""
    steps, taps = engine.hooks.steps, engine.hooks.taps
    silent = [tap.point.site for tap in taps if not tap.n_calls and tap.gradients is None]
    if not silent:
        return _no_gradients(taps, report)
    if steps.counts.n_steps == 0 and steps.n_paused_passes:
        why = f"all {steps.n_paused_passes} forward passes ran while the capture was paused"
    elif steps.counts.n_steps == 0:
        why = f"no forward pass of {model_name} ran inside the with block (calling .forward() directly runs no hooks)"
    else:
        why = f"the modules were not called in {steps.counts.n_steps - steps.counts.n_abandoned_steps} forward passes"
        if steps.counts.n_abandoned_steps:
            why += f", and {steps.counts.n_abandoned_steps} more ended in an error before or at these sites"
    return SiteNeverFiredError(silent, f"{why}; the dataset is closed: {report.summary()}")


def _no_gradients(taps: Sequence[Tap], report: CaptureReport) -> SiteNeverFiredError | None:
    """Say why no site had a gradient; of some sites alone, the notes say so."""
    silent = _without_gradients(taps)
    if not silent or any(tap.gradients is not None and tap.n_calls for tap in taps):
        return None
    return SiteNeverFiredError(
        [tap.point.site for tap in silent], f"{_why(silent)}; the dataset is closed: {report.summary()}"
    )


def _without_gradients(taps: Iterable[Tap]) -> list[Tap]:
    """The gradients of which values came, but none of them."""
    return [tap for tap in taps if tap.gradients is not None and tap.gradients.counts and not tap.n_calls]


def _why(silent: Iterable[Tap]) -> str:
    counts = sum((tap.gradients.counts for tap in silent if tap.gradients), Counter[str]())
    reasons = {
        "off": "were made with gradients off (torch.no_grad, generate())",
        "constant": "require no gradient (of a frozen model, give it inputs_embeds that do)",
        "awaited": "waited for a backward() inside the with block, of a loss that depends on them",
    }
    why = ", ".join(f"{counts[kind]} {reason}" for kind, reason in reasons.items() if counts[kind])
    return f"of {counts.total()} values {why}"


def _account(tap: Tap, progress: Progress) -> SiteAccount:
    known = tap.layout.spec if tap.layout is not None else None
    return SiteAccount(
        name=tap.point.site,
        module_path=tap.point.module_path,
        dtype=known.dtype if known else None,
        shape=known.shape if known else None,
        row_space=known.row_space if known else None,
        expected=tap.expected,
        written=progress.written.get(tap.point.site, 0),
        dropped=tap.dropped + progress.lost.get(tap.point.site, 0),
        filtered=tap.filtered,
        n_missed=tap.n_missed,
    )


def _notes(engine: Engine) -> list[str]:
    notes = []
    copied = engine.hooks.store.devices.difference(engine.rings.devices)
    elsewhere = sorted(str(device) for device in copied if device.type != "cpu")
    if elsewhere:
        notes.append(
            f"values on {', '.join(elsewhere)} came to host memory by plain copies, one a site and pass, for which the "
            "device waits"
        )
    if engine.rings.is_pinned is False:
        notes.append(
            f"the ring in host memory could not be locked for the GPU ({engine.rings.pin_refusal}), so copies to it "
            "are slower; the driver decides: a smaller host_ring_bytes may do where memory is short, or a container's "
            "limit low"
        )
    whole = [
        tap.point.of_value.site
        for tap in engine.hooks.taps
        if tap.gradients and tap.gradients.is_whole_numbers
    ]
    if whole:
        notes.append(f"no gradients of whole numbers: {', '.join(whole)}")
    if silent := _without_gradients(engine.hooks.taps):
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        notes.append(f"no gradient at {silent[0].point.site!r}{more}: {_why(silent)}")
    points = [
        tap.point for tap in engine.hooks.taps if tap.layout is not None and tap.layout.ndim is not None
    ]
    if own := [point.site for point in points if point.is_uniform]:
        notes.append(
            f"{len(own)} site(s) such as {own[0]!r} number their own rows, as the model is given no tokens under a "
            "name that is known (input_ids, ...): which token a row belongs to is not stored"
        )
    if engine.hooks.is_at_limit:
        notes.append("max_rows was reached: what the model has run since then has no values")
    if engine.drain.spill is not None and (n_spilled := engine.drain.spill.n_steps):
        notes.append(f"{n_spilled} steps went through spill_path")
    if engine.drain.space.note is not None:
        notes.append(engine.drain.space.note)
    if engine.tokenizer is not None and engine.tokenizer.note is not None:
        notes.append(engine.tokenizer.note)
    return notes
