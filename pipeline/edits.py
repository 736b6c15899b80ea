"""Edits of fragments that exist: where rows lie, deletions, columns rewritten; staged like new fragments, uncommitted.

Assumes: addresses (fragment << 32 | offset) belong to the version they were found in; an edit becomes visible only
with the commit that names its files, so repeating one costs a file and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage
from conjoin.pipeline.errors import ConservationError

if TYPE_CHECKING:
    import lance
    import numpy as np
    import pyarrow as pa

# Above this share of the table a pass over the id column is quicker than its index.
_INDEX_SHARE = 0.02
_IDS_A_QUERY = 5_000
_BATCH_ROWS = 50_000
_OFFSET_BITS = 32


def wants_a_pass(dataset: lance.LanceDataset, num_ids: int) -> bool:
    """Whether the addresses of so many ids are found sooner by a pass over all of them."""
    return num_ids > _INDEX_SHARE * dataset.count_rows()


def addresses_of(dataset: lance.LanceDataset, ids: pa.ChunkedArray | None = None) -> Iterator[pa.Table]:
    """(id, address) of the rows with these ids, by the id index; ids: None for every row, by one pass."""
    import pyarrow as pa

    if ids is None:
        for batch in dataset.scanner(columns=["id"], with_row_address=True, batch_size=_BATCH_ROWS).to_batches():
            yield _addresses(pa.Table.from_batches([batch]))
        return
    for start in range(0, len(ids), _IDS_A_QUERY):
        some = ", ".join(_literal(key) for key in ids.slice(start, _IDS_A_QUERY).to_pylist())
        yield _addresses(dataset.to_table(columns=["id"], filter=f"id IN ({some})", with_row_address=True))


def _literal(key: object) -> str:
    return str(key) if isinstance(key, int) else "'" + str(key).replace("'", "''") + "'"


def _addresses(table: pa.Table) -> pa.Table:
    return table.select(["id", "_rowaddr"]).rename_columns(["id", "address"])


def rows_at(dataset: lance.LanceDataset, addresses: pa.Array, columns: Sequence[str]) -> pa.Table:
    """Columns of the rows at these addresses, in their order. Raises ConservationError if some are gone."""
    found = dataset._take_rows(addresses.to_pylist(), columns=list(columns))
    if found.num_rows != len(addresses):
        what = f"{len(addresses)} rows wanted, {found.num_rows} there"
        raise ConservationError(what, where=f"{dataset.uri} version {dataset.version}")
    return found


def rewrite(dataset: lance.LanceDataset, fragment: int, rows: pa.Table) -> tuple[Json, list[int]]:
    """Stage new values for some columns of one fragment; other rows keep theirs.

    rows: `_rowaddr` (uint64) and the columns. Returns Lance's JSON of the fragment and the rewritten field ids.
    """
    with storage.explaining("rewrite columns", str(dataset.uri)):
        updated, fields = dataset.get_fragment(fragment).update_columns(rows, "_rowaddr", "_rowaddr")
    return cast(Json, updated.to_json()), list(fields)


def delete(dataset: lance.LanceDataset, addresses: np.ndarray) -> dict[int, Json]:
    """Stage deletions: Lance's JSON of every touched fragment, None where nothing of it is left.

    addresses: (N,) uint64. Raises ConservationError if Lance marked other rows than these.
    """
    import numpy as np

    if not len(addresses):
        return {}
    fragments = (addresses >> np.uint64(_OFFSET_BITS)).astype(np.int64)
    order = np.lexsort((addresses, fragments))
    numbers, starts = np.unique(fragments[order], return_index=True)
    found: dict[int, Json] = {}
    for number, offsets in zip(numbers.tolist(), np.split(addresses[order], starts[1:]), strict=True):
        fragment = dataset.get_fragment(number)
        gone = (offsets & np.uint64((1 << _OFFSET_BITS) - 1)).astype(np.int64).tolist()
        before = fragment.num_deletions
        with storage.explaining("delete rows", str(dataset.uri)):
            left = fragment.delete_rows(gone)
        marked = fragment.physical_rows if left is None else left.deletion_file.num_deleted_rows
        if marked != before + len(gone):
            what = f"{len(gone)} rows of fragment {number} to delete, {marked - before} marked"
            raise ConservationError(what, where=f"{dataset.uri} version {dataset.version}")
        found[number] = None if left is None else cast(Json, left.to_json())
    return found


def merged(rewritten: Mapping[int, Json], deleted: Mapping[int, Json]) -> tuple[list[Json], list[int]]:
    """(fragments that were rewritten, shortened or both, numbers of those of which nothing is left)."""
    removed = [number for number, left in deleted.items() if left is None]
    updated = []
    for number in sorted((rewritten.keys() | deleted.keys()) - set(removed)):
        fragment, shortened = rewritten.get(number), deleted.get(number)
        if fragment is None:
            updated.append(shortened)
        elif shortened is None:
            updated.append(fragment)
        else:
            both = cast("dict[str, Json]", json.loads(json.dumps(fragment)))
            both["deletion_file"] = cast("dict[str, Json]", shortened)["deletion_file"]
            updated.append(both)
    return updated, removed


def add_columns(dataset: lance.LanceDataset, schema: pa.Schema) -> None:
    """Columns of `schema` that the head lacks, all null; only the schema is written. Repeating it changes nothing."""
    import pyarrow as pa

    missing = [field for field in schema if field.name not in dataset.schema.names]
    if missing:
        with storage.explaining("add columns", str(dataset.uri)):
            dataset.add_columns(pa.schema(missing))


def describe(dataset: lance.LanceDataset, metadata: Mapping[bytes, bytes]) -> None:
    """Give the head's schema this metadata besides what it has. Repeating it changes nothing."""
    there = dataset.schema.metadata or {}
    changed = {key.decode(): value.decode() for key, value in metadata.items() if there.get(key) != value}
    if changed:
        with storage.explaining("describe the table", str(dataset.uri)):
            dataset.update_schema_metadata(changed)


def swap_columns(dataset: lance.LanceDataset, dropped: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Drop columns of the head, then rename others ({now: then}). Repeating it changes nothing."""
    there = set(dataset.schema.names)
    # The final name of a new column is taken by the old one, or, once the swap is done, by the new one itself.
    kept = {then for now, then in renamed.items() if now not in there}
    gone = [name for name in dropped if name in there - kept]
    with storage.explaining("swap columns", str(dataset.uri)):
        if gone:
            dataset.drop_columns(gone)
        moves = [{"path": now, "name": then} for now, then in renamed.items() if now in there]
        if moves:
            dataset.alter_columns(*moves)
