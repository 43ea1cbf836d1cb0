"""Capture in a vLLM worker: hooks on its model, and rows from its model runner's batch of requests.

vLLM runs one forward pass over tokens of many requests at once, `[n_tokens, d]` with padding behind, so what a token is
stands in the runner and not in the arguments of the model. Read for this were, at commit 000fc94b of vLLM (V1,
`vllm/v1/worker/gpu_model_runner.py`): `execute_model(scheduler_output, ...)`, `get_model()`, `model_config`,
`speculative_config`, `query_start_loc.np`, and of `input_batch` the attributes `req_ids` and `num_computed_tokens_cpu`;
of the worker `rank`, `parallel_config` and `model_runner`. **None of this has run in vLLM itself**: the tests drive it
with a runner of their own that has these attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.inputs import named_arguments
from strapfmt_capture.recorder import Recorder, create
from strapfmt_capture.sites import resolve
from strapfmt_capture.token_rows import TokenRows

__all__ = ["WorkerExtension", "start", "stop"]

# Uniform sites that hold the same in vLLM's models, whose blocks take and return the stream in two parts.
_PLACES = ("embed", "attn_out", "mlp_out", "resid_post", "final_norm")
_NEEDED = ("execute_model", "get_model", "model_config", "query_start_loc", "input_batch")
_ATTRIBUTE = "_strapfmt_capture"


class WorkerExtension:
    """Methods for a vLLM worker: `LLM(..., worker_extension_cls="strapfmt_capture.vllm.WorkerExtension")`.

    `llm.collective_rpc("start_strapfmt", args=(path,), kwargs={"sites": [...]})`, then generate, then
    `llm.collective_rpc("stop_strapfmt")`.
    """

    def start_strapfmt(self, path: str, **options: Any) -> bool:
        """Call `start`."""
        return start(self, path, **options)

    def stop_strapfmt(self) -> dict[str, Any] | None:
        """Call `stop`."""
        return stop(self)


def start(
    worker: Any, path: str | Path, *, sites: str | Iterable[str] = "blocks.*.resid_post", **options: Any
) -> bool:
    """Begin to capture in a vLLM worker.

    Every pass that serves requests becomes a step. Sequences are requests, tagged with `request_id` as the engine has
    it; positions are places in the request. Tokens that a prefix cache gives are not computed and have no rows; those
    of a preempted request are computed again and have new rows. Values are copied to host memory and handed to the
    writer in the worker's thread, which the engine waits for.

    Parameters
    ----------
    worker : object
        What vLLM passes to the function of `collective_rpc`.
    path : path
        The dataset, on a disk that the worker sees.
    sites : str or iterable of str
        `embed`, `blocks.N.attn_out`, `blocks.N.mlp_out`, `blocks.N.resid_post` and `final_norm` by uniform names, if
        the architecture is known, and outputs of modules by their paths in vLLM's model.
    **options
        Of `create`, but for `rank`: each data-parallel engine is a rank.

    Returns
    -------
    bool
        Whether this worker writes. Of a tensor-parallel group only the first does, as all hold the same values.

    Raises
    ------
    CaptureError
        If hooks do not run (CUDA graphs, compiled code), or rows cannot be known (speculative decoding, pipeline
        parallelism, another model runner).
    ArgumentError
        If a site means another thing in vLLM's model, or an option is wrong.
    SiteNotFoundError
        If a site matches nothing.
    """
    if getattr(worker, _ATTRIBUTE, None) is not None:
        raise CaptureError(f"{path}: this worker captures already; stop it first")
    runner, parallel = worker.model_runner, worker.parallel_config
    _check_runner(runner)
    if parallel.pipeline_parallel_size > 1:
        raise CaptureError(
            "pipeline parallelism: each worker has a part of the layers; use tensor parallelism"
        )
    points = _checked(resolve(runner.get_model(), sites))
    if worker.rank % parallel.tensor_parallel_size:
        return False
    if options.get("mode") == "append" or "rank" in options:
        raise ArgumentError(
            "options: expected those of create without rank and mode='append'; write a new dataset"
        )
    recorder = create(path, rank=parallel.data_parallel_rank, **options)
    setattr(worker, _ATTRIBUTE, _WorkerCapture(runner, recorder, points))
    return True


def stop(worker: Any) -> dict[str, Any] | None:
    """Take the hooks off, and close the dataset.

    Returns
    -------
    dict or None
        `path`, `n_steps`, `n_tokens` and `n_rows`, ready to be sent to another process; None if this worker did not
        write.
    """
    capture: _WorkerCapture | None = getattr(worker, _ATTRIBUTE, None)
    if capture is None:
        return None
    setattr(worker, _ATTRIBUTE, None)
    return capture.close()


class _WorkerCapture:
    """Writes what the model of one runner computes, pass by pass."""

    def __init__(self, runner: Any, recorder: Recorder, points: Sequence[HookPoint]) -> None:
        self._runner, self._recorder, self._points = runner, recorder, points
        self._sequences: dict[str, int] = {}
        self._n_sequences = self._n_steps = self._n_tokens = 0
        self._is_executing = self._is_over = False
        self._tokens: TokenRows | None = None
        self._fired: set[str] = set()
        model: torch.nn.Module = runner.get_model()
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for point in points:
            module = model.get_submodule(point.module_path)
            self._handles.append(module.register_forward_hook(partial(self._take, point)))
        self._execute = runner.execute_model
        runner.execute_model = self._run

    def close(self) -> dict[str, Any]:
        """Detach and close; say what was written."""
        self._detach()
        n_rows = self._recorder.summary().n_rows
        self._recorder.close()
        path = str(self._recorder.path)
        return {"path": path, "n_steps": self._n_steps, "n_tokens": self._n_tokens, "n_rows": n_rows}

    def _detach(self) -> None:
        if not self._is_over:
            self._is_over = True
            del self._runner.execute_model  # the method of its class again
            for handle in self._handles:
                handle.remove()

    def _run(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the runner's `execute_model`; passes outside of it (profiling, warming up) serve no one."""
        for request in scheduler_output.finished_req_ids:
            self._sequences.pop(request, None)
        self._tokens, self._is_executing = None, True
        self._fired.clear()
        try:
            output = self._execute(scheduler_output, *args, **kwargs)
            self._end()
        except BaseException as error:
            self._detach()
            self._recorder.__exit__(type(error), error, error.__traceback__)
            raise
        finally:
            self._is_executing = False
        return output

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Describe the tokens of the pass that begins."""
        if not self._is_executing:
            return
        batch = self._runner.input_batch
        requests = list(batch.req_ids)
        n = len(requests)
        starts = np.asarray(self._runner.query_start_loc.np[: n + 1], np.int64)
        counts, computed = np.diff(starts), np.asarray(batch.num_computed_tokens_cpu[:n], np.int64)
        begun = {request: i for i, request in enumerate(requests) if request not in self._sequences}
        for request in begun:
            self._sequences[request] = self._n_sequences
            self._n_sequences += 1
        n_tokens = int(starts[-1])
        place = np.arange(n_tokens) - np.repeat(starts[:-1], counts)
        is_decode = np.repeat((counts == 1) & (computed > 0), counts)
        ids = named_arguments(module, args, kwargs).get("input_ids")
        self._tokens = self._recorder.tokens(
            None if ids is None else ids[:n_tokens],
            sequence_id=np.repeat([self._sequences[request] for request in requests], counts),
            position=np.repeat(computed, counts) + place,
            phase=np.where(is_decode, "decode", "prefill").tolist(),
            tags={self._sequences[request]: {"request_id": request} for request in begun},
        )
        self._n_steps += 1
        self._n_tokens += n_tokens

    def _take(self, point: HookPoint, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Write a site's values, the padding left out."""
        if not self._is_executing:
            return
        if self._tokens is None:
            raise CaptureError(
                f"site {point.site!r} at {point.hook_point} fired outside of the model's own call"
            )
        if point.site in self._fired:
            raise CaptureError(f"site {point.site!r} at {point.hook_point} fired twice in one pass")
        self._fired.add(point.site)
        value = _stream(output) if point.site.endswith(".resid_post") and point.is_uniform else None
        value = point.read(args, {}, output) if value is None else value
        n = len(self._tokens)
        if value.ndim < 2 or len(value) < n:
            raise CaptureError(
                f"site {point.site!r} at {point.hook_point}: expected one row for each of the {n} tokens of the pass, "
                f"got shape {tuple(value.shape)}; micro-batches (enable_dbo) and sequence parallelism divide them"
            )
        self._recorder.write(point.site, value[:n], tokens=self._tokens, module_path=point.module_path)

    def _end(self) -> None:
        if self._tokens is None:
            return
        missing = [point.site for point in self._points if point.site not in self._fired]
        if missing:
            raise CaptureError(
                f"{', '.join(missing)} did not fire in a pass over {len(self._tokens)} tokens: the module was not "
                "called, or runs inside compiled code or a CUDA graph"
            )
        self._recorder.end_step()


