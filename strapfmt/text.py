"""Owns how text from a model is shown to a person: never as raw control or direction characters."""

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["shown_path", "table_of", "visible", "with_shown_paths"]

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


def visible(text: str, max_chars: int | None = None) -> str:
    r"""Return `text` with every character a terminal would act on written as an escape.

    Control characters (an ESC starts terminal commands), line and paragraph separators, bidirectional
    overrides, zero-width characters, unassigned code points and lone surrogates become `\n`, `\x1b`,
    `\u202e` and so on; a backslash becomes two, so that the result stands for one text only. Printable
    characters of every script stay as they are.

    Parameters
    ----------
    text : str
        Any text, such as that of one token.
    max_chars : int, optional
        Show at most this many characters; a longer text ends in `…`.

    Returns
    -------
    str
        One line of printable characters.
    """
    if text.isprintable() and "\\" not in text:
        shown = text
    else:
        if max_chars is not None:
            text = text[: max_chars + 1]  # an escape is never shorter than what it stands for
        shown = "".join(map(_visible_character, text))
    if max_chars is not None and len(shown) > max_chars:
        return shown[: max(max_chars - 1, 0)] + "…"
    return shown


def shown_path(path: str | Path) -> str:
    """Return a path as a person wants to see it: below the working directory from there, else whole; escaped."""
    try:
        return visible(str(Path(path).relative_to(Path.cwd())))
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return visible(str(path))


def with_shown_paths(message: str) -> str:
    """Return a message with the paths below the working directory as seen from there."""
    try:
        here = str(Path.cwd())
    except OSError:  # it is gone
        return message
    return re.sub(rf"(?<![\w./-]){re.escape(here)}/(?=[^\s/])", "", message)


def _visible_character(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if character.isprintable():
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns of safe text: a header line, then a line a row."""
    cells = [list(header), *([visible(cell, 60) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
