"""SQL over a dataset: embedded DuckDB that sees its tables and sites, and nothing else."""

from strapfmt.query.relations import Source, StoredSite
from strapfmt.query.result import Result
from strapfmt.query.run import run_query
from strapfmt.query.statement import check_condition, quoted

__all__ = ["Result", "Source", "StoredSite", "check_condition", "quoted", "run_query"]
