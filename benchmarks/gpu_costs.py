"""What a capture costs a model on a GPU, with the values that it stored beside those that the model computed."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import strapfmt
from benchmarks.gpu_plan import COMPILED, EAGER, GRAPHS, MODES, Plan, Results, failure_of
from benchmarks.measure import quartiles
from benchmarks.models import EIGHT_B, ONE_B, TINY, Shape
from strapfmt_capture.session import Capture

__all__ = ["is_wrong", "measure_all"]

_SUSTAINED_S = 10.0
_N_SHORT_PROMPT = 16
#: What a row needs at least, and after how long it begins no more rounds. Every entry and exit of a capture compiles
#: anew, so that a round of a compiled model takes a minute.
_NEEDS_S = {EAGER: 60.0, COMPILED: 180.0, GRAPHS: 180.0}
_ENOUGH_S = {EAGER: 20.0, COMPILED: 120.0, GRAPHS: 120.0}
_MOST_ROUNDS = {EAGER: 7, COMPILED: 2, GRAPHS: 2}
#: A graph is replayed from the third run on: the first one warms up, the second is recorded.
_N_WARM = {EAGER: 1, COMPILED: 2, GRAPHS: 3}
#: Rows of other tokens or layers are further apart than this, in parts of their length; roundings are not.
_FAR = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One way of running a model.

    Attributes
    ----------
    phase : str
        "prefill" or "decode".
    n_sequences, n_tokens : int
        Sequences in a batch; tokens of a prompt, or tokens decoded behind a short one.
    mode : str
        One of `MODES`.
    """

    phase: str
    n_sequences: int
    n_tokens: int
    mode: str = EAGER

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.phase} {self.n_sequences} x {self.n_tokens}, {self.mode}"

    @property
    def n_prompt(self) -> int:
        """Tokens of a prompt."""
        return self.n_tokens if self.phase == "prefill" else _N_SHORT_PROMPT

    @property
    def n_positions(self) -> int:
        """Positions of a sequence that go through the model; the last generated token does not."""
        return self.n_tokens if self.phase == "prefill" else self.n_prompt + self.n_tokens - 1


Session = Callable[[Any, Path], AbstractContextManager[Any]]


