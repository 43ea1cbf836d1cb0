"""No compression: a record batch's body is the tensor's memory, and readers map it."""

from strapfmt.codecs.base import Codec

__all__ = ["CODEC"]

CODEC = Codec(name="none")
