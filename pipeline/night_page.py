"""A night's record as one self-contained HTML page for whoever is on call; computes nothing.

Assumes: every text is escaped here; the page needs no network and no script.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from conjoin.pipeline import runs, storage
from conjoin.pipeline.gates import GateResult
from conjoin.pipeline.night import Night

# What the plan counts, in the order of the page; what is not named here is shown by its own name.
_COUNTS = {
    "new": "new records",
    "changed": "changed: embedded again",
    "kept": "kept columns only (a price)",
    "moved": "moved to another file",
    "deleted": "deleted from the source",
    "again": "embedded again by a new encoder or precision",
    "due": "tried again from quarantine",
    "unchanged": "unchanged in files that were opened",
    "skipped": "unchanged in files that were not opened",
}
_GOOD = ("published", "unchanged")
_FILES = ("report.json", "plan.json")


def write(uri: str, night: Night) -> str:
    """Write `report.html` into the run's directory, replacing an earlier one; returns where it is."""
    path = storage.join(runs.run_directory(uri, night.run_id), "report.html")
    storage.write_bytes(path, render(night, links=_FILES).encode())
    return path


def render(night: Night, links: Sequence[str] = ()) -> str:
    """The page as HTML text. links: files beside it."""
    parts = [
        _header(night),
        _alarms(night),
        _section("Next", _commands(night)),
        _section("What changed", _counts(night)),
        _section("Gates", _gates(night.gates)),
        _section("Time", _bars(night)),
        _section("Indexes", _indexes(night)),
        _section("Quarantine", _troubles(night)),
        _section("Left to the next night", _list(night.left)),
        _section("Versions", _versions(night, links)),
    ]
    here = Path(__file__).parent
    style = "".join((here / name).read_text(encoding="ascii") for name in ("report.css", "night.css"))
    title = f"{night.run_id}: {night.status}"
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{_text(title)}</title>"
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{style}</style></head>{body}</html>\n"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _header(night: Night) -> str:
    tone = "good" if night.status in _GOOD else "bad"
    figures = [
        (f"{night.rows:,}", "rows in the version", ""),
        *((f"{night.counts.get(name, 0):,}", name, "") for name in ("new", "changed", "deleted")),
        (f"{night.quarantined:,}", "quarantined", "bad" if night.quarantined else ""),
        (_size(night.bytes_written), "written", ""),
        (_time(sum(night.seconds.values())), "in all", ""),
    ]
    cells = "".join(
        f"<div class='{kind}'><b>{_text(value)}</b><span>{_text(label)}</span></div>" for value, label, kind in figures
    )
    pill = f"<span class='pill {tone}'>{_text(night.status)}</span>"
    return (
        f"<header><h1>{_text(night.run_id)} {pill}</h1><p class=lead>{_text(_lead(night))}</p>"
        f"<div class=figures>{cells}</div></header>"
    )


def _lead(night: Night) -> str:
    when = " to ".join(stamp.replace("T", " ")[:19] for stamp in (night.started, night.finished) if stamp)
    when = f" {when} UTC." if when else ""
    if night.status == "published":
        return f"Version {night.version} is live.{when}"
    if night.status == "rejected":
        return f"Readers still see version {night.previous or 'nothing'}: a gate failed.{when}"
    if night.status == "unchanged":
        return f"Nothing to do: version {night.version} stays live.{when}"
    return f"Given up.{when}"


def _alarms(night: Night) -> str:
    alarms = [night.problem] if night.problem else []
    if night.hook is not None and night.hook.failed:
        alarms.append(night.hook.problem)
    lines = "".join(f"<p>{_text(line)}</p>" for line in alarms)
    return f"<section class=alarm><h2 class=bad>What went wrong</h2>{lines}</section>" if lines else ""


def _counts(night: Night) -> str:
    more = [name for name in night.counts if name not in _COUNTS]
    of_changed = [name for name in more if name.startswith("changed_")]
    names = ["new", "changed", *of_changed, *(name for name in (*_COUNTS, *more) if name not in of_changed)]
    names = list(dict.fromkeys(names))
    rows = [
        (_COUNTS.get(name, name.replace("changed_", "of the changed ones: ")), f"{night.counts[name]:,}")
        for name in names
        if night.counts.get(name)
    ]
    return _table(("records", "rows"), rows)