def measure_all(plan: Plan, results: Results, section: dict[str, Any]) -> None:
    """Go through ways to run a model and through models, most wanted first."""
    results.measure(section, "hook, microseconds a site", 15, partial(_hook_cost, plan))
    shapes = {"tiny": TINY} if plan.is_quick else {"1B": ONE_B, "8B": EIGHT_B}
    jobs = [(name, mode) for name in shapes for mode in MODES if mode in plan.modes]
    # Both models before any compiler; with the compiler the small one first, as each row takes minutes.
    jobs.sort(key=lambda job: (job[1] != EAGER, job[1] != EAGER and job[0] == "8B", MODES.index(job[1])))
    for name, mode in jobs:
        _measure_model(plan, results, section, name, shapes[name], mode)
        plan.clean(is_thorough=True)


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row says that something failed, got lost or has other values than it should."""
    return "failure" in row or bool(row.get("problems"))


def _measure_model(
    plan: Plan, results: Results, section: dict[str, Any], name: str, shape: Shape, mode: str
) -> None:
    """Measure all there is of one model in one mode; the model is gone afterwards."""
    needs_s = 0.0 if plan.is_quick else _NEEDS_S[mode]
    works = list(_works(plan, mode))
    cases: dict[str, Callable[[Any], dict[str, Any]]] = {
        work.name: partial(_cost, plan, work, _captured) for work in works
    }
    if mode == EAGER:
        cases["sustained prefill"] = partial(_sustained, plan, works[-1])
        for peer in (_to_host_and_save, _output_hidden_states):
            cases[f"{works[-1].name}, {peer.__name__.strip('_')}"] = partial(_cost, plan, works[-1], peer)
    model = None
    if plan.left_s >= needs_s:
        try:
            model = shape.build_on(plan.device, torch.bfloat16)
        except Exception as error:  # noqa: BLE001 - as in a row
            section.setdefault("rows", []).append({"case": f"{name}, {mode}", "failure": failure_of(error)})
            results.save()
            return
    for case, run in cases.items():
        results.measure(section, f"{name}, {case}", needs_s, partial(run, model))


def _works(plan: Plan, mode: str) -> Iterator[Work]:
    n_prompt, n_new = (8, 4) if plan.is_quick else (512, 64)
    for n_sequences in (1, 16, 64):
        yield Work(phase="decode", n_sequences=n_sequences, n_tokens=n_new, mode=mode)
    for n_sequences in (1, 2 if plan.is_quick else 16):
        yield Work(phase="prefill", n_sequences=n_sequences, n_tokens=n_prompt, mode=mode)


@contextmanager
def _runner(plan: Plan, model: Any, work: Work) -> Iterator[Callable[[], object]]:
    """Yield what runs the work once; the model is compiled for it if so asked, and as it was afterwards."""
    ids = torch.randint(3, model.config.vocab_size, (work.n_sequences, work.n_prompt), device=plan.device)
    mask = torch.ones_like(ids)
    if work.mode != EAGER:
        how = "reduce-overhead" if work.mode == GRAPHS else None
        model.forward = torch.compile(type(model).forward.__get__(model), mode=how, fullgraph=True)
    try:
        if work.phase == "prefill":
            yield lambda: model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        else:
            yield partial(_decode, model, work, ids, mask, _cache(plan, model, work))
    finally:
        vars(model).pop("forward", None)


def _decode(model: Any, work: Work, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> None:
    options: dict[str, Any] = {}
    if cache is not None:
        cache.reset()
        options = {"past_key_values": cache, "disable_compile": True}
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=work.n_tokens,
        min_new_tokens=work.n_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def _cache(plan: Plan, model: Any, work: Work) -> Any:
    """Return a cache that stays in its place, as graphs need it, made before anything is compiled; None for eager."""
    if work.mode == EAGER:
        return None
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(config=config, max_cache_len=work.n_prompt + work.n_tokens)
    width = config.hidden_size // config.num_attention_heads
    cache.early_initialization(
        work.n_sequences, config.num_key_value_heads, width, torch.bfloat16, plan.device
    )
    return cache


@contextmanager
def _captured(model: Any, directory: Path) -> Iterator[Any]:
    with strapfmt.capture(
        model, directory / "run.strap", sites="blocks.*.resid_post", quiet=True, progress=False
    ) as cap:
        yield cap


@contextmanager
def _to_host_and_save(model: Any, directory: Path) -> Iterator[None]:
    """What one writes without a library: `.cpu()` in a hook, `torch.save` at the end."""
    with _plain_hooks(model, range(len(model.model.layers))) as held:
        yield
    torch.save(held, directory / "held.pt")


@contextmanager
def _output_hidden_states(model: Any, directory: Path) -> Iterator[None]:
    """The model's own, kept on the device until the end."""
    kept: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: kept.append(output.hidden_states))
    model.config.output_hidden_states = True
    try:
        yield
    finally:
        handle.remove()
        model.config.output_hidden_states = False
    torch.save([state.cpu() for states in kept for state in states], directory / "held.pt")


