"""Compaction of a table's head, bounded: small fragments together, fragments with many deleted rows anew.

Assumes: one night at a time (its lease is held), between its commit and its indexing; rows, values and ids stay, their
addresses change, and indexes follow. Old versions keep their own files.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import ConservationError

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.upkeep import Upkeep

SMALL_BYTES = 16 << 20
_EVERY_ROW = 1 << 40


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction did; source_mb: of data read; merged: indexes whose deltas were put together for it."""

    fragments_before: int
    fragments_after: int
    rewritten: int = 0
    source_mb: float = 0.0
    merged: tuple[str, ...] = ()
    version: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Fragment:
    """size_bytes: of its data files; rows: not deleted."""

    number: int
    size_bytes: int
    rows: int
    deleted: int

    @property
    def deleted_share(self) -> float:
        return self.deleted / max(self.rows + self.deleted, 1)


def compact(uri: str, upkeep: Upkeep, *, small_bytes: int = SMALL_BYTES) -> CompactionReport:
    """Compact the head as far as one night may; nothing happens where nothing needs it.

    Raises ConservationError if the number of rows changed, which Lance never should.
    """
    started = time.perf_counter()
    before = store.open_version(uri, None)
    fragments = _fragments(before)
    row_bytes = sum(f.size_bytes for f in fragments) / max(sum(f.rows + f.deleted for f in fragments), 1)
    target = max(int(small_bytes / max(row_bytes, 1)), 1)
    small = [f for f in fragments if f.rows < target]
    small = _bounded(small, upkeep) if len(small) > upkeep.small_fragments else []
    spent = sum(f.size_bytes for f in small)
    worn = [f for f in fragments if f.deleted_share > upkeep.deleted_share and f not in small]
    worn = _bounded(sorted(worn, key=lambda f: -f.deleted_share), upkeep, spent)
    merged: tuple[str, ...] = ()
    rewritten = 0
    with storage.explaining("compact the table", uri):
        if small:
            merged = _merge_deltas(uri, {f.number for f in small})
            rewritten = rewrite(uri, {f.number for f in small}, rows=target, deleted_share=upkeep.deleted_share)
        if worn:
            largest = max(f.rows + f.deleted for f in worn)
            rewritten += rewrite(uri, {f.number for f in worn}, rows=largest, deleted_share=upkeep.deleted_share)
    after = store.open_version(uri, None)
    if after.count_rows() != before.count_rows():
        what = f"{before.count_rows()} rows before compaction, {after.count_rows()} after"
        raise ConservationError(what, where=f"{uri} version {after.version}", next="`conjoin run` starts from live")
    return CompactionReport(
        len(fragments),
        len(after.get_fragments()),
        rewritten,
        round(sum(f.size_bytes for f in [*small, *worn]) / 1e6, 3) if rewritten else 0.0,
        merged,
        int(after.version),
        round(time.perf_counter() - started, 3),
    )


def _fragments(dataset: lance.LanceDataset) -> list[_Fragment]:
    found = []
    for fragment in dataset.get_fragments():
        meta = fragment.metadata
        size = sum(file.file_size_bytes or 0 for file in meta.files)
        found.append(_Fragment(fragment.fragment_id, size, meta.num_rows, meta.num_deletions))
    return found


def _bounded(fragments: Iterable[_Fragment], upkeep: Upkeep, spent: int = 0) -> list[_Fragment]:
    """The first of them within the night's megabytes."""
    limit, chosen = upkeep.compact_mb * 10**6, []
    for fragment in fragments:
        spent += fragment.size_bytes
        if spent > limit:
            break
        chosen.append(fragment)
    return chosen


def _merge_deltas(uri: str, small: Collection[int]) -> tuple[str, ...]:
    """Lance compacts fragments together only where the same index parts cover them; each night leaves a part."""
    merged = []
    for name, parts in index_parts(store.open_version(uri, None)).items():
        newest = 0
        for covered in reversed(parts):
            if not covered <= set(small):
                break
            newest += 1
        if newest > 1:
            dataset = store.open_version(uri, None)
            dataset.optimize.optimize_indices(index_names=[name], num_indices_to_merge=newest)
            merged.append(name)
    return tuple(merged)


def index_parts(dataset: lance.LanceDataset) -> dict[str, list[set[int]]]:
    """The fragments that each part of an index covers, oldest part first, by the index's name."""
    return {index.name: [set(part.fragment_ids) for part in index.segments] for index in dataset.describe_indices()}


def rewrite(uri: str, numbers: Collection[int], *, rows: int = _EVERY_ROW, deleted_share: float = 0.0) -> int:
    """Write these fragments of the head anew without their deleted rows; returns how many were.

    rows: of a new fragment at most, and of an old one that is worth putting together with its neighbours;
    deleted_share: above it a fragment is written anew by itself. Indexes are remapped in the same commit.
    """
    from lance.optimize import Compaction, CompactionOptions

    dataset = store.open_version(uri, None)
    others = [f.fragment_id for f in dataset.get_fragments() if f.fragment_id not in numbers]
    options = CompactionOptions(
        target_rows_per_fragment=rows, materialize_deletions_threshold=deleted_share, excluded_fragment_ids=others
    )
    tasks = Compaction.plan(dataset, options).tasks
    if tasks:
        Compaction.commit(dataset, [task.execute(dataset) for task in tasks])
    return sum(len(task.fragments) for task in tasks)
