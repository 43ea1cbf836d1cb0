"""Batches of activations for training: shuffled, sharded over ranks and workers, resumable."""

from strapfmt.loader.loader import Loader
from strapfmt.loader.order import FULL_SHUFFLE_BYTES, Order

__all__ = ["FULL_SHUFFLE_BYTES", "Loader", "Order"]
