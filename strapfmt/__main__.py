"""Runs the command line as `python -m strapfmt`."""

from strapfmt.cli import main

main()
