"""Runs the command line as `python -m strapfmt.cli`."""

from strapfmt.cli import main

main()
