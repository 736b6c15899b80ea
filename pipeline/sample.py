"""Fixed samples of a table's rows, read by position or through the id index; never by a scan of the table.

Assumes: a table of at most SAMPLE rows may be read whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

SAMPLE = 20_000
_RUN = 64  # rows that are read together: a row alone costs a request of its own
_IDS_AT_ONCE = 1000
_SEED = 20_240_602


def positions(num_rows: int, most: int) -> np.ndarray:
    """All of at most `most` rows; else runs of neighbours at places that depend on the number of rows alone."""
    if num_rows <= most:
        return np.arange(num_rows)
    starts = np.random.default_rng(_SEED).choice(num_rows // _RUN, max(most // _RUN, 1), replace=False) * _RUN
    return (np.sort(starts)[:, None] + np.arange(_RUN)).ravel()


def rows(dataset: lance.LanceDataset, columns: Sequence[str], most: int | None = None) -> pa.Table:
    """The fixed sample of a version; most: SAMPLE rows, unless told."""
    return take(dataset, positions(dataset.count_rows(), most or SAMPLE), columns)


def take(dataset: lance.LanceDataset, wanted: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Rows by position, ascending, among those that are not deleted.

    By fragment: 20,000 of a million rows with deletions take 0.05 s so, and 3.2 s by the dataset's own `take`, which
    goes through every deletion for it (pylance 14).
    """
    import pyarrow as pa

    parts, start = [dataset.schema.empty_table().select(list(columns))], 0
    for fragment in dataset.get_fragments():
        stop = start + fragment.count_rows()
        first, past = np.searchsorted(wanted, (start, stop))
        if past > first:
            parts.append(fragment.take((wanted[first:past] - start).tolist(), columns=list(columns)))
        start = stop
    return pa.concat_tables(parts)


def can_look_up(dataset: lance.LanceDataset) -> bool:
    """Whether rows are found by id without a scan."""
    if dataset.count_rows() <= SAMPLE:
        return True
    return any(i.field_names == ["id"] and "BTree" in i.type_url for i in dataset.describe_indices())


def rows_of_ids(dataset: lance.LanceDataset, ids: pa.Array | pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
    """id and `columns` of the rows with these ids, in no order; needs `can_look_up`."""
    import pyarrow as pa

    names = list(dict.fromkeys(["id", *columns]))
    values = ids.to_pylist()
    parts = [
        dataset.to_table(columns=names, filter=f"id IN ({', '.join(map(_literal, values[at : at + _IDS_AT_ONCE]))})")
        for at in range(0, len(values), _IDS_AT_ONCE)
    ]
    schema = pa.schema([dataset.schema.field(name) for name in names])
    return pa.concat_tables(parts) if parts else schema.empty_table()


def _literal(value: object) -> str:
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
