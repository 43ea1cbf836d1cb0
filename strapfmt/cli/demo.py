"""The command `demo`: the whole of strapfmt on one small model, in under a minute and without a network."""

import importlib
import inspect
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from strapfmt.cli.app import JsonOption, check_new
from strapfmt.cli.latents import learn
from strapfmt.cli.models import Generation, LanguageModel, load
from strapfmt.cli.output import console, notes, print_json, printable
from strapfmt.cli.tables import print_table
from strapfmt.report import size_text
from strapfmt.text import shown_path, visible

__all__ = ["demo"]

PROMPTS = (
    "Return a list of",
    "Open a file and return",
    "Raise an error if the",
    "This module provides functions that",
)
READ_FROM = (
    "argparse",
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "email.message",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "random",
    "socket",
    "statistics",
    "subprocess",
    "tarfile",
    "textwrap",
    "zipfile",
)
N_READ_EACH = 10
READ_CHARS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with the SQL that answers it."""

    asks: str
    sql: str


def questions(layer: int) -> list[Question]:
    """Return the three questions, asked of the residual stream after block `layer`."""
    site = f'"blocks.{layer}.resid_post"'
    return [
        Question(
            asks=f"Which tokens make the longest activations after block {layer}?",
            sql=f"""\
SELECT token, count(*) AS n, round(avg(l2_norm), 1) AS mean_norm
FROM tokens JOIN {site} USING (row)
GROUP BY token HAVING n >= 3 ORDER BY mean_norm DESC LIMIT 6""",
        ),
        Question(
            asks="How does the residual stream grow, while reading and while writing?",
            sql="""\
SELECT site, round(avg(l2_norm) FILTER (phase = 'prefill'), 2) AS reading,
       round(avg(l2_norm) FILTER (phase = 'decode'), 2) AS writing
FROM stats JOIN tokens USING (row)
WHERE site LIKE '%.resid_post' AND NOT is_special
GROUP BY site ORDER BY length(site), site""",
        ),
        Question(
            asks=f"What is the longest word it wrote close to, by angle after block {layer}?",
            sql=f"""\
WITH word AS (
  SELECT token, activation FROM tokens JOIN {site} USING (row)
  WHERE phase = 'decode' AND regexp_matches(token, '^ [A-Za-z]+$')
  ORDER BY length(token) DESC, row LIMIT 1)
SELECT word.token AS word, other.token AS close_to,
       max(array_cosine_similarity(s.activation, word.activation)) AS cosine
FROM word, {site} s JOIN tokens other USING (row)
WHERE other.token <> word.token GROUP BY ALL ORDER BY cosine DESC LIMIT 6""",
        ),
    ]


def demo(
    out: Annotated[Path, typer.Option(metavar="PATH", help="The dataset to write.")] = Path("demo.strap"),
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="'demo', a folder, or a name on the Hugging Face hub such as gpt2."
        ),
    ] = "demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset at --out.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling and of the autoencoder.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show all of strapfmt on a small model, in under a minute.

    It captures the model that comes with strapfmt, asks SQL questions, trains a sparse autoencoder on the
    activations, and checks every byte. No network is needed.
    """
    check_new(out, "overwrite" if overwrite else "create", "--overwrite replaces it, --out writes another")
    to = notes() if as_json else console()
    with _gone_if_interrupted(out):
        document = _run(out, model, overwrite=overwrite, seed=seed, to=to)
    if as_json:
        print_json(document)
    if not document["verify"]["valid"]:
        raise typer.Exit(1)


@contextmanager
def _gone_if_interrupted(out: Path) -> Iterator[None]:
    """Remove what was made at `out` if Ctrl-C ends what happens inside, so that the next run finds the place free."""
    is_new = not os.path.lexists(out)
    try:
        yield
    except KeyboardInterrupt:
        if is_new and out.exists():
            shutil.rmtree(out)
            notes().print(f"stopped; removed the unfinished {shown_path(out)}")
        raise


def _run(out: Path, model: str, *, overwrite: bool, seed: int, to: Console) -> dict[str, Any]:
    """Run all parts and return what they found, ready for JSON."""
    started = time.monotonic()
    language_model = load(model)
    layers = int(language_model.model.config.num_hidden_layers)
    layer = layers // 2
    _introduce(language_model, to)
    recorded = _record(language_model, out, overwrite=overwrite, seed=seed, to=to)

    import strapfmt

    with strapfmt.open(out) as ds:
        answers = _ask(ds, layer, to)
        learned = _learn(ds, f"blocks.{layer}.resid_post", seed, to)
    verified = _check(out, to)
    _where_next(out, layer, time.monotonic() - started, to)
    return {
        "path": str(out.absolute()),
        **recorded,
        "questions": answers,
        "sae": learned,
        "verify": verified,
        "duration_s": time.monotonic() - started,
    }


def _step(title: str, to: Console) -> None:
    to.print()
    to.print(Rule(Text(title, style="bold"), align="left", style="dim"))


def _introduce(language_model: LanguageModel, to: Console) -> None:
    _step("1  A language model", to)
    model = language_model.model
    to.print(
        f"{type(model).__name__} {language_model.name!r}: {language_model.n_parameters:,} parameters, "
        f"{model.config.num_hidden_layers} blocks, width {model.config.hidden_size}, {str(model.dtype)[6:]}"
    )


