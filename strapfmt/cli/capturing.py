"""The command `capture`: run prompts through a Hugging Face model and store chosen activations."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from strapfmt.cli.app import JsonOption, check_new
from strapfmt.cli.models import Generation, LanguageModel, load
from strapfmt.cli.output import console, notes, print_json
from strapfmt.errors import ArgumentError
from strapfmt.report import size_text
from strapfmt.text import visible

__all__ = ["capture", "capture_prompts", "read_prompts"]

_PROMPT_CHARS, _CONTINUATION_CHARS = 200, 400


def capture(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The dataset to write, NAME.strap.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="'demo', a folder, or a name on the Hugging Face hub such as gpt2."
        ),
    ] = "demo",
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; repeat for more.", show_default=False)
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="One prompt per line; in a .jsonl file a string or {'prompt': ...} per line; - is stdin.",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Sites or module paths to store; repeat for more. [default: blocks.*.resid_post]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Tokens to generate after each prompt; 0 only reads the prompts."
        ),
    ] = 32,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts in one forward pass.")] = 8,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="With --do-sample. [default: 1.0]", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="X", help="With --do-sample. [default: 1.0]", show_default=False),
    ] = None,
    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of a beam search.")] = 1,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of torch's random numbers.")] = 0,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Run the model in this dtype: auto, bfloat16, float32, ...")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit on the hub.", show_default=False),
    ] = None,
    codec: Annotated[
        str, typer.Option(metavar="none|lz4|zstd", help="How it is stored; none is the fastest to read.")
    ] = "none",
    on_full: Annotated[
        str,
        typer.Option(
            metavar="block|drop|raise",
            help="What to do when the disk cannot keep up; drop leaves out whole steps.",
        ),
    ] = "block",
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Stored with every sequence; repeat for more.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset at OUT.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to the dataset at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run prompts through a model and store its activations."""
    if overwrite and append:
        raise ArgumentError("--overwrite and --append: choose one")
    for option, given in (("--temperature", temperature), ("--top-p", top_p)):
        if given is not None and not do_sample:
            raise ArgumentError(f"{option} means nothing without --do-sample: add it, or leave {option} out")
    prompts = [*(prompt or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not prompts:
        raise ArgumentError("nothing to run: give --prompt or --prompts-file")
    generation = Generation(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        num_beams=num_beams,
        seed=seed,
    )
    mode = "overwrite" if overwrite else "append" if append else "create"
    check_new(out, mode, "--overwrite replaces it, --append adds to it")
    language_model = load(model, revision=revision, dtype=dtype, device=device)
    result = capture_prompts(
        language_model,
        out,
        prompts,
        generation,
        sites=sites or ["blocks.*.resid_post"],
        codec=codec,
        on_full=on_full,
        tags=_tags(tag or []),
        mode=mode,
    )
    if as_json:
        print_json(result)
    else:
        _show(result)


def read_prompts(file: str) -> list[str]:
    """Return the prompts of a file, or of stdin for `-`; empty lines are left out.

    Raises
    ------
    ArgumentError
        If it is not UTF-8, or a line of a `.jsonl` file is neither a string nor an object with `prompt` or `text`.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: expected UTF-8 text: {error}") from error
    except OSError as error:
        raise ArgumentError(f"--prompts-file {file}: {error.strerror}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not file.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    return [_prompt_of_json(line, f"{file}:{number}") for number, line in lines]


def _prompt_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where}: not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ArgumentError(f"{where}: expected a string, or an object with 'prompt' or 'text'")
    return value


def _tags(pairs: Sequence[str]) -> dict[str, str]:
    tags = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ArgumentError(f"--tag: expected KEY=VALUE, got {pair!r}")
        tags[key] = value
    return tags


def capture_prompts(
    language_model: LanguageModel,
    out: Path,
    prompts: Sequence[str],
    generation: Generation,
    *,
    sites: Sequence[str],
    codec: str,
    on_full: str,
    tags: dict[str, str],
    mode: str,
) -> dict[str, Any]:
    """Run prompts under capture and return what happened, ready for JSON."""
    import strapfmt

    n_tokens = sum(language_model.count_tokens(prompts, generation))
    recording = strapfmt.capture(
        language_model.model,
        out,
        sites=sites,
        tokenizer=language_model.tokenizer,
        codec=codec,
        on_full=on_full,  # type: ignore[arg-type]  # checked there
        tags=tags,
        mode=mode,  # type: ignore[arg-type]
    )
    estimate = recording.estimate(n_tokens)
    notes().print(f"at most {n_tokens:,} tokens, about {size_text(estimate.n_bytes)} before any codec")
    started = time.monotonic()
    with recording:
        generations = list(language_model.run(prompts, generation))
    return {
        "report": recording.report.to_dict(),
        "generations": [{"prompt": prompt, "continuation": new} for prompt, new in generations],
        "duration_s": time.monotonic() - started,
    }


def _show(result: dict[str, Any]) -> None:
    for entry in result["generations"]:
        continuation = visible(entry["continuation"], _CONTINUATION_CHARS)
        console().print(Text.assemble((visible(entry["prompt"], _PROMPT_CHARS), "bold"), continuation))
