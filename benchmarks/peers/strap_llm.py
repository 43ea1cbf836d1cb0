"""STRAP-LLM (llm-instrumentation): its stream files, as documented and handed the list of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from llm_instrumentation import HookGranularity, InstrumentationConfig, InstrumentationFramework

from benchmarks.peers.worker import Passes, Run, System, each, serve

__all__ = ["SYSTEMS"]


@contextmanager
def _stream(run: Run, *, codec: str, is_given_blocks: bool) -> Iterator[Passes]:
    config = InstrumentationConfig(granularity=HookGranularity.FULL_TENSOR, compression_algorithm=codec)
    framework = InstrumentationFramework(config)
    framework.instrument_model(run.model.model.layers if is_given_blocks else run.model)
    with framework.capture_activations(str(run.path / "run.stream")):
        yield each(lambda number, prompts: run.workload.run(run.model, prompts))


def _system(codec: str, *, is_given_blocks: bool, note: str = "") -> System:
    session = partial(_stream, codec=codec, is_given_blocks=is_given_blocks)
    return System(session=session, reader=f"stream, {codec}", note=note)


SYSTEMS = {
    "STRAP-LLM, lz4, as documented": _system(
        "lz4",
        is_given_blocks=False,
        note="hooks the model and its direct children, of which only the head returns a tensor",
    ),
    "STRAP-LLM, lz4, given the blocks": _system("lz4", is_given_blocks=True, note="stores float16"),
    "STRAP-LLM, none, given the blocks": _system("none", is_given_blocks=True, note="stores float16"),
}

if __name__ == "__main__":
    serve(SYSTEMS, ["llm-instrumentation", "torch", "transformers"])
