"""Runs benchmarks: `python -m benchmarks [QUESTION ...] [--quick]`; each prints its answer and stores it as JSON."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Settings

__all__ = ["QUESTIONS", "main"]

#: The modules that hold them, in the order they run.
QUESTIONS = ("write", "read", "open", "commit_interval", "batch_size", "step", "sql", "capture_overhead")


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"all by default: {', '.join(QUESTIONS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (7; 2 with --quick)")
    parser.add_argument(
        "--directory", type=Path, default=Path("build/benchmarks"), help="the disk to measure"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--no-peers", action="store_true", help="leave others out")
    parser.add_argument(
        "--peers-directory",
        type=Path,
        default=Settings().peers_directory,
        help="environments of peers that exclude one another, made there when they are first needed",
    )
    given = parser.parse_args(arguments)
    settings = Settings(
        is_quick=given.quick,
        rounds=given.rounds or (2 if given.quick else 7),
        directory=given.directory,
        peers=not given.no_peers,
        peers_directory=given.peers_directory,
    )
    if unknown := set(given.questions) - set(QUESTIONS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    for question in given.questions or QUESTIONS:
        report = import_module(f"benchmarks.{question}").measure(settings)
        print(f"{question}: {report}\n", flush=True)
        report.save(given.results / f"{question}.json", settings)


if __name__ == "__main__":
    main()
