"""What tests of frameworks around a model ask of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import strapfmt


def stored(path: Path, site: str) -> torch.Tensor:
    """All values of a site."""
    return torch.as_tensor(strapfmt.open(path)[site][:])


def tokens(path: Path) -> list[tuple[Any, ...]]:
    """Step, phase, sequence, position and number of every token."""
    query = "select step, phase, sequence_id, position, token_id from tokens order by row"
    return strapfmt.open(path).sql(query).fetchall()
