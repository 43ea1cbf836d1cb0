"""Every command: what it prints for people and programs, its exit codes, and that the documentation names it all."""

import csv
import fcntl
import io
import json
import logging
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import strapfmt
from strapfmt.cli import app, demo, main, models
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

DOCS = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
COMMANDS = {command.callback.__name__: command for command in app.registered_commands if command.callback}
TOKENS = ["plain", "a\x1b[31m", "[red]b", "\u202ex", "\n", " the"]
SITE = "blocks.0.resid_post"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout."""
        return json.loads(self.out, parse_constant=pytest.fail)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return run


def write_dataset(path: Path) -> Path:
    """Write six tokens with hostile text, a bfloat16 site, a ragged one, and one that numbers its own rows."""
    n = len(TOKENS)
    with DatasetWriter(path, provenance={"model": "made by hand"}) as writer:
        writer.add_site(
            SiteSpec(name=SITE, dtype="bfloat16", shape=(8,), statistics=("l2_norm", "n_nonfinite"))
        )
        writer.add_site(SiteSpec(name="ragged", dtype="float32", shape=(2, -1), statistics=()))
        writer.add_site(
            SiteSpec(name="own", dtype="float16", shape=(3,), row_space="own", statistics=("mean",))
        )
        first = writer.reserve("row", n)
        rows = np.arange(first, first + n)
        step, sequence = writer.reserve("step", 1), writer.reserve("sequence", 1)
        values = torch.arange(n * 8.0).reshape(n, 8).bfloat16()
        statistics = {
            "l2_norm": np.arange(1, n + 1, dtype=np.float32),
            "n_nonfinite": np.zeros(n, np.int32),
        }
        writer.write(SITE, values.view(torch.uint16).numpy(), rows=rows, statistics=statistics)
        shapes = np.array([[2, i + 1] for i in range(n)], np.int32)
        ragged = np.arange(int(shapes.prod(axis=1).sum()), dtype=np.float32)
        writer.write("ragged", ragged, rows=rows, shapes=shapes, statistics={})
        writer.write(
            "own",
            np.ones((2, 3), np.float16),
            token_row=np.array([3, -1]),
            call=np.int64(0),
            statistics={"mean": np.array([np.nan, np.inf], np.float32)},
        )
        columns = {
            "row": rows,
            "step": np.full(n, step),
            "phase": ["prefill"] * (n - 1) + ["decode"],
            "batch_index": np.zeros(n, np.int32),
            "sequence_id": np.full(n, sequence),
            "position": np.arange(n, dtype=np.int32),
            "token_id": np.arange(n, dtype=np.int32),
            "token": TOKENS,
            "is_special": [False] * n,
            "parent_row": [None, *rows[:-1].tolist()],
            "dropped": [False] * n,
        }
        writer.write_table("tokens", columns)
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "made.strap")


def on_terminal(*arguments: object, width: int, cwd: Path | None = None) -> str:
    """Run a command on a terminal that is so wide; return what it shows, without styles."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    program = [sys.executable, "-m", "strapfmt", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        program, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env={**environment, "TERM": "xterm"}
    ):
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            shown += part
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


# Documentation.


