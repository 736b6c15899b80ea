"""The record of a night: what it planned, did, measured and published; written as report.json and read back.

Assumes: it is data alone, the night fills it in. Records of older versions lack fields, those of newer ones have more:
reading one never fails for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import cast

from conjoin.encoders.spec import Json
from conjoin.pipeline import runs, storage
from conjoin.pipeline.cleaning import Item
from conjoin.pipeline.gates import GateResult
from conjoin.pipeline.hook import Hook
from conjoin.pipeline.quarantine import Group


@dataclass(frozen=True, slots=True)
class Night:
    """status: published, unchanged, rejected or abandoned.

    version: made tonight, on the head or beside it; previous: live before; base: built on; all 0 where there is none.
    counts: rows by what the plan does with them; seconds: by step in order; rows_per_s: of embedding, per actor;
    left: files that changed meanwhile, for the next night; cleaned: what went of the table's past;
    started, finished: UTC, ISO 8601.
    """

    run_id: str
    status: str
    table: str = ""
    source: tuple[str, ...] = ()
    started: str = ""
    finished: str = ""
    version: int = 0
    previous: int = 0
    base: int = 0
    rows: int = 0
    units: int = 0
    quarantined: int = 0
    bytes_written: int = 0
    rows_per_s: float = 0.0
    fingerprint: str = ""
    encoder: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    indexes: tuple[Mapping[str, object], ...] = ()
    troubles: tuple[Group, ...] = ()
    hook: Hook | None = None
    left: tuple[str, ...] = ()
    problem: str = ""
    cleaned: tuple[Item, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def measured(self) -> dict[str, float]:
        """Figures of gates by name; of several with one name the one nearest to its limit, or the lowest."""
        found: dict[str, float] = {}
        for gate in self.gates:
            if gate.value is not None:
                found[gate.name] = min(gate.value, found.get(gate.name, gate.value))
        return found


def from_json(raw: Mapping[str, object]) -> Night:
    """A record as report.json holds it."""
    found = _known(Night, raw)
    for name in ("source", "left"):
        value = found.get(name) or ()
        found[name] = (value,) if isinstance(value, str) else tuple(cast("Sequence[str]", value))
    found["gates"] = tuple(GateResult(**_known(GateResult, gate)) for gate in _rows(raw, "gates"))  # type: ignore[arg-type]  # JSON
    found["troubles"] = tuple(Group(**_known(Group, row)) for row in _rows(raw, "troubles"))  # type: ignore[arg-type]  # JSON
    found["cleaned"] = tuple(Item(**_known(Item, row)) for row in _rows(raw, "cleaned"))  # type: ignore[arg-type]  # JSON
    found["indexes"] = tuple(_rows(raw, "indexes"))
    hook = raw.get("hook")
    found["hook"] = Hook(**_known(Hook, cast("Mapping[str, object]", hook))) if hook else None  # type: ignore[arg-type]  # JSON
    return Night(**found)  # type: ignore[arg-type]  # our own JSON


def _known(kind: type[object], raw: Mapping[str, object]) -> dict[str, object]:
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]  # always a dataclass
    return {name: value for name, value in raw.items() if name in names}


def _rows(raw: Mapping[str, object], name: str) -> Sequence[Mapping[str, object]]:
    return cast("Sequence[Mapping[str, object]]", raw.get(name) or ())


def read_night(uri: str, run_id: str) -> Night | None:
    """The record of a run; None if it is not over. Raises StorageError if it cannot be read."""
    path = storage.join(runs.run_directory(uri, run_id), "report.json")
    return from_json(storage.read_json(path)) if storage.exists(path) else None


def bytes_of(fragments: Sequence[Json]) -> int:
    """Bytes of the data files that Lance's JSON of fragments names."""
    found = 0
    for fragment in fragments:
        files = cast("list[dict[str, object]]", cast("dict[str, object]", fragment or {}).get("files", []))
        found += sum(int(str(file.get("file_size_bytes") or 0)) for file in files)
    return found
