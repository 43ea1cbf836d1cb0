"""Arrow's Zstandard frames at level 1 (levels 3 and 9 were no smaller on activations)."""

from strapfmt.codecs.base import Codec

__all__ = ["CODEC"]

CODEC = Codec(name="zstd", compression="zstd", level=1)
