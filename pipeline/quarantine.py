"""The table `<name>__quarantine`: values that could not be used, each with its reason, keyed by (id, modality, run).

Assumes: a run replaces its own rows and no others; which runs' rows still hold is in the live manifest. A night copies
the rows that it did not touch under its own run id; `tried` keeps the run whose attempt failed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline import storage
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.state import Manifest, read_manifest
from conjoin.pipeline.store import LIVE, STORAGE_VERSION, head, live_version, open_version, quarantine_uri

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

# What older tables lack, and what their rows count as having.
_LATER = {"attempts": "CAST(1 AS INT)", "tried": "run_id"}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one kind of trouble. reason: with `#` for every number in it; example: of one of them."""

    stage: str
    modality: str
    reason: str
    count: int
    example: str
    example_id: str


def quarantine_schema(id_type: pa.DataType) -> pa.Schema:
    """modality is empty for a record that has no value in any; stage: read, fetch, decode or embed.

    attempts: nights that tried this value in vain, one after the other; null in rows that are not written yet.
    """
    import pyarrow as pa

    text = ["modality", "run_id", "stage", "reason", "file"]
    position = [pa.field("row_group", pa.int32()), pa.field("row", pa.int64())]
    later = [pa.field("attempts", pa.int32()), pa.field("tried", pa.string())]
    return pa.schema(
        [pa.field("id", id_type, nullable=False), *(pa.field(name, pa.string()) for name in text), *position, *later]
    )


def replace_rows(uri: str, run_id: str, rows: pa.Table) -> None:
    """Make `rows` (of quarantine_schema) what run `run_id` has in quarantine; repeating it changes nothing.

    Rows without `attempts` are this run's own: they count one more than the live version's row of the same value and
    stage. Two commits, delete and append: readers filter by the live manifest, which does not name this run yet. Where
    the ids' type changed (a `--full` run over another source) all of them become strings. Raises StorageError, and
    TableError if the table there is somebody else's.
    """
    target = quarantine_uri(uri)
    with storage.explaining("write the quarantine", target):
        _replace(target, run_id, _counted(uri, run_id, rows))


def _counted(uri: str, run_id: str, rows: pa.Table) -> pa.Table:
    """The same with `attempts` and `tried` filled in."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not rows["attempts"].null_count:
        return rows
    table = head(uri)
    known = None if table is None or live_version(table) is None else read_quarantine(uri)
    before = {} if known is None else {_key(row): int(row["attempts"]) for row in known.to_pylist()}
    counts = [
        before.get(_key(row), 0) + 1 if row["attempts"] is None else row["attempts"]
        for row in rows.select(["id", "modality", "stage", "attempts"]).to_pylist()
    ]
    schema = rows.schema
    rows = rows.set_column(schema.get_field_index("attempts"), schema.field("attempts"), pa.array(counts, pa.int32()))
    tried = pc.fill_null(rows["tried"], run_id)
    return rows.set_column(schema.get_field_index("tried"), schema.field("tried"), tried)


def _key(row: dict[str, object]) -> tuple[str, object, object]:
    return str(row["id"]), row["modality"], row["stage"]


def check_quarantine(uri: str) -> None:
    """Raises TableError if a table of somebody else lies where the quarantine of the table at `uri` goes."""
    _ours(quarantine_uri(uri))


def _ours(target: str) -> lance.LanceDataset | None:
    import pyarrow as pa

    dataset = head(target)
    names = quarantine_schema(pa.string()).names
    if dataset is not None and dataset.schema.names not in (names, names[: -len(_LATER)]):
        what = "there is a table in the place of the quarantine, and conjoin did not make it"
        raise TableError(what, where=target, next="Move it away, or give table.path another name")
    return dataset


def _replace(target: str, run_id: str, rows: pa.Table) -> None:
    import lance
    import pyarrow as pa

    dataset = _ours(target)
    mode = "create" if dataset is None else "append"
    if dataset is not None:
        if "attempts" not in dataset.schema.names:
            dataset.add_columns(_LATER)
        dataset.delete(f"run_id = '{run_id}'")
        if dataset.schema.field("id").type != rows.schema.field("id").type:
            text = quarantine_schema(pa.string())
            rows = rows.cast(text)
            if not pa.types.is_string(dataset.schema.field("id").type):
                rows, mode = pa.concat_tables([dataset.to_table().cast(text), rows]), "overwrite"
    if rows.num_rows:
        lance.write_dataset(
            rows, target, mode=mode, data_storage_version=STORAGE_VERSION, storage_options=storage.lance_options(target)
        )


def read_quarantine(uri: str, version: str | int | None = LIVE) -> pa.Table | None:
    """The rows in quarantine that belong to a version of the table at `uri`; None if nothing ever was."""
    manifest = read_manifest(open_version(uri, version))
    return None if manifest is None else rows_of(uri, manifest)


def rows_of(uri: str, manifest: Manifest) -> pa.Table | None:
    """The rows in quarantine that a manifest of the table at `uri` names; None if nothing ever was."""
    import pyarrow as pa

    dataset = head(quarantine_uri(uri))
    if dataset is None or not manifest.quarantine:
        return None
    runs = ", ".join(f"'{run}'" for run in manifest.quarantine)
    found = dataset.to_table(filter=f"run_id IN ({runs})")
    if "attempts" not in found.schema.names:
        ones = pa.array([1] * found.num_rows, pa.int32())
        found = found.append_column("attempts", ones).append_column("tried", found["run_id"])
    return found


def groups_of(rows: pa.Table) -> tuple[Group, ...]:
    """Rows of quarantine_schema by stage, modality and reason, the most frequent first."""
    found: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for row in rows.select(["id", "modality", "stage", "reason"]).to_pylist():
        found.setdefault((row["stage"], row["modality"], _kind(row["reason"])), []).append(row)
    groups = [
        Group(stage, modality, reason, len(some), str(some[0]["reason"]), str(some[0]["id"]))
        for (stage, modality, reason), some in found.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-group.count, group.stage, group.modality, group.reason)))


def sample_of(rows: pa.Table, most: int) -> pa.Table:
    """At most `most` rows of each group, in their order."""
    import pyarrow as pa

    seen: dict[tuple[str, str, str], int] = {}
    kept = []
    for number, row in enumerate(rows.select(["modality", "stage", "reason"]).to_pylist()):
        key = (row["stage"], row["modality"], _kind(row["reason"]))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= most:
            kept.append(number)
    return rows.take(pa.array(kept, pa.int64()))


def _kind(reason: str) -> str:
    """A reason without what tells single values apart: where it lay, numbers (but HTTP's), first bytes."""
    text = re.sub(r"\[[^\]]*\]", "[...]", reason)
    text = re.sub(r"begins with [0-9a-f]+", "begins with ...", text)
    return re.sub(r"(?<!HTTP )\b\d[\d,.]*", "#", text)