def sections() -> dict[str, str]:
    """Return the text of docs/cli.md below each heading `## strapfmt COMMAND`."""
    parts = re.split(r"^## strapfmt (\w+)$", DOCS.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options_of(command: str) -> list[str]:
    """Return the long options of a command, `--json` and `--help` left out."""
    import typer.main

    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
    return [name for name in names if name not in {"--json", "--help"}]


def test_documentation_has_a_section_for_each_command_and_no_other() -> None:
    assert list(sections()) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_documentation_names_every_option(command: str) -> None:
    assert [name for name in options_of(command) if f"`{name}" not in sections()[command]] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_json(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert (outcome.code, "--json" in outcome.out) == (0, True)


def test_list_of_commands_has_room_for_what_each_one_does(run: Run) -> None:
    lines = run("--help").out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


def examples() -> Iterator[str]:
    """Yield the commands of the console blocks of docs/cli.md, in order."""
    for block in re.findall(
        r"^```console\n(.*?)^```", DOCS.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        yield from (line[2:] for line in block.splitlines() if line.startswith("$ "))


def test_every_example_in_the_documentation_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commands = list(examples())
    assert {shlex.split(command.rpartition("| ")[2])[1] for command in commands} == set(COMMANDS)
    for command in commands:
        feed, _, rest = command.rpartition(" | ")
        stdin = subprocess.run(["sh", "-c", feed], capture_output=True, text=True, check=True).stdout
        outcome = run(*shlex.split(rest)[1:], stdin=stdin)
        assert outcome.code == 0, f"{command}\n{outcome.err}"
        assert "Warning" not in outcome.err
        if "--json" in command:
            assert outcome.json


# Reading.


def test_info_tells_sites_ranks_and_provenance(run: Run, dataset: Path) -> None:
    document = run("info", dataset, "--json").json
    assert document["is_clean"] is True
    assert document["n_tokens"] == len(TOKENS)
    assert [(site["name"], site["n_rows"], site["row_space"]) for site in document["sites"]] == [
        (SITE, 6, "tokens"),
        ("ragged", 6, "tokens"),
        ("own", 2, "own"),
    ]
    assert document["ranks"][0]["sessions"][0]["model"] == "made by hand"
    shown = run("info", dataset)
    assert shown.code == 0
    assert "2x?" in shown.out
    assert "made by hand" in shown.out


def test_info_says_when_a_dataset_was_not_closed(run: Run, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "open.strap")
    try:
        outcome = run("info", tmp_path / "open.strap")
    finally:
        writer.abort()
    assert outcome.code == 0
    assert "NOT closed: a writer is at work, or it crashed, and nothing is committed" in outcome.out


def test_of_a_site_without_rows_info_and_verify_say_that_nothing_is_committed(
    run: Run, tmp_path: Path
) -> None:
    writer = DatasetWriter(tmp_path / "open.strap")
    writer.add_site(SiteSpec(name="s", dtype="float32", shape=(2,), row_space="tokens"))
    writer.commit()
    try:
        shown = {name: run(name, tmp_path / "open.strap").out for name in ("info", "verify")}
    finally:
        writer.abort()
    assert all("nothing is committed" in text for text in shown.values())


def test_head_shows_tokens(run: Run, dataset: Path) -> None:
    rows = run("head", dataset, "-n", 2, "--json").json
    assert [row["token"] for row in rows] == TOKENS[:2]


def test_head_of_a_site_shows_decoded_activations_beside_tokens(run: Run, dataset: Path) -> None:
    rows = run("head", dataset, SITE, "-n", 2, "--json").json
    assert rows[1]["token"] == TOKENS[1]
    assert rows[1]["activation"] == [8, 9, 10, 11, 12, 13, 14, 15]
    assert rows[1]["l2_norm"] == 2


def test_head_of_a_ragged_site_shows_shapes(run: Run, dataset: Path) -> None:
    rows = run("head", dataset, "ragged", "-n", 2, "--json").json
    assert [(row["shape"], row["activation"]) for row in rows] == [([2, 1], [0, 1]), ([2, 2], [2, 3, 4, 5])]


def test_head_of_a_site_with_own_rows_follows_token_row(run: Run, dataset: Path) -> None:
    rows = run("head", dataset, "own", "--json").json
    assert [(row["token_row"], row["token"]) for row in rows] == [(3, TOKENS[3]), (None, None)]
    assert run("head", dataset, "own").code == 0


def test_json_writes_nan_and_infinity_as_strings(run: Run, dataset: Path) -> None:
    assert [row["mean"] for row in run("head", dataset, "own", "--json").json] == ["NaN", "Infinity"]


def test_stats_summarise_stored_statistics(run: Run, dataset: Path) -> None:
    rows = run("stats", dataset, "--json").json
    assert [row["site"] for row in rows] == [SITE, "ragged", "own"]
    assert (rows[0]["l2_norm_min"], rows[0]["l2_norm_mean"], rows[0]["l2_norm_max"]) == (1, 3.5, 6)
    assert rows[0]["n_nonfinite"] == 0
    assert rows[1]["l2_norm_mean"] is None
    assert len(run("stats", dataset, SITE, "--json").json) == 1
    assert run("stats", dataset).code == 0


def test_sql_prints_json_csv_and_tables(run: Run, dataset: Path) -> None:
    query = "SELECT position, token FROM tokens WHERE position IN (0, 5) ORDER BY position"
    assert run("sql", dataset, query, "--json").json == [
        {"position": 0, "token": "plain"},
        {"position": 5, "token": " the"},
    ]
    assert run("sql", dataset, query, "--format", "json").json == run("sql", dataset, query, "--json").json
    assert run("sql", dataset, query, "--format", "csv").out == "position,token\n0,plain\n5, the\n"
    assert run("sql", dataset, query).out.split() == ["position", "token", "0", "plain", "5", "the"]


def test_sql_reads_a_query_from_stdin(run: Run, dataset: Path) -> None:
    assert run("sql", dataset, "-", "--json", stdin="SELECT count(*) AS n FROM tokens").json == [{"n": 6}]


def test_sql_csv_keeps_text_and_lists_whole(run: Run, dataset: Path) -> None:
    query = f'SELECT token, activation FROM tokens JOIN "{SITE}" USING (row) ORDER BY row'
    outcome = run("sql", dataset, query, "--format", "csv")
    rows = list(csv.reader(io.StringIO(outcome.out)))[1:]
    assert [row[0] for row in rows] == TOKENS
    assert json.loads(rows[5][1]) == [40, 41, 42, 43, 44, 45, 46, 47]


def test_sql_csv_writes_times_and_blobs_as_plain_text(run: Run, dataset: Path) -> None:
    query = (
        "SELECT TIMESTAMP '2026-01-02 03:04:05' AS at, DATE '2026-01-02' AS day, 'ab'::BLOB AS raw, "
        "1.50::DECIMAL(4, 2) AS price, NULL AS nothing, true AS yes, 'x, \"y\"' AS text, [1, 2] AS list"
    )
    outcome = run("sql", dataset, query, "--format", "csv")
    ((*plain, text, many),) = list(csv.reader(io.StringIO(outcome.out)))[1:]
    assert plain == ["2026-01-02T03:04:05", "2026-01-02", "6162", "1.50", "", "True"]
    assert (text, json.loads(many)) == ('x, "y"', [1, 2])


def test_sql_table_says_how_many_rows_it_left_out(run: Run, dataset: Path) -> None:
    outcome = run("sql", dataset, "SELECT row FROM tokens", "--max-rows", 2)
    assert len(outcome.out.splitlines()) == 3
    assert "2 of 6 rows" in outcome.err


def test_tables_never_send_control_or_direction_characters(run: Run, dataset: Path) -> None:
    for arguments in (
        ["head", dataset],
        ["head", dataset, SITE],
        ["sql", dataset, "SELECT token FROM tokens"],
    ):
        shown = run(*arguments).out
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "a\\x1b[31m" in shown
        assert "[red]b" in shown, "text is not markup"


def test_a_table_in_a_pipe_folds_and_cuts_no_name(run: Run, dataset: Path) -> None:
    names = [f"a_column_with_a_rather_long_name_{number}" for number in range(9)]
    columns = ", ".join(f"{number}1234567890 AS {name}" for number, name in enumerate(names))
    head, row = run("sql", dataset, f"SELECT {columns}").out.splitlines()
    assert head.split() == names
    assert row.split() == [f"{number or ''}1234567890" for number in range(9)]


@pytest.mark.parametrize("command", [["info"], ["head"], ["head", SITE], ["stats"]])
def test_a_narrow_terminal_leaves_out_columns_and_says_which(dataset: Path, command: list[str]) -> None:
    name, *site = command
    wide, narrow = (on_terminal(name, dataset, *site, width=width) for width in (200, 50))
    assert "no room for" not in wide
    flat = " ".join(narrow.split())
    (left_out,) = re.findall("no room for: (.*?); a wider terminal or --json shows all", flat)
    (heads,) = (re.split("  +", line) for line in wide.splitlines() if line.startswith(("site ", "row ")))
    table = re.split(r"^(?=site |row )", narrow.partition("no room for")[0], flags=re.MULTILINE)[
        1
    ].splitlines()
    shown = re.split("  +", table[0])
    assert [head for head in heads if head in shown] == shown
    assert sorted([*shown, *left_out.split(", ")]) == sorted(heads)
    assert all(len(line) <= 50 for line in table)


def test_sql_tells_null_from_text(run: Run, dataset: Path) -> None:
    shown = run("sql", dataset, "SELECT NULL AS a, '-' AS b, [NULL, 1] AS c").out
    assert shown.splitlines()[1].split() == ["NULL", "-", "[NULL,", "1]"]


def test_sql_shows_a_plan_as_it_is_drawn(run: Run, dataset: Path) -> None:
    shown = run("sql", dataset, "EXPLAIN SELECT * FROM tokens").out
    assert "explain_key" not in shown
    assert "\\n" not in shown
    assert len(shown.splitlines()) > 3


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 rows"), (1, "1 row"), (6, "6 rows"), (1234, "100 of 1,234 rows shown")]
)
def test_sql_says_on_stderr_how_many_rows_there_are(run: Run, dataset: Path, n: int, said: str) -> None:
    outcome = run("sql", dataset, f"SELECT a.x FROM range({n}) a(x)")
    assert len(outcome.out.splitlines()) == 1 + min(n, 100)
    assert outcome.err.startswith(said)
    assert run("sql", dataset, f"SELECT a.x FROM range({n}) a(x)", "--json").err == ""


def test_head_of_nothing_says_so(run: Run, tmp_path: Path) -> None:
    DatasetWriter(tmp_path / "empty.strap").close()
    outcome = run("head", tmp_path / "empty.strap")
    assert (outcome.out, outcome.err) == ("", "0 rows\n")


def test_json_and_csv_write_times_and_infinities_alike(run: Run, dataset: Path) -> None:
    query = (
        "SELECT TIMESTAMPTZ '2026-01-02 03:04:05+00' AS at, TIMESTAMP '2026-01-02 03:04:05' AS here, "
        "DATE '2026-01-02' AS day, 'inf'::FLOAT AS inf, '-inf'::DOUBLE AS down, 'nan'::FLOAT AS nan"
    )
    (row,) = run("sql", dataset, query, "--json").json
    ((*cells,),) = list(csv.reader(io.StringIO(run("sql", dataset, query, "--format", "csv").out)))[1:]
    assert list(row.values()) == cells
    assert re.fullmatch(r"2026-01-0\dT\d\d:04:05[+-]\d\d:\d\d", row["at"])
    assert cells[1:] == ["2026-01-02T03:04:05", "2026-01-02", "Infinity", "-Infinity", "NaN"]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", [2**53 + 1, -(2**63)]),
        ("uint8", [0, 255]),
        ("bool", [True, False]),
    ],
)
def test_head_keeps_whole_numbers_exact(run: Run, tmp_path: Path, dtype: str, values: list[int]) -> None:
    with strapfmt.create(tmp_path / "whole.strap", stats=False) as recorder:
        recorder.write("ids", torch.tensor([values], dtype=getattr(torch, dtype)), tokens={"token_ids": [1]})
    (row,) = run("head", tmp_path / "whole.strap", "ids", "--json").json
    assert row["activation"] == values
    assert [type(value) for value in row["activation"]] == [type(value) for value in values]


