"""The command line: `strapfmt demo | capture | doctor | info | head | sql | verify | repair | stats`.

Commands import what they need when they run, so that `strapfmt --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from strapfmt.cli import capturing, checking, demo, doctor, reading, summaries
from strapfmt.cli.app import Command, app
from strapfmt.cli.output import told
from strapfmt.errors import StrapfmtError

__all__ = ["app", "main"]

for _command in (
    demo.demo,
    capturing.capture,
    doctor.doctor,
    summaries.info,
    reading.head,
    reading.sql,
    summaries.stats,
    checking.verify,
    checking.repair,
):
    app.command(cls=Command)(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 a problem was found, 2 wrong usage or input, 141 stdout's reader gone.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; default `sys.argv[1:]`.
    """
    try:
        app(args=arguments, prog_name="strapfmt")
    except (StrapfmtError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