def _stream(output: Any) -> torch.Tensor | None:
    """The residual stream behind a block that returns what is to be added to it, and it, for the next norm to add."""
    if not isinstance(output, (tuple, list)) or len(output) < 2:
        return None
    added, stream = output[:2]
    if (
        not (isinstance(added, torch.Tensor) and isinstance(stream, torch.Tensor))
        or added.shape != stream.shape
    ):
        return None
    return added + stream


def _check_runner(runner: Any) -> None:
    lacking = [name for name in _NEEDED if not hasattr(runner, name)]
    lacking += [
        f"input_batch.{name}"
        for name in ("req_ids", "num_computed_tokens_cpu")
        if not lacking and not hasattr(runner.input_batch, name)
    ]
    if lacking:
        raise CaptureError(
            f"expected the GPUModelRunner of vLLM V1, got a {type(runner).__name__} without {', '.join(lacking)}; set "
            "VLLM_USE_V2_MODEL_RUNNER=0 before vLLM starts"
        )
    if not runner.model_config.enforce_eager:
        raise CaptureError(
            "the engine runs compiled code and CUDA graphs, in which hooks do not run; create it with "
            "LLM(..., enforce_eager=True)"
        )
    if getattr(runner, "speculative_config", None) is not None:
        raise CaptureError(
            "speculative decoding: which drafts are rejected is known only after the pass; create the engine without "
            "speculative_config"
        )


def _checked(points: list[HookPoint]) -> list[HookPoint]:
    for point in points:
        if point.where == "in" or (point.is_uniform and point.site.rpartition(".")[2] not in _PLACES):
            raise ArgumentError(
                f"sites: expected outputs of modules, or some of {', '.join(_PLACES)}, got {point.site!r}, which has "
                "another place, or none, in vLLM's models; ask for a module by its path"
            )
    return points
