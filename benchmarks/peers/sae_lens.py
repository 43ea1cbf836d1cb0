"""SAELens: its `CacheActivationsRunner`, which runs the model itself and writes one site as Arrow shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig

from benchmarks.peers.worker import Passes, Run, System, serve

__all__ = ["SYSTEMS"]


def _load(source: Path, dtype: str) -> None:
    """Load nothing: the runner loads its model itself, in every run, which is not timed."""


def _cache(run: Run) -> AbstractContextManager[Passes]:
    workload = run.workload
    n_bytes = workload.n_rows * run.d_model * getattr(torch, workload.dtype).itemsize
    config = CacheActivationsRunnerConfig(
        dataset_path="prompts",
        model_name=str(run.source),
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": workload.dtype},
        model_batch_size=workload.n_sequences,
        hook_name=f"model.layers.{run.n_layers - 1}",
        d_in=run.d_model,
        dtype=workload.dtype,
        training_tokens=workload.n_rows,
        context_size=workload.n_prompt,
        new_cached_activations_path=str(run.path / "cache"),
        # One buffer, which is the least work: a second would be filled up with prompts that were seen already.
        buffer_size_gb=(n_bytes + 1) / 1e9,
        shuffle=False,
        streaming=False,
        prepend_bos=False,
        device="cpu",
    )
    d_vocab = _vocabulary(run.source)
    prompts = torch.cat(workload.batches(d_vocab)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": prompts})
    return _running(CacheActivationsRunner(config, override_dataset=data))


def _vocabulary(source: Path) -> int:
    import json

    return int(json.loads((source / "config.json").read_text())["vocab_size"])


@contextmanager
def _running(runner: Any) -> Iterator[Passes]:
    def passes(batches: Sequence[torch.Tensor]) -> None:
        runner.run()

    yield passes


SYSTEMS = {
    "SAELens `CacheActivationsRunner`, 1 site": System(
        session=_cache,
        reader="sae_lens",
        load=_load,
        is_last_only=True,
        lacks={"decode": "it runs prompts, it does not generate"},
        note="one site a run, so twelve take twelve runs; its forward pass ends at the site and leaves out the head",
    )
}

if __name__ == "__main__":
    datasets.disable_progress_bars()
    serve(SYSTEMS, ["sae-lens", "transformer-lens", "datasets", "torch", "transformers"])