def _record(
    language_model: LanguageModel, out: Path, *, overwrite: bool, seed: int, to: Console
) -> dict[str, Any]:
    """Capture prompts being continued and texts being read; show what was written."""
    import strapfmt

    _step("2  Capture, while it writes and reads documentation", to)
    texts = [text for text in _documentation() if language_model.n_tokens(text) <= language_model.max_tokens]
    started = time.monotonic()
    recording = strapfmt.capture(
        language_model.model,
        out,
        sites=["blocks.*.resid_post"],
        tokenizer=language_model.tokenizer,
        overwrite=overwrite,
        tags={"made_by": "strapfmt demo"},
        quiet=True,
    )
    with recording:
        read = Generation(batch_size=16, max_new_tokens=0)
        write = Generation(max_new_tokens=48, do_sample=True, temperature=0.7, seed=seed)
        for _ in language_model.run(texts, read):
            pass
        generations = list(language_model.run(PROMPTS, write))
    duration_s = time.monotonic() - started
    for prompt, continuation in generations:
        one_line = visible(continuation.replace("\n", " "), max(to.width - len(prompt) - 3, 8))
        to.print(Text.assemble(("  " + visible(prompt), "bold"), one_line))
    to.print(printable(str(recording.report)), soft_wrap=True)
    return {
        "capture": {"report": recording.report.to_dict(), "duration_s": duration_s},
        "generations": [{"prompt": prompt, "continuation": new} for prompt, new in generations],
    }


def _documentation() -> Iterator[str]:
    """Yield beginnings of docstrings of the standard library: text that is on every machine with Python."""
    for name in READ_FROM:
        members = vars(importlib.import_module(name))
        texts = [inspect.getdoc(members[key]) or "" for key in sorted(members) if key[0] != "_"]
        yield from [text[:READ_CHARS] for text in dict.fromkeys(texts) if len(text) >= 80][:N_READ_EACH]


def _ask(ds: Any, layer: int, to: Console) -> list[dict[str, Any]]:
    _step("3  Three questions in SQL", to)
    answers = []
    for question in questions(layer):
        started = time.monotonic()
        result = ds.sql(question.sql)
        duration_s = time.monotonic() - started
        to.print()
        to.print(Text(question.asks, style="bold"))
        to.print(_highlighted(question.sql))
        print_table(result.columns, result, to=to)
        to.print(Text(f"({duration_s * 1000:.0f} ms)", style="dim"))
        rows = [dict(zip(result.columns, row, strict=True)) for row in result]
        answers.append({"asks": question.asks, "sql": question.sql, "rows": rows, "duration_s": duration_s})
    return answers


def _highlighted(sql: str) -> Text:
    text = Syntax("", "sql", theme="ansi_dark").highlight(sql)
    text.rstrip()
    return Text("\n").join(Text("  ") + line for line in text.split("\n"))


def _learn(ds: Any, site: str, seed: int, to: Console) -> dict[str, Any]:
    _step("4  A sparse autoencoder, trained on what was captured", to)
    learned = learn(ds, site, seed=seed)
    to.print(
        f"{learned['n_latents']} latents, {learned['k']} for each activation of {site}; "
        f"{learned['n_activations']:,} activations seen in {learned['n_steps']} steps, {learned['duration_s']:.1f} s"
    )
    to.print(
        f"It explains {learned['fraction_explained']:.1%} of the variance; "
        f"{learned['n_dead']} latents are dead. A few of the others:"
    )
    print_table(
        ("latent", "fires on", "strongest at these [tokens]"),
        [
            (each["latent"], f"{each['share']:.1%}", _contexts(each["top"], to.width - 18))
            for each in learned["latents"]
        ],
        to=to,
    )
    return learned


def _contexts(top: Sequence[dict[str, Any]], room: int) -> Text:
    """Return the strongest tokens behind what comes before each, as many as there is room for, at least one."""
    shown = Text()
    for entry in top:
        each = Text.assemble(
            ("   " if shown else "") + visible(entry["before"]), (f"[{visible(entry['token'])}]", "bold")
        )
        if shown and cell_len(shown.plain + each.plain) > room:
            break
        shown.append_text(each)
    return shown


def _check(out: Path, to: Console) -> dict[str, Any]:
    import strapfmt

    _step("5  Every byte checked", to)
    started = time.monotonic()
    report = strapfmt.verify(out)
    to.print(printable(f"{report}, {time.monotonic() - started:.2f} s"), soft_wrap=True)
    return report.to_dict()


def _where_next(out: Path, layer: int, duration_s: float, to: Console) -> None:
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    _step(f"Done in {duration_s:.0f} s", to)
    to.print(f"{printable(str(out.resolve()))}: {size_text(n_bytes)} of plain Arrow files", soft_wrap=True)
    to.print("Go on with:")
    program, python = _command("strapfmt"), _command("python")
    place = shlex.quote(str(out))
    for line in (
        f"{program} info {place}",
        f"{program} head {place} blocks.{layer}.resid_post",
        f"{program} sql {place} 'SELECT phase, count(*) FROM tokens GROUP BY phase'",
        f"{program} capture gpt2.strap --model gpt2 --prompt 'The capital of France is'",
        f"{python} -c 'import strapfmt; print(strapfmt.open(\"{out}\").sites)'",
    ):
        to.print(f"  {line}", soft_wrap=True)


def _command(name: str) -> str:
    """Return how to call a program of this environment from here: its name, or its path if that finds another."""
    path = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not path.exists() or (found and Path(found).samefile(path)):
        return name
    return os.path.relpath(path)
