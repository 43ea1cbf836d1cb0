"""Settings that hold for every test."""

import os

# Two cores are often shared with other work; one thread each keeps tests quick and their sums the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may reach for a hub or write to a terminal as if a person watched.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
