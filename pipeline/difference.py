"""What two versions of one table do not share, told from their metadata; the rows of it, streamed.

Assumes: a data file is written once under a name of its own and `id` is never rewritten as a column, so the file that
holds a fragment's ids names the fragment, whatever its number; the table has no stable row ids. A row that was moved
to another fragment (an update, a compaction) is removed and added: consumers compare by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from conjoin.pipeline.edits import rows_at

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

BATCH_ROWS = 8192
ADDRESS = "_rowaddr"  # of a row in one version: its fragment, then its physical offset
_TOMBSTONE = -2  # Lance's id of a field whose values in a data file were replaced
_OFFSET = (1 << 32) - 1


class _Field(Protocol):
    """A field of Lance's own schema; pylance does not export its type."""

    def name(self) -> str: ...
    def id(self) -> int: ...
    def children(self) -> Sequence[_Field]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one fragment: `offsets` are physical, increasing uint32; None means every row that is not deleted."""

    fragment: int
    num_rows: int
    offsets: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """A fragment in both versions, with its number in each, and the rows that live in both (None: all of both)."""

    before: int
    after: int
    num_rows: int
    offsets: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows only in `before`, rows only in `after`, and columns whose values were written anew for rows in both.

    Every reader gives `_rowaddr`, the row's address in its version, where that is among its columns.

    rewritten: by column of `after`; a column that `before` does not have counts as rewritten in every fragment.
    dropped: columns that only `before` has.
    """

    before: lance.LanceDataset | None
    after: lance.LanceDataset
    removed: tuple[Part, ...]
    added: tuple[Part, ...]
    shared: tuple[Shared, ...]
    rewritten: Mapping[str, tuple[Shared, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def num_removed(self) -> int:
        return sum(part.num_rows for part in self.removed)

    @property
    def num_added(self) -> int:
        return sum(part.num_rows for part in self.added)

    def num_rewritten(self, column: str) -> int:
        """Rows in both versions that lie in a fragment where `column` was written anew; not all of them changed."""
        return sum(shared.num_rows for shared in self.rewritten.get(column, ()))

    @property
    def is_empty(self) -> bool:
        return not (self.num_removed or self.num_added or self.rewritten or self.dropped)

    def removed_rows(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """`columns` of the rows only in `before`, as they were there."""
        for part in self.removed:
            assert self.before is not None
            yield from _rows(self.before, part, columns, batch_rows)

    def added_rows(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """`columns` of the rows only in `after`."""
        for part in self.added:
            yield from _rows(self.after, part, columns, batch_rows)

    def rewritten_rows(
        self, columns: Sequence[str], batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
        """(as in `before`, as in `after`), row by row the same rows: those where any of `columns` was written anew.

        Every row of a rewritten fragment comes, changed or not. Columns that `before` lacks are not in its batch, which
        has addresses if it has no column at all.
        """
        wanted = {shared.after: shared for name in columns for shared in self.rewritten.get(name, ())}
        for shared in wanted.values():
            assert self.before is not None
            known = [name for name in columns if name in (*self.before.schema.names, ADDRESS)]
            then = _rows(
                self.before, Part(shared.before, shared.num_rows, shared.offsets), known or [ADDRESS], batch_rows
            )
            now = _rows(self.after, Part(shared.after, shared.num_rows, shared.offsets), columns, batch_rows)
            yield from zip(then, now, strict=True)


def difference(before: lance.LanceDataset | None, after: lance.LanceDataset) -> Difference:
    """Compare two versions of one table, detached ones too, by their fragments' files; no row is read.

    before: None where there is no earlier version; then every row is added.
    """
    theirs = {} if before is None else fragments_by_file(before)
    ours = fragments_by_file(after)
    removed = [_whole(known) for key, known in theirs.items() if key not in ours]
    added = [_whole(known) for key, known in ours.items() if key not in theirs]
    both: list[Shared] = []
    for key in ours.keys() & theirs.keys():
        then, now = theirs[key], ours[key]
        if then.deletion_file() == now.deletion_file():
            both.append(Shared(then.fragment_id, now.fragment_id, then.count_rows()))
            continue
        here, there = _living(then), _living(now)
        common = np.intersect1d(here, there, assume_unique=True)
        both.append(Shared(then.fragment_id, now.fragment_id, len(common), common))
        removed += _some(then.fragment_id, np.setdiff1d(here, common, assume_unique=True))
        added += _some(now.fragment_id, np.setdiff1d(there, common, assume_unique=True))
    shared = tuple(sorted(both, key=lambda pair: pair.after))
    return Difference(
        before,
        after,
        _in_order(removed),
        _in_order(added),
        shared,
        {} if before is None else _rewritten(before, after, shared),
        () if before is None else tuple(n for n in before.schema.names if n not in after.schema.names),
    )


def fragments_by_file(dataset: lance.LanceDataset) -> dict[str, lance.LanceFragment]:
    """Fragments by the path of the data file that holds their ids, which is the same in every version."""
    key = _leaves(dataset)["id"]
    return {_files(fragment, key)[0][0]: fragment for fragment in dataset.get_fragments()}


def _leaves(dataset: lance.LanceDataset) -> dict[str, tuple[int, ...]]:
    """Ids of the fields that a column consists of (a struct has several), by the column's name."""

    def below(node: _Field) -> Iterator[int]:
        yield node.id()
        for child in node.children():
            yield from below(child)

    return {node.name(): tuple(below(node)) for node in dataset.lance_schema.fields()}


def _files(fragment: lance.LanceFragment, fields: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """(path of the data file, field) for each of these fields; without those whose values are null and in no file."""
    place = {number: file.path for file in fragment.data_files() for number in file.fields if number != _TOMBSTONE}
    return tuple((place[number], number) for number in fields if number in place)


def _whole(fragment: lance.LanceFragment) -> Part:
    return Part(fragment.fragment_id, fragment.count_rows())


def _some(fragment: int, offsets: np.ndarray) -> list[Part]:
    return [Part(fragment, len(offsets), offsets)] if len(offsets) else []


def _in_order(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: part.fragment))


def _living(fragment: lance.LanceFragment) -> np.ndarray:
    """Physical offsets of the rows that are not deleted, from the deletion file alone."""
    found = fragment.scanner(columns=[], with_row_address=True).to_table()["_rowaddr"].to_numpy()
    return (found & np.uint64(_OFFSET)).astype(np.uint32)


def _rewritten(
    before: lance.LanceDataset, after: lance.LanceDataset, shared: Sequence[Shared]
) -> dict[str, tuple[Shared, ...]]:
    theirs, ours = _leaves(before), _leaves(after)
    then = {fragment.fragment_id: fragment for fragment in before.get_fragments()}
    now = {fragment.fragment_id: fragment for fragment in after.get_fragments()}

    def differs(name: str, pair: Shared) -> bool:
        here = _files(then[pair.before], theirs[name]) if name in theirs else None
        return here != _files(now[pair.after], ours[name])

    found = {name: tuple(pair for pair in shared if differs(name, pair)) for name in ours}
    return {name: pairs for name, pairs in found.items() if pairs}


def _rows(dataset: lance.LanceDataset, part: Part, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The part's rows in batches of `batch_rows` (the last one shorter), in the order of their offsets."""
    import pyarrow as pa

    fragment = dataset.get_fragment(part.fragment)
    assert fragment is not None
    base = np.uint64(part.fragment) << np.uint64(32)
    addresses = base | (_living(fragment) if part.offsets is None else part.offsets).astype(np.uint64)
    stored = [name for name in columns if name != ADDRESS]
    for start in range(0, part.num_rows, batch_rows):
        some = pa.array(addresses[start : start + batch_rows])
        rows = rows_at(dataset, some, stored).combine_chunks() if stored else pa.table({ADDRESS: some})
        rows = rows.append_column(ADDRESS, some) if stored and ADDRESS in columns else rows
        yield from rows.select(list(columns)).to_batches()
