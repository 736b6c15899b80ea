"""Results as text for people or as JSON, CSV and Parquet for programs.

Assumes: what is printed here goes to stdout.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conjoin.pipeline.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.evaluate import Evaluation
    from conjoin.pipeline.metrics import Estimate
    from conjoin.pipeline.night import Night
    from conjoin.pipeline.publish import Entry
    from conjoin.pipeline.quarantine import Group
    from conjoin.pipeline.status import Status, Working

Style = Literal["table", "json", "csv"]


def facts(found: Mapping[str, object], indent: int = 0) -> str:
    """Nested facts as aligned lines, `name  value`."""
    width = max((len(name) for name in found), default=0)
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [" " * indent + name, facts(value, indent + 2)]
        elif isinstance(value, list):
            lines += [" " * indent + f"{name:<{width}}  {item}" for item in value] or []
        else:
            lines.append(" " * indent + f"{name:<{width}}  {value}")
    return "\n".join(lines)


def write_rows(rows: pa.Table, *, out: Path | None = None, style: Style = "table") -> None:
    """To a file by its suffix, whose path is printed, else to stdout in a style. Raises ConfigError for a bad path."""
    if out is None:
        sys.stdout.write(_json(rows) if style == "json" else _csv(rows) if style == "csv" else _text(rows))
        return
    if out.suffix not in (".parquet", ".csv", ".json"):
        raise ConfigError(
            f"cannot write {out.suffix or 'a file without a suffix'}",
            where=str(out),
            next="Use .parquet, .csv or .json",
        )
    try:
        _write(rows, out)
    except OSError as error:
        raise ConfigError(f"cannot write the file: {error.strerror or error}", where=str(out)) from error
    print(out)


def _write(rows: pa.Table, out: Path) -> None:
    if out.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(rows, out)
    else:
        out.write_text(_csv(rows) if out.suffix == ".csv" else _json(rows), encoding="utf-8")


def readable(rows: pa.Table) -> pa.Table:
    """Without the columns that a terminal cannot show: pictures and hashes."""
    import pyarrow as pa

    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return rows.select([field.name for field in rows.schema if not any(is_kind(field.type) for is_kind in kinds)])


def moved(entry: Entry) -> str:
    """One line about a rollback or a forced version."""
    before = f", before it version {entry.before}" if entry.before is not None else ""
    run = f" of run {entry.run_id}" if entry.run_id else ""
    run += ", forced," if entry.action == "forced" else ""
    return f"version {entry.version}{run} with {entry.num_rows:,} rows is live{before}"


def _plain(value: object) -> object:
    """A JSON value: bytes as their size, NaN as null."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _json(rows: pa.Table) -> str:
    """An array with one row a line, so that vectors stay on one."""
    lines = [json.dumps({name: _plain(value) for name, value in row.items()}) for row in rows.to_pylist()]
    return "[\n" + ",\n".join(f" {line}" for line in lines) + "\n]\n" if lines else "[]\n"


def _csv(rows: pa.Table) -> str:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows.column_names)
    writer.writerows([_csv_cell(value) for value in row.values()] for row in rows.to_pylist())
    return buffer.getvalue()


def _csv_cell(value: object) -> object:
    plain = _plain(value)
    return json.dumps(plain) if isinstance(plain, list | dict) else plain


def _text(rows: pa.Table) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows.column_names:
        table.add_column(name, overflow="ellipsis", no_wrap=True)
    for row in rows.to_pylist():
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + f"\n{_count(rows.num_rows)}\n"


def _count(num_rows: int) -> str:
    return "(1 row)" if num_rows == 1 else f"({num_rows:,} rows)"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, list) and len(value) > 4:
        return "[" + ", ".join(_cell(item) for item in value[:3]) + f", ... {len(value)}]"
    return str(value)


