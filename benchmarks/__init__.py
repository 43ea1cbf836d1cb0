"""Benchmarks of strapfmt: each module answers one question, beside a peer and a physical limit of the same run."""
