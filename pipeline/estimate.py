"""What a night will take, from the rate that the last one measured; a plan above the limits does not start.

Assumes: rows are alike from night to night; a first night has no rate and is never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from conjoin.pipeline import runs
from conjoin.pipeline.errors import GateError
from conjoin.pipeline.section import Section


class Limits(Section):
    """A plan that is expected to exceed these does not start; a table's first night has no rate to expect by."""

    hours: float | None = Field(None, gt=0)
    cost: float | None = Field(None, gt=0, description="in the currency of cluster.price_per_gpu_hour")


@dataclass(frozen=True, slots=True)
class Estimate:
    """hours: of embedding; cost: of its GPUs, None without a price; rows_per_s: of one actor, in an earlier night."""

    rows: int
    rows_per_s: float
    hours: float
    cost: float | None


def last_rate(uri: str, fingerprint: str) -> float | None:
    """Rows per second and actor of the newest night of this encoder that embedded anything."""
    unfinished = set(runs.unfinished(uri))
    over = [run_id for run_id in reversed(runs.run_ids(uri)) if run_id not in unfinished]
    reports = (runs.read_report(uri, run_id) for run_id in over)
    rates = (float(str(report["rows_per_s"])) for report in reports if report.get("fingerprint") == fingerprint)
    return next((rate for rate in rates if rate > 0), None)


def estimate(rows: int, rows_per_s: float, gpus: int, price_per_gpu_hour: float | None) -> Estimate:
    """rows: still to embed; gpus: one actor each, 0 for one actor without."""
    hours = rows / rows_per_s / max(gpus, 1) / 3600
    return Estimate(rows, rows_per_s, hours, None if price_per_gpu_hour is None else hours * gpus * price_per_gpu_hour)


def check_limits(expected: Estimate, limits: Limits) -> None:
    """Raises GateError with the numbers."""
    basis = f"{expected.rows:,} rows at {expected.rows_per_s:,.1f} rows/s and actor"
    advice = "Raise it in the run file, or give the night more GPUs; the same command then starts the plan"
    if limits.hours is not None and expected.hours > limits.hours:
        raise GateError(f"{expected.hours:.1f} hours expected ({basis}), limits.hours is {limits.hours:g}", next=advice)
    if limits.cost is not None and expected.cost is not None and expected.cost > limits.cost:
        raise GateError(
            f"a cost of {expected.cost:.2f} expected ({basis}), limits.cost is {limits.cost:g}", next=advice
        )