def test_info_tells_when_first_and_leaves_out_what_is_not_known(run: Run, tmp_path: Path) -> None:
    facts = {
        "outcome": {"fill": 0.0023107528686523438, "rank": None},
        "options": {"host_ring_bytes": 1 << 28},
    }
    DatasetWriter(tmp_path / "a.strap", provenance={**facts, "nothing": None}).close()
    DatasetWriter(tmp_path / "a.strap", mode="append").close()
    lines = run("info", tmp_path / "a.strap").out.splitlines()
    keys = [line.split(":")[0].strip() for line in lines if line.startswith("  ")]
    assert keys == ["session 0", "started", "ended", "outcome", "options", "session 1", "started", "ended"]
    assert "  outcome: fill 0.00231" in lines
    assert "  options: host_ring_bytes 256.0 MiB" in lines


def test_info_cuts_no_line_in_a_pipe_and_wraps_at_words_on_a_terminal(run: Run, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    DatasetWriter(tmp_path / "a.strap", provenance={"note": words}).close()
    assert f"  note: {words}" in run("info", tmp_path / "a.strap").out.splitlines()
    shown = on_terminal("info", tmp_path / "a.strap", width=60)
    assert words in " ".join(shown.split())
    assert all(len(line) <= 60 for line in shown.splitlines() if "word" in line)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_arguments_and_values_as_the_documentation_does(run: Run, command: str) -> None:
    shown = run(command, "--help").out
    assert not re.search(r"[{}]|<\w|\[\[|range", shown.replace("{'prompt': ...}", ""))
    assert re.search(r"DATASET|DIRECTORY|OUT|PATH", shown)


# Checking.


def flip_last_byte_of_data(dataset: Path) -> Path:
    """Damage one activation's bytes."""
    shard = next(dataset.rglob(f"sites/{SITE}/*.arrow"))
    reader = strapfmt.open(dataset)
    data = bytearray(shard.read_bytes())
    place = data.find(reader[SITE].tensor()[-1].view(torch.uint16).numpy().tobytes())
    assert place > 0
    data[place] ^= 1
    shard.write_bytes(data)
    return shard


def test_verify_accepts_a_sound_dataset(run: Run, dataset: Path) -> None:
    assert run("verify", dataset).code == 0
    document = run("verify", dataset, "--json").json
    assert (document["valid"], document["problems"]) == (True, [])


def test_verify_finds_damage_and_exits_with_one(run: Run, dataset: Path) -> None:
    shard = flip_last_byte_of_data(dataset)
    outcome = run("verify", dataset, "--json")
    assert outcome.code == 1
    assert outcome.json["valid"] is False
    assert any(shard.name in problem for problem in outcome.json["problems"])
    assert run("verify", dataset).code == 1


def test_stats_read_no_tensor(run: Run, dataset: Path) -> None:
    flip_last_byte_of_data(dataset)
    outcome = run("stats", dataset, SITE, "--json")
    assert outcome.code == 0
    assert outcome.json[0]["l2_norm_max"] == 6


def test_stats_show_the_other_sites_if_one_cannot_be_read(run: Run, dataset: Path) -> None:
    lost = next(dataset.rglob(f"sites/{SITE}/*.arrow"))
    lost.unlink()
    outcome = run("stats", dataset)
    assert outcome.code == 1
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["site", "ragged", "own"]
    assert str(lost) in outcome.err
    document = run("stats", dataset, "--json").json
    assert [bool(row["problem"]) for row in document] == [True, False, False]


def test_stats_name_what_was_done_over_rows(run: Run, dataset: Path) -> None:
    outcome = run("stats", dataset)
    head = re.split("  +", outcome.out.splitlines()[0])
    assert head[2:] == [
        *("l2_norm mean", "l2_norm min", "l2_norm max", "mean mean", "std mean", "abs_max max"),
        "non-finite",
    ]
    assert "over rows" in outcome.err


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_reports_have_absolute_paths_in_json_and_show_those_from_here(
    run: Run, dataset: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(dataset.parent)
    flip_last_byte_of_data(dataset)
    out = [["a.strap"], ["b.strap"]] if command == "repair" else [[], []]
    document = run(command, dataset.name, *out[0], "--json").json
    assert document["path"] == str(dataset)
    assert f"{dataset}/rank-00000/" in json.dumps(document)
    shown = run(command, dataset.name, *out[1]).out
    assert "problem: made.strap/rank-00000/" in shown
    assert str(dataset.parent) not in shown


def test_repair_shows_its_progress_on_a_terminal(dataset: Path) -> None:
    assert "rescuing" in on_terminal("repair", dataset, dataset.with_name("b.strap"), width=80)


def test_repair_writes_a_sound_copy_and_says_when_rows_were_lost(run: Run, dataset: Path) -> None:
    whole = dataset.with_name("whole.strap")
    assert run("repair", dataset, whole).code == 0
    assert run("verify", whole).code == 0
    flip_last_byte_of_data(dataset)
    part = dataset.with_name("part.strap")
    outcome = run("repair", dataset, part, "--json")
    assert outcome.code == 1
    assert outcome.json["is_complete"] is False
    assert run("verify", part).code == 0


# Capturing.


def capture_arguments(out: Path, *more: str) -> list[object]:
    """Return a short capture of two prompts of different lengths."""
    prompts = ["--prompt", "Return a list of", "--prompt", "Open"]
    return ["capture", out, *prompts, "--max-new-tokens", "4", "--sites", SITE, *more]


def test_capture_stores_every_token_and_leaves_the_model_as_it_was(run: Run, tmp_path: Path) -> None:
    outcome = run(*capture_arguments(tmp_path / "run.strap", "--tag", "split=test", "--json"))
    assert outcome.code == 0
    language_model = models.load("demo")
    generation = models.Generation(batch_size=8, max_new_tokens=4)
    plain = list(language_model.run(["Return a list of", "Open"], generation))
    assert [(entry["prompt"], entry["continuation"]) for entry in outcome.json["generations"]] == plain
    with strapfmt.open(tmp_path / "run.strap") as ds:
        n_tokens = language_model.count_tokens(["Return a list of", "Open"], generation)
        assert len(ds.tokens) == sum(n_tokens) - 2, "the last generated token has no activation"
        assert ds[SITE].n_rows == len(ds.tokens)
        assert [json.loads(tags) for (tags,) in ds.sql("SELECT tags FROM sequences")] == [
            {"split": "test"}
        ] * 2


def test_capture_without_generation_reads_the_prompts(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"One prompt"\n\n{"text": "Another"}\n{"prompt": "A third\\nof two lines"}\n')
    outcome = run(
        "capture", tmp_path / "run.strap", "--prompts-file", prompts, "--max-new-tokens", 0, "--json"
    )
    assert [entry["prompt"] for entry in outcome.json["generations"]] == [
        "One prompt",
        "Another",
        "A third\nof two lines",
    ]
    with strapfmt.open(tmp_path / "run.strap") as ds:
        assert ds.sql("SELECT DISTINCT phase FROM tokens").fetchall() == [("prefill",)]
        assert len(ds.names) == 4


def test_capture_refuses_an_existing_dataset_then_appends_or_replaces(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run.strap"
    assert run(*capture_arguments(out)).code == 0
    refused = run(*capture_arguments(out))
    assert refused.code == 2
    assert f"error: {out} exists already: --overwrite replaces it" in refused.err

    def count() -> int:
        with strapfmt.open(out) as ds:
            return len(ds.tokens)

    n = count()
    assert run(*capture_arguments(out, "--append")).code == 0
    assert count() == 2 * n
    assert run(*capture_arguments(out, "--overwrite")).code == 0
    assert count() == n


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sites", "blocks.0.resid_pots"], "resid_post"),
        (["--tag", "novalue"], "KEY=VALUE"),
        (["--overwrite", "--append"], "choose one"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--dtype", "int3"], "dtype"),
        (["--codec", "gzip"], "codec"),
        (["--prompts-file", "/no/such/file"], "/no/such/file"),
        (["--prompt", "x " * 600], "512 tokens"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_capture_input_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    outcome = run(*capture_arguments(tmp_path / "run.strap", *arguments))
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run.strap").exists()


def test_capture_without_a_prompt_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("capture", tmp_path / "run.strap")
    assert (outcome.code, "--prompt" in outcome.err) == (2, True)


def test_the_hub_s_retries_are_not_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def from_pretrained(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    outcome = run(*capture_arguments(tmp_path / "run.strap", "--model", "no/such"))
    assert outcome.code == 2
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["loading", "error:"]
    assert "no connection" in outcome.err


@pytest.mark.parametrize("command", ["demo", "capture"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("run", "'.strap'"),
        ("taken.strap", "--overwrite replaces it"),
        ("other.strap", "is no strapfmt dataset"),
        ("file/run.strap", "is a file"),
        ("file/deep/run.strap", "is a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str, said: str
) -> None:
    monkeypatch.setattr(models, "load", pytest.fail)
    monkeypatch.setattr(demo, "load", pytest.fail)
    DatasetWriter(tmp_path / "taken.strap").close()
    (tmp_path / "file").touch()
    (tmp_path / "other.strap" / "x").mkdir(parents=True)
    out = tmp_path / place
    arguments = ["demo", "--out", out] if command == "demo" else ["capture", out, "--prompt", "x"]
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert "Errno" not in outcome.err


def test_an_interrupted_demo_leaves_its_place_free(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_ask", interrupt)
    out = tmp_path / "a.strap"
    outcome = run("demo", "--out", out)
    assert outcome.code == 130
    assert f"removed the unfinished {out}" in outcome.err
    assert not out.exists()
    DatasetWriter(out).close()
    assert run("demo", "--out", out, "--overwrite").code == 130
    assert out.exists(), "what stood there before is not this run's to remove"


# Wrong input anywhere.


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "missing.strap"],
        ["verify", "missing.strap"],
        ["head", "made.strap", "blocks.0.resid_pots"],
        ["stats", "made.strap", "nope"],
        ["sql", "made.strap", "SELECT * FROM nope"],
        ["sql", "made.strap", "DROP TABLE tokens"],
        ["repair", "made.strap", "made.strap"],
        ["repair", "missing.strap", "new.strap"],
        ["repair", "made.strap", "made.strap/new.strap"],
        ["repair", "made.strap", "made.strap/rank-00000/manifest.json/new.strap"],
        ["info", "made.strap/rank-00000/manifest.json"],
        ["verify", "made.strap/rank-00000/manifest.json/x"],
        ["sql", "made.strap", "SELECT 1", "--format", "xml"],
    ],
)
def test_wrong_input_exits_with_two_and_a_clear_line(
    run: Run, dataset: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(dataset.parent)
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert "Errno" not in outcome.err
    assert str(dataset.parent) not in outcome.err, "paths are shown from the working directory"


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["info"], ["head", "x.strap", "-n", "0"], ["sql", "x.strap"]]
)
def test_wrong_usage_exits_with_two(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "Error" in outcome.err


def test_unknown_site_names_the_nearest(run: Run, dataset: Path) -> None:
    assert repr(SITE) in run("head", dataset, "blocks.0.resid_pots").err


def test_installed_program_runs_and_survives_a_closed_pipe(dataset: Path) -> None:
    program = [sys.executable, "-W", "error", "-m", "strapfmt"]
    version = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"strapfmt {strapfmt.__version__}\n"
    query = "SELECT a.row FROM range(200000) a(row)"
    command = f"{shlex.join([*program, 'sql', str(dataset), query, '--format', 'csv'])} | head -n 1"
    piped = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("row\n", "")


@pytest.mark.parametrize("options", [["--format", "csv"], ["--json"], ["--max-rows", "200000"]])
def test_a_closed_pipe_is_no_problem_found(dataset: Path, options: list[str]) -> None:
    query = "SELECT a.row FROM range(20000) a(row)"
    program = [sys.executable, "-m", "strapfmt", "sql", str(dataset), query, *options]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["head"]])
def test_a_full_disk_behind_stdout_is_named(dataset: Path, arguments: list[str]) -> None:
    program = [sys.executable, "-m", "strapfmt", *arguments, str(dataset)]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: writing to stdout: No space left on device\n"


def test_append_to_what_is_missing_speaks_of_options(run: Run, tmp_path: Path) -> None:
    outcome = run(*capture_arguments(tmp_path / "run.strap", "--append"))
    assert outcome.code == 2
    assert "leave out --append" in outcome.err
    assert "mode=" not in outcome.err


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_options_of_sampling_need_sampling(run: Run, tmp_path: Path, option: str) -> None:
    outcome = run(*capture_arguments(tmp_path / "run.strap", option, "0.5"))
    assert outcome.code == 2
    assert f"{option} means nothing without --do-sample" in outcome.err


def test_script_is_installed_under_its_name() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="strapfmt")
    assert script.load() is main
    assert shutil.which("strapfmt", path=str(Path(sys.executable).parent))
