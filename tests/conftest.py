"""Settings that hold for every test."""

import os
import shutil
from collections.abc import Iterator

import pytest

# Two cores are often shared with other work; one thread each keeps tests quick and their sums the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may reach for a hub or write to a terminal as if a person watched.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Datasets are synced to disk all the time; in memory that costs nothing.
_MEMORY = "/dev/shm"
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget all compiled code and its counts before, and the code after; run without gradients."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()
