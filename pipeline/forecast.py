"""What tonight would do, said before anything runs: rows by what becomes of them, work, time and cost.

Assumes: it reads the draft of a plan and changes nothing; times come from the last night that this encoder embedded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline.estimate import Estimate

if TYPE_CHECKING:
    from conjoin.pipeline.draft import Draft


@dataclass(frozen=True, slots=True)
class Forecast:
    """counts: rows by kind (new, changed, kept: only other columns, moved, deleted, unchanged, skipped: in files that
    are not opened, due: quarantined values tried again, again: under a new encoder), with changed_<modality>.

    embed: rows per modality whose tower runs; contents: distinct ones among them where that is known before reading;
    uris: addresses to fetch; read_bytes: about, from the source; files: opened, recalled from their state, skipped,
    gone; columns: of the table, that come and go; expected: None where this encoder never ran here.
    """

    counts: Mapping[str, int]
    units: int
    embed: Mapping[str, int]
    contents: Mapping[str, int]
    uris: int
    read_bytes: int
    files: Mapping[str, int]
    columns: Mapping[str, tuple[str, ...]]
    expected: Estimate | None = None
    over: str = ""

    @property
    def nothing(self) -> bool:
        """Whether a night would leave the table as it is."""
        idle = ("unchanged", "skipped")
        same = self.files["opened"] == self.files["gone"] == self.files["recalled"] == 0
        return same and not any(count for kind, count in self.counts.items() if kind not in idle)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "nothing": self.nothing}

    def lines(self) -> list[str]:
        """For people."""
        if self.nothing:
            return ["nothing to do: the live version is up to date with the source"]
        shown = {kind: count for kind, count in self.counts.items() if count}
        found = ["rows     " + ", ".join(f"{count:,} {_NAMES.get(kind, kind)}" for kind, count in shown.items())]
        files = ", ".join(f"{count:,} {what}" for what, count in self.files.items() if count)
        found.append(f"files    {files}; about {self.read_bytes / 1e6:,.0f} MB to read, {self.uris:,} URIs to fetch")
        towers = [f"{count:,} x {name}{self._distinct(name)}" for name, count in self.embed.items() if count]
        found.append(f"embed    {', '.join(towers) or 'nothing'}, in {self.units:,} units")
        if self.columns["added"] or self.columns["dropped"]:
            found.append(f"columns  + {', '.join(self.columns['added'])}  - {', '.join(self.columns['dropped'])}")
        found.append(f"expected {self._time()}")
        return [*found, self.over] if self.over else found

    def _distinct(self, name: str) -> str:
        return f" ({self.contents[name]:,} distinct)" if name in self.contents else ""

    def _time(self) -> str:
        if self.expected is None:
            return "no night of this encoder was measured yet"
        cost = "" if self.expected.cost is None else f", cost {self.expected.cost:,.2f}"
        return f"{self.expected.hours * 3600:,.0f} s of embedding at {self.expected.rows_per_s:,.0f} rows/s{cost}"


_NAMES = {
    "kept": "with other kept columns only",
    "skipped": "in unchanged files",
    "due": "quarantined values to try again",
    "again": "to embed again",
}


def forecast(draft: Draft, expected: Estimate | None = None, over: str = "") -> Forecast:
    """The draft in numbers. over: what is above the limits."""
    units = draft.units
    embed = {m: sum(unit.rows for unit in units if m in unit.embed) for m in draft.modalities}
    files, listed = draft.comparison.files, draft.found.files
    return Forecast(
        counts=draft.counts(),
        units=len(units),
        embed=embed,
        contents={m: count for m in draft.modalities if embed[m] and (count := draft.distinct(m)) is not None},
        uris=draft.addresses(),
        read_bytes=sum(listed[number].size_bytes for number in files.opened) + draft.bytes_of_recalled(),
        files={
            "opened": len(files.opened),
            "recalled": len(files.recalled),
            "skipped": len(files.skipped),
            "gone": len(files.gone),
        },
        columns={"added": draft.change.added, "dropped": draft.change.dropped},
        expected=expected,
        over=over,
    )
