"""The registry of codecs: how the values of a site are stored, one codec per file."""

from strapfmt.codecs import lz4, none, zstd
from strapfmt.codecs.base import Codec
from strapfmt.errors import ArgumentError

__all__ = ["CODECS", "Codec", "get_codec"]

CODECS: dict[str, Codec] = {codec.name: codec for codec in (none.CODEC, lz4.CODEC, zstd.CODEC)}


def get_codec(name: str) -> Codec:
    """Return the codec called `name`.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    if name not in CODECS:
        raise ArgumentError(f"codec: expected one of {', '.join(CODECS)}; got {name!r}")
    return CODECS[name]
