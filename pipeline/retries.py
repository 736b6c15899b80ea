"""Which quarantined values a night tries again: what could not be fetched by itself, anything that `repair` marked.

Assumes: a mark names the runs whose attempts it wants repeated, so it is spent when a version is published in which
they were: nothing must be deleted, a killed night loses none, and a rollback brings back those of its version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.quarantine import rows_of
from conjoin.pipeline.store import bookkeeping

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.state import Manifest

ALL = "all"
STAGES = ("read", "fetch", "decode", "embed")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Mark:
    """what: `all`, a stage, or `ids`; runs: whose attempts are to be repeated."""

    what: str
    ids: tuple[str, ...]
    runs: tuple[str, ...]


def due(uri: str, manifest: Manifest, retries: int) -> pa.Table | None:
    """Rows of the quarantine that the next night tries again: marked ones, and those not fetched in fewer attempts.

    retries: attempts after the first. None if there is nothing to try.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = rows_of(uri, manifest)
    if rows is None or not rows.num_rows:
        return None
    wanted = pc.and_(pc.equal(rows["stage"], "fetch"), pc.less_equal(rows["attempts"], retries))
    ids = pc.cast(rows["id"], pa.string())
    for mark in _marks(uri):
        wanted = pc.or_(wanted, pc.and_(_named(mark, rows, ids), pc.is_in(rows["tried"], pa.array(mark.runs))))
    found = rows.filter(wanted)
    return found if found.num_rows else None


def _named(mark: Mark, rows: pa.Table, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if mark.what == "ids":
        return pc.is_in(ids, pa.array(mark.ids))
    return pc.is_valid(ids) if mark.what == ALL else pc.equal(rows["stage"], mark.what)


def mark(uri: str, manifest: Manifest, wanted: Sequence[str]) -> pa.Table:
    """Have the next night try values again: `all`, a stage (read, fetch, decode, embed), or ids; returns their rows.

    Repeating it changes nothing. Raises TableError for ids that are not in quarantine.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = rows_of(uri, manifest)
    if rows is None or not rows.num_rows:
        raise TableError("nothing is in quarantine", where=uri)
    ids = pc.cast(rows["id"], pa.string())
    names = [name for name in wanted if name in (ALL, *STAGES)]
    keys = tuple(sorted(set(wanted) - set(names)))
    _check_known(uri, ids, keys)
    runs = tuple(sorted(pc.unique(rows["tried"]).to_pylist()))
    marks = [Mark(name, (), runs) for name in names] + ([Mark("ids", keys, runs)] if keys else [])
    _prune(uri, runs)
    hit = pc.is_null(ids)
    for one in marks:
        _write(uri, one)
        hit = pc.or_(hit, _named(one, rows, ids))
    return rows.filter(hit)


def _check_known(uri: str, ids: pa.ChunkedArray, keys: Sequence[str]) -> None:
    unknown = sorted(set(keys) - set(ids.to_pylist()))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        what = f"not in quarantine: {', '.join(unknown[:_SHOWN])}{more}"
        raise TableError(what, where=uri, next="`conjoin repair` shows what is")


def _directory(uri: str) -> str:
    return storage.join(bookkeeping(uri), "retries")


def _write(uri: str, mark: Mark) -> None:
    facts: dict[str, object] = {"what": mark.what, "ids": list(mark.ids), "runs": list(mark.runs)}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    storage.write_json(storage.join(_directory(uri), f"{mark.what}-{digest}.json"), facts)


def _marks(uri: str) -> Iterator[Mark]:
    for path in storage.list_files(_directory(uri)):
        if path.endswith(".json"):
            yield _read(path)


def _read(path: str) -> Mark:
    raw = cast("dict[str, list[str]]", storage.read_json(path))
    return Mark(str(raw["what"]), tuple(raw["ids"]), tuple(raw["runs"]))


def _prune(uri: str, runs: Sequence[str]) -> None:
    """Marks about runs that the quarantine of live does not know any more are spent."""
    for path in storage.list_files(_directory(uri)):
        if path.endswith(".json") and not set(_read(path).runs) & set(runs):
            storage.remove(path)
