"""Text from a model cannot drive a terminal, and stays readable."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strapfmt.text import shown_path, visible, with_shown_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("été 日本 🐍", "été 日本 🐍"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\u200b\u2028\ufeff", "\\u200b\\u2028\\ufeff"),
        ("\U000e0001", "\\U000e0001"),
        ("\ud800", "\\ud800"),
        ("C:\\new", "C:\\\\new"),
    ],
)
def test_control_and_direction_characters_are_written_as_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(("text", "shown"), [("abcde", "abcde"), ("abcdef", "abcd…"), ("\n\n\n", "\\n\\n…")])
def test_long_text_is_cut_with_an_ellipsis(text: str, shown: str) -> None:
    assert visible(text, 5) == shown


@given(st.text(st.characters(codec=None)))
def test_result_is_printable_and_stands_for_one_text_only(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    ascii_only = "".join(c if ord(c) < 128 else f"\\U{ord(c):08x}" for c in shown)
    assert ascii_only.encode().decode("unicode_escape") == text


@given(st.text(st.characters(codec=None)), st.integers(1, 12))
def test_cut_text_keeps_to_its_limit(text: str, limit: int) -> None:
    assert len(visible(text, limit)) <= limit


def test_a_path_is_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "a\x1b.strap"
    monkeypatch.chdir(tmp_path)
    assert shown_path(path) == "sub/a\\x1b.strap"
    (tmp_path / "sub" / "gone").mkdir(parents=True)
    monkeypatch.chdir("sub/gone")
    assert shown_path(path) == f"{tmp_path}/sub/a\\x1b.strap"
    (tmp_path / "sub" / "gone").rmdir()
    assert shown_path(path) == f"{tmp_path}/sub/a\\x1b.strap"


def test_paths_in_a_message_are_shown_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        f"{tmp_path}/a.strap: gone, '{tmp_path}/b' too; not /else{tmp_path}/c, {tmp_path}x/d or {tmp_path}"
    )
    assert with_shown_paths(message) == (
        f"a.strap: gone, 'b' too; not /else{tmp_path}/c, {tmp_path}x/d or {tmp_path}"
    )
