"""What the compiler has counted, for tests of compiled models."""

from __future__ import annotations

from torch._dynamo.utils import counters


def n_graphs() -> int:
    """How many graphs were made."""
    return int(counters["stats"]["unique_graphs"])


def n_breaks() -> int:
    """How often a graph was cut."""
    return sum(counters["graph_break"].values())
