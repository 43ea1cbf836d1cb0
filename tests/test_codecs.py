"""Every codec passes the shared check, and an unknown one is named."""

from pathlib import Path

import pytest

from strapfmt.codecs import CODECS, get_codec
from strapfmt.errors import ArgumentError
from strapfmt.testing import check_codec


@pytest.mark.parametrize("name", CODECS)
def test_codec_keeps_bits_and_finds_damage(name: str, tmp_path: Path) -> None:
    check_codec(name, tmp_path)


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="none, lz4, zstd"):
        get_codec("brotli")