def evaluation(found: Evaluation) -> str:
    """Retrieval by direction and zero-shot accuracy, with 95 % intervals and what chance would earn."""
    from conjoin.pipeline.evaluate import KS

    heads = [*(f"hit@{k}" for k in KS), f"hit@{KS[-1]} by chance", "median rank", "MRR"]
    lines = [found.name, f"{'direction':<16}{'queries':>9}{'candidates':>12}  " + "".join(f"{h:<18}" for h in heads)]
    for one in found.directions:
        figures = [
            *(_interval(one.hit_at[k]) for k in KS),
            f"{one.chance_at[KS[-1]]:.2g}",
            f"{one.median_rank.value:,g}",
            _interval(one.mrr),
        ]
        name, queries = f"{one.query} -> {one.candidate}", f"{one.num_queries:,}"
        lines.append(f"{name:<16}{queries:>9}{one.num_candidates:>12,}  " + "".join(f"{text:<18}" for text in figures))
    drawn = [one for one in found.directions if one.num_queries < one.num_distinct]
    if drawn:
        what = ", ".join(f"{one.num_queries:,} of {one.num_distinct:,} {one.query} queries" for one in drawn)
        lines.append(f"drawn at random: {what} (--queries 0 asks all)")
    if (zero := found.zero_shot) is not None:
        lines.append(
            f"zero-shot {zero.column} of {zero.modality}: {_interval(zero.accuracy)} of {zero.num_rows:,} rows, "
            f"{zero.num_classes} classes (chance {zero.chance.uniform:.2f}, the largest {zero.chance.majority:.2f})"
        )
    lines += [
        f"relevance of {pair}: even odds at a similarity of {-curve.bias / curve.slope:.3f}, "
        f"calibration error {curve.error:.3f} over {curve.num_pairs:,} pairs"
        for pair, curve in found.calibration.items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def _interval(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def night_report(report: Night) -> str:
    """One screen about a night."""
    if report.status == "unchanged":
        return f"nothing to do: version {report.version} of run {report.run_id} is live with {report.rows:,} rows"
    times = "  ".join(f"{step} {seconds:.1f} s" for step, seconds in report.seconds.items())
    changes = ", ".join(f"{count:,} {kind}" for kind, count in report.counts.items())
    return "\n".join(
        [
            f"run {report.run_id}: {report.status}, version {report.version} with {report.rows:,} rows is live",
            changes,
            f"{report.quarantined:,} quarantined, {report.units} unit(s), {report.rows_per_s:,.0f} rows/s, "
            f"encoder {report.fingerprint[:12]}",
            times,
        ]
    )


def status_lines(found: Status) -> str:
    """One screen: nights at work, what is live, the last night, the quarantine."""
    lines = [_working(work) for work in found.working] or ["no night is running"]
    live, last = found.live, found.last
    if live is None or found.live_age_s is None:
        lines.append("nothing is live yet")
    else:
        forced = ", forced in spite of its gates" if live.action == "forced" else ""
        lines.append(
            f"live: version {live.version} of run {live.run_id} with {live.num_rows:,} rows, "
            f"{live.action} {_ago(found.live_age_s)} ago{forced}"
        )
    if last is not None:
        seconds = f" in {_ago(sum(last.seconds.values()))}" if last.seconds else ""
        problem = f": {last.problem}" if last.problem else ""
        lines.append(f"last night: {last.run_id} {last.status}{seconds}{problem}")
        if last.hook is not None and last.hook.failed:
            lines.append(last.hook.problem)
    counts = ", ".join(f"{count:,} {stage}" for stage, count in found.quarantine.items())
    lines.append(f"quarantine: {counts} (`conjoin repair`)" if counts else "quarantine: empty")
    return "\n".join(lines)


def _working(work: Working) -> str:
    units = f", {work.units_done:,} of {work.units:,} units done" if work.units else ""
    if work.state == "unfinished":
        return f"run {work.run_id} is unfinished{units}; `conjoin run` resumes it"
    step = f" at {work.step}" if work.step else ""
    if work.state == "ended":
        return f"run {work.run_id} stopped{step}{units}: {work.problem}"
    where = f"(process {work.pid} on {work.host})"
    if work.state == "gone":
        since = _ago(work.silent_s)
        return f"run {work.run_id} is silent for {since}{step}{units}: killed? {where}; `conjoin run` resumes it"
    share = f" {work.done:,.0f} of {work.total:,.0f} {work.unit}" if work.total else ""
    rate = f", {work.rows_per_s:,.0f} rows/s" if work.rows_per_s else ""
    left = f", about {_ago(work.left_s)} left" if work.left_s is not None else ""
    return f"run {work.run_id} is running{step}{share}{units}{rate}{left} {where}"


def _ago(seconds: float) -> str:
    """Seconds in the two largest units that matter."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"


def quarantine_lines(groups: Sequence[Group]) -> str:
    """Kinds of trouble, the most frequent first, each with one example."""
    if not groups:
        return "nothing is in quarantine"
    lines = [f"{sum(group.count for group in groups):,} value(s) in quarantine"]
    for group in groups:
        lines.append(f"{group.count:>9,}  {group.stage:<7}{group.modality or 'record':<8}{group.reason}")
        lines.append(f"{'':>11}e.g. {group.example_id}: {group.example}")
    return "\n".join([*lines, "`--sample N` shows values, `--retry all|fetch|ID` has the next night try them again"])