@contextmanager
def _plain_hooks(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Yield what these layers give, by layer, copied to host memory at each call."""
    held: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int, module: Any, args: Any, output: Any) -> None:
        held[layer].append((output[0] if isinstance(output, tuple) else output).cpu())

    blocks = model.model.layers
    handles = [blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _cost(plan: Plan, work: Work, session: Session, model: Any) -> dict[str, Any]:
    """Run the work with and without capture in turns, as often as there is time for, and look at what was stored.

    Of a model that is not compiled, every value of three layers is compared with those of plain hooks in the same pass,
    bit for bit. Of a compiled one, with those that the model computes when it is not: they are rounded differently.
    """
    started = time.monotonic()
    facts: dict[str, Any] = {}
    pairs: list[tuple[float, float]] = []
    same: list[float] = []
    n_warm, n_skipped = _N_WARM[work.mode], _n_skipped(work)
    with torch.no_grad(), _runner(plan, model, work) as run:
        n_runs = max(1, min(200, int((0.05 if plan.is_quick else 0.4) / plan.time(run, n_warm=n_warm))))
        while True:
            round_started = time.monotonic()
            before = plan.time(run, n_runs)
            with tempfile.TemporaryDirectory(dir=plan.memory) as directory:
                with session(model, Path(directory)) as cap:
                    plan.time(run, n_warm=n_warm)  # compiles again, with the taps
                    taken = plan.time(run, n_runs)
                if isinstance(cap, Capture):
                    facts = _account(cap) | (_near(model, work, cap.path) if work.mode != EAGER else {})
            after = plan.time(run, n_runs, n_warm=n_warm)
            pairs.append((taken, (before + after) / 2))
            same.append(after / before)
            now = time.monotonic()
            is_enough = plan.is_quick or len(pairs) == _MOST_ROUNDS[work.mode]
            if is_enough or now - started > _ENOUGH_S[work.mode] or plan.left_s < 2 * (now - round_started):
                break
        if session is _captured and work.mode == EAGER:
            facts |= _exact(plan, model, run)
    ratios = [taken / base for taken, base in pairs]
    return {
        "run_ms": 1e3 * median(base for _, base in pairs) / n_runs,
        "n_rounds": len(pairs),
        "overhead": median(ratios) - 1,
        "overhead_quartiles": [each - 1 for each in quartiles(ratios)],
        "same_against_same": median(same) - 1,
        **facts,
        **({} if n_skipped is None else {"cudagraph_skips": (_n_skipped(work) or 0) - n_skipped}),
    }


def _n_skipped(work: Work) -> int | None:
    """How often PyTorch has made no graph where it was asked for one."""
    if work.mode != GRAPHS:
        return None
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def _account(cap: Capture) -> dict[str, Any]:
    report = cap.report
    with strapfmt.open(cap.path) as ds:
        n_stored = sum(len(site) for site in ds.sites.values())
    n_seen = sum(site.expected for site in report.sites)
    return {
        "rows_seen": n_seen,
        "rows_stored": n_stored,
        "rows_dropped": report.n_dropped,
        "stall_s": report.stall_s,
        "bytes_a_pass": report.n_bytes / max(report.n_steps, 1),
        "notes": list(report.notes),
        "problems": [] if n_seen == n_stored > 0 else [f"{n_seen} rows seen, {n_stored} stored"],
    }


def _sample(model: Any) -> list[int]:
    n_layers = len(model.model.layers)
    return sorted({0, n_layers // 2, n_layers - 1})


def _exact(plan: Plan, model: Any, run: Callable[[], object]) -> dict[str, Any]:
    """Compare what a run stores with what plain hooks see in it, bit for bit."""
    with tempfile.TemporaryDirectory(dir=plan.memory) as directory:
        with _plain_hooks(model, _sample(model)) as held, _captured(model, Path(directory)) as cap:
            run()
        n_wrong = n_rows = 0
        with strapfmt.open(cap.path) as ds:
            for layer, values in held.items():
                found = ds[f"blocks.{layer}.resid_post"].tensor()
                wanted = torch.cat([each.flatten(0, 1) for each in values])
                n_rows += len(wanted)
                if found.shape != wanted.shape or found.dtype is not wanted.dtype:
                    n_wrong += len(wanted)
                else:
                    n_wrong += int((found.view(torch.int16) != wanted.view(torch.int16)).any(-1).sum())
    if n_wrong:
        return {"values": f"{n_wrong} of {n_rows} rows differ", "problems": ["values differ"]}
    return {"values": f"exact in {n_rows} rows"}


def _near(model: Any, work: Work, path: Path) -> dict[str, Any]:
    """Compare what the last run has stored with what the model gives for these tokens when it is not compiled."""
    with strapfmt.open(path) as ds:
        table = ds.tokens.to_arrow(["row", "sequence_id", "position", "token_id"])
        rows, sequences, positions, token_ids = (
            torch.from_numpy(column.to_numpy().astype("int64")) for column in table.columns
        )
        sequences = sequences - (int(sequences.max()) + 1 - work.n_sequences)
        last = sequences >= 0
        rows, where = rows[last], (sequences[last], positions[last])
        if len(rows) != work.n_sequences * work.n_positions:
            return {"problems": [f"{len(rows)} rows of the last run, not {work.n_positions} a sequence"]}
        ids = torch.zeros(work.n_sequences, work.n_positions, dtype=torch.int64)
        ids[where] = token_ids[last]
        with _plain_hooks(model, _sample(model)) as held:
            type(model).forward(model, input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        distance = 0.0
        for layer, (wanted,) in held.items():
            found = ds[f"blocks.{layer}.resid_post"].take(rows.numpy()).float()
            off = (found - wanted[where].float()).norm(dim=-1) / wanted[where].float().norm(dim=-1)
            distance = max(distance, float(off.max()))
    problems = [] if distance < _FAR else [f"a row is {distance:.2g} of its length away"]
    return {"values": f"to {distance:.1g} of a row's length", **({"problems": problems} if problems else {})}


def _hook_cost(plan: Plan) -> dict[str, Any]:
    """What a hook costs the host, on a model that does nothing: ours beside one that does nothing."""
    n_sites = 64
    model = _Idle(n_sites, plan.device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=plan.device)

    def per_site(session: AbstractContextManager[Any]) -> float:
        with session, torch.no_grad():
            plan.time(lambda: model(ids), 20)
            started = time.thread_time()
            for _ in range(50):
                model(ids)
            return (time.thread_time() - started) / 50 / n_sites * 1e6

    def noop(*_: Any) -> None:
        pass

    bare = [per_site(nullcontext()) for _ in range(5)]
    handles = [layer.register_forward_hook(noop) for layer in model.layers]
    empty = [per_site(nullcontext()) for _ in range(5)]
    for handle in handles:
        handle.remove()
    ours: list[float] = []
    for _ in range(5):
        with tempfile.TemporaryDirectory(dir=plan.memory) as directory:
            path = Path(directory) / "run.strap"
            ours.append(per_site(strapfmt.capture(model, path, sites="layers.*", quiet=True, progress=False)))
    return {"empty_hook_us": median(empty) - median(bare), "capture_us": median(ours) - median(bare)}


class _Idle(torch.nn.Module):
    """Layers that return what they are given."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(n_layers))
        self.x = torch.randn(1, 1, 4_096, device=device, dtype=torch.bfloat16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return x


def _sustained(plan: Plan, work: Work, model: Any) -> dict[str, Any]:
    """Prefill without a pause into a directory in memory: the rate, and how much memory it took."""
    free = os.statvfs(plan.memory).f_bavail * os.statvfs(plan.memory).f_frsize
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        tempfile.TemporaryDirectory(dir=plan.memory) as directory,
        torch.no_grad(),
        _runner(plan, model, work) as run,
    ):
        base_s = min(plan.time(run) for _ in range(3))
        with _captured(model, Path(directory)) as cap:
            started, n = time.perf_counter(), 0
            limit_s = 0.5 if plan.is_quick else _SUSTAINED_S
            while time.perf_counter() - started < limit_s and cap.report.n_bytes < free // 2:
                run()
                n += 1
            plan.wait()
            passes_s = time.perf_counter() - started
        total_s = time.perf_counter() - started
        report = cap.report
        return {
            "gb_per_s": report.n_bytes / total_s / 1e9,
            "passes": n,
            "overhead": passes_s / n / base_s - 1,
            "stall_s": report.stall_s,
            "rows_dropped": report.n_dropped,
            "host_memory_grew_gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
        }
