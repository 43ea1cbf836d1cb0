"""nnsight: values saved in a trace, and written with safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import models
from benchmarks.models import resid_post
from benchmarks.peers.worker import Passes, Run, System, each, serve

__all__ = ["SYSTEMS"]


def _load(source: Path, dtype: str) -> Any:
    model = models.load(source, dtype)
    return TransformersModel(model, tokenizer=AutoTokenizer.from_pretrained(source), task="text-generation")


def _prefill(model: Any, prompts: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(prompts, use_cache=False):
        held = list().save()  # noqa: C408 - nnsight gives built-in types this method
        for layer in model.model.layers:
            held.append(layer.output)
    return held


def _decode(model: Any, prompts: torch.Tensor, n_new: int) -> list[torch.Tensor]:
    mask = torch.ones_like(prompts)
    with model.generate(
        prompts, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
    ) as tracer:
        held = list().save()  # noqa: C408
        for _ in tracer.iter[:n_new]:
            for layer in model.model.layers:
                held.append(layer.output)
    return held


@contextmanager
def _saved(run: Run) -> Iterator[Passes]:
    def step(number: int, prompts: torch.Tensor) -> None:
        if run.workload.phase == "prefill":
            held = _prefill(run.model, prompts)
        else:
            held = _decode(run.model, prompts, run.workload.n_new)
        sites = resid_post(run.n_layers)
        tensors = {site: torch.cat(held[layer :: len(sites)], 1) for layer, site in enumerate(sites)}
        save_file(tensors, run.path / f"{number:05}.safetensors")

    yield each(step)


SYSTEMS = {"nnsight `.save()`, safetensors": System(session=_saved, reader="safetensors", load=_load)}

if __name__ == "__main__":
    serve(SYSTEMS, ["nnsight", "torch", "transformers", "safetensors"])