def _gates(gates: Sequence[GateResult]) -> str:
    rows = []
    for gate in sorted(gates, key=lambda gate: gate.passed):
        tone, word = ("good", "passed") if gate.passed else ("bad", "failed")
        advice = f"<small>{_text(gate.advice)}</small>" if gate.advice and not gate.passed else ""
        figures = "".join(f"<td>{_figure(value)}</td>" for value in (gate.value, gate.limit))
        rows.append(
            f"<tr><td class='tight {tone}'>{word}</td><td class='words tight'>{_text(gate.name)}</td>{figures}"
            f"<td class=words>{_text(gate.detail)}{advice}</td></tr>"
        )
    head = "<th></th><th class=words>gate</th><th>found</th><th>limit</th><th class=words>in words</th>"
    return _rows(head, rows)


def _bars(night: Night) -> str:
    longest = max(night.seconds.values(), default=0)
    rows = "".join(
        f"<span class=name>{_text(step)}</span><i style='width:{100 * seconds / max(longest, 1e-9):.1f}%'></i>"
        f"<span>{_text(_time(seconds))}</span>"
        for step, seconds in night.seconds.items()
    )
    note = f"<p class=note>{night.rows_per_s:,.0f} rows/s and actor while embedding</p>" if night.rows_per_s else ""
    return f"<div class=bars>{rows}</div>{note}" if rows else ""


def _indexes(night: Night) -> str:
    names = list(dict.fromkeys(name for index in night.indexes for name in index))
    rows = [[_figure(index.get(name)) for name in names] for index in night.indexes]
    return _table([name.replace("_", " ") for name in names], rows)


def _troubles(night: Night) -> str:
    rows = [
        f"<tr><td class=tight>{_text(trouble.stage)}</td><td class='words tight'>{_text(trouble.modality or 'record')}"
        f"</td><td>{trouble.count:,}</td><td class=words>{_text(trouble.reason)}"
        f"<small>{_text(trouble.example_id)}: {_text(trouble.example)}</small></td></tr>"
        for trouble in night.troubles
    ]
    return _rows("<th>stage</th><th class=words>of</th><th>values</th><th class=words>reason</th>", rows)


def _versions(night: Night, links: Sequence[str]) -> str:
    facts = {
        "this night's": night.version or "",
        "live before": night.previous or "",
        "built on": night.base or "",
        "table": night.table,
        "source": ", ".join(night.source),
        "encoder": f"{night.encoder} ({night.fingerprint[:12]})" if night.fingerprint else night.encoder,
        "units": f"{night.units:,}" if night.units else "",
        "hook": _hook(night),
        "of the table's past": _cleaned(night),
    }
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value)
    files = ", ".join(f"<a href='{_text(name)}'>{_text(name)}</a>" for name in links)
    return f"<dl>{rows}{f'<dt>beside this page</dt><dd>{files}</dd>' if files else ''}</dl>"


def _hook(night: Night) -> str:
    if night.hook is None:
        return ""
    return f"{night.hook.command} (exit code {night.hook.exit_code}, {_time(night.hook.seconds)})"


def _cleaned(night: Night) -> str:
    return ", ".join(
        f"{item.count:,} {item.kind} ({_size(item.size_bytes)}) {'deleted' if item.deleted else 'left'}"
        for item in night.cleaned
    )


def _commands(night: Night) -> str:
    lines = ["conjoin history"]
    if night.status == "published" and night.previous:
        lines.append(f"conjoin rollback --to {night.previous}    # the version before")
    if night.status == "rejected":
        lines.append(f"conjoin publish --force {night.run_id}    # make it live in spite of its gates")
    if night.troubles:
        lines.append("conjoin repair --sample 5    # what is in quarantine")
    return f"<pre>{_text(chr(10).join(lines))}</pre>"


def _list(lines: Iterable[str]) -> str:
    found = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul>{found}</ul>" if found else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    return _rows(head, ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows])


def _rows(head: str, rows: Sequence[str]) -> str:
    if not rows:
        return ""
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _figure(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
