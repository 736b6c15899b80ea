"""SQL over published tables: sqlglot parses and plans, Lance searches with the filters pushed down, DuckDB finishes.

Assumes: querying imports no ray, and no torch without text(), image() or audio().
"""

from conjoin.pipeline.query.result import Result
from conjoin.pipeline.query.table import Table, open_table

__all__ = ["Result", "Table", "open_table"]
