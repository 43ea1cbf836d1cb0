"""TransformerLens: `run_with_cache` on a bridge around the same model, written with safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from benchmarks import models
from benchmarks.models import resid_post
from benchmarks.peers.worker import Passes, Run, System, each, serve

__all__ = ["SYSTEMS"]


def _load(source: Path, dtype: str) -> Any:
    model, tokenizer = models.load(source, dtype), AutoTokenizer.from_pretrained(source)
    return TransformerBridge.boot_transformers(
        str(source), hf_model=model, tokenizer=tokenizer, device="cpu", dtype=getattr(torch, dtype)
    )


@contextmanager
def _run_with_cache(run: Run) -> Iterator[Passes]:
    names = {site: site.replace(".resid", ".hook_resid") for site in resid_post(run.n_layers)}
    options = {"names_filter": list(names.values()), "return_cache_object": False}

    def decode(prompts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        caches, tokens, memory = [], prompts, {"use_cache": True}
        for _ in range(run.workload.n_new):
            output, cache = run.model.run_with_cache(
                tokens, return_type="logits_and_cache", **memory, **options
            )
            caches.append(cache)
            logits, past = output
            tokens, memory = logits[:, -1].argmax(-1, keepdim=True), {"past_key_values": past}
        return caches

    def step(number: int, prompts: torch.Tensor) -> None:
        if run.workload.phase == "prefill":
            caches = [run.model.run_with_cache(prompts, use_cache=False, **options)[1]]
        else:
            caches = decode(prompts)
        tensors = {site: torch.cat([cache[name] for cache in caches], 1) for site, name in names.items()}
        save_file(tensors, run.path / f"{number:05}.safetensors")

    yield each(step)


SYSTEMS = {
    "TransformerLens `run_with_cache`, safetensors": System(
        session=_run_with_cache,
        reader="safetensors",
        load=_load,
        note="computes attention eagerly; generates by a loop of its own, as `generate` returns the cache of one "
        "sequence only, after another forward pass over it",
    )
}

if __name__ == "__main__":
    serve(SYSTEMS, ["transformer-lens", "torch", "transformers", "safetensors"])
