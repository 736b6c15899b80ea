"""Gates about the vectors themselves: whole, of unit length, told apart, where they were, and found again.

Assumes: every vector is looked at once, in the night it came (measures.py); old ones passed then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline import sample, store
from conjoin.pipeline.difference import difference
from conjoin.pipeline.gates import GateResult, Subject
from conjoin.pipeline.measures import Measure, known, matrix, measure
from conjoin.pipeline.metrics import hits
from conjoin.pipeline.records import group_values, split_of

if TYPE_CHECKING:
    import pyarrow as pa

K = 10
_BESIDE = 2_000  # old rows that new ones are compared with, so that the gate is not about three rows
_MOST_QUERIES, _FEWEST_QUERIES = 1000, 20
_AGAIN = "Look at the encoder and at tonight's records; `conjoin run --full` embeds everything anew"


def vector_gates(subject: Subject) -> list[GateResult]:
    """Per vector column of tonight's encoder; then pairs of modalities against live."""
    measures = measure(subject.dataset, subject.live)
    before = known(subject.live) if subject.live is not None else None
    results = []
    for column in subject.columns.values():
        found = measures.of(column)
        assert found is not None
        results += [_whole_gate(column, found), _duplicate_gate(subject, column)]
        old = before.of(column) if before else None
        if old is not None and old.count and found.count:
            results.append(_centroid_gate(subject, column, old, found))
    return [*results, *_hit_gates(subject)]


def _whole_gate(column: store.VectorColumn, found: Measure) -> GateResult:
    came = found.arrivals
    detail = (
        f"{column.name}: {came.broken} not finite and {came.off_length} not of unit length, of {came.seen} new ones"
    )
    return GateResult(f"vectors of {column.name}", came.broken == came.off_length == 0, detail, _AGAIN)


def _duplicate_gate(subject: Subject, column: store.VectorColumn) -> GateResult:
    """An encoder that collapsed gives one vector to different contents."""
    import pyarrow.compute as pc

    rows = _changed_rows(subject, column)
    present = rows.filter(pc.is_valid(rows[column.name]))
    group = _codes_of_vectors(matrix(present[column.name].combine_chunks()))
    contents = group
    if f"{column.modality}_hash" in rows.schema.names:
        contents = _codes_of_hashes(present[f"{column.modality}_hash"])
    pairs = np.unique(np.stack([group, contents], axis=1), axis=0)
    contents_per_vector = np.bincount(pairs[:, 0], minlength=1)
    shared = int((contents_per_vector[group] > 1).sum()) if len(group) else 0
    share, limit = shared / max(len(group), 1), subject.gates.duplicate_vectors
    detail = f"{column.name}: {share:.1%} share their vector with another content, allowed are {limit:.1%}"
    return GateResult(f"duplicate vectors of {column.name}", share <= limit, detail, _AGAIN, share, limit)


def _codes_of_vectors(matrix_ND: np.ndarray) -> np.ndarray:
    """Equal numbers for equal vectors."""
    rows = np.ascontiguousarray(matrix_ND)
    keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    return np.unique(keys, return_inverse=True)[1].ravel()


def _codes_of_hashes(hashes: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    values = [value or b"" for value in hashes.combine_chunks().cast(pa.binary()).to_pylist()]
    return np.unique(np.array(values, dtype="S16"), return_inverse=True)[1].ravel()


def _changed_rows(subject: Subject, column: store.VectorColumn) -> pa.Table:
    """Vector and hash of up to SAMPLE rows that came, beside some old ones; of the fixed sample on a first night."""
    import pyarrow as pa

    names = [name for name in (column.name, f"{column.modality}_hash") if name in subject.dataset.schema.names]
    if subject.live is None:
        return sample.rows(subject.dataset, names)
    change = difference(subject.live, subject.dataset)
    batches: Iterator[pa.RecordBatch] = change.added_rows(names)
    if column.name in change.rewritten:
        batches = itertools.chain(batches, (now for _, now in change.rewritten_rows(names)))
    beside = sample.rows(subject.dataset, names, _BESIDE)
    parts, count = [beside], 0
    for batch in batches:
        parts.append(pa.Table.from_batches([batch]).cast(beside.schema))
        count += batch.num_rows
        if count >= sample.SAMPLE:
            break
    return pa.concat_tables(parts)


def _centroid_gate(subject: Subject, column: store.VectorColumn, old: Measure, found: Measure) -> GateResult:
    lengths = np.linalg.norm(old.sum_D) * np.linalg.norm(found.sum_D)
    shift = max(0.0, float(1 - old.sum_D @ found.sum_D / lengths)) if lengths > 0 else 0.0
    limit = subject.gates.centroid_shift
    detail = f"{column.name}: the mean vector moved by {shift:.4f} (1 - cosine), allowed are {limit:.4f}"
    advice = "Look at what is new in the source: its records differ from those before, or the encoder does"
    return GateResult(f"centroid of {column.name}", shift <= limit, detail, advice, shift, limit)


def _hit_gates(subject: Subject) -> list[GateResult]:
    """Held-out records of a fixed pool: does one modality find its record by the other as well as in live?"""
    if subject.live is None or not sample.can_look_up(subject.live):
        return []
    known_columns = store.vector_columns(subject.live).items()
    theirs = {column.modality: column for name, column in known_columns if not name.endswith(store.NEXT)}
    modalities = [modality for modality in subject.columns if modality in theirs]
    pool = _pool(subject, modalities, theirs) if len(modalities) > 1 else None
    if pool is None:
        return []
    return [_hit_gate(subject, pool, a, b) for a, b in itertools.permutations(modalities, 2)]


def _pool(subject: Subject, modalities: list[str], theirs: dict[str, store.VectorColumn]) -> pa.Table | None:
    """asks, and new:<modality>, old:<modality> of the sampled rows that are in both versions; None if those are few."""
    import pyarrow as pa
    import pyarrow.compute as pc

    assert subject.live is not None
    group = _group_column(subject)
    ours = {subject.columns[modality].name: f"new:{modality}" for modality in modalities}
    rows = sample.rows(subject.dataset, ["id", *([group] if group else []), *ours])
    before = {theirs[modality].name: f"old:{modality}" for modality in modalities}
    known_rows = sample.rows_of_ids(subject.live, rows["id"], list(before))
    place = pc.index_in(rows["id"], value_set=known_rows["id"])
    there = pc.is_valid(place)
    rows, known_rows = rows.filter(there), known_rows.take(place.filter(there))
    columns = {name: rows[column] for column, name in ours.items()}
    columns |= {name: known_rows[column] for column, name in before.items()}
    whole = np.ones(rows.num_rows, bool)
    for values in columns.values():
        whole &= pc.is_valid(values).to_numpy(zero_copy_only=False)
    asks = whole & _held_out(subject, rows, group)
    if asks.sum() < _FEWEST_QUERIES:
        asks = whole
    if asks.sum() < _FEWEST_QUERIES:
        return None
    asks &= np.cumsum(asks) <= _MOST_QUERIES
    return pa.table({"asks": pa.array(asks), **columns}).filter(pa.array(whole))


def _group_column(subject: Subject) -> str | None:
    group = subject.catalog.source.group if subject.catalog else None
    return group if group in subject.dataset.schema.names else None


def _held_out(subject: Subject, rows: pa.Table, group: str | None) -> np.ndarray:
    """Records of the validation split, as far as the table can tell: its groups may not be kept in it."""
    if subject.catalog is None:
        return np.ones(rows.num_rows, bool)
    source = subject.catalog.source
    if source.group is not None and group is None:
        return np.ones(rows.num_rows, bool)
    source = source.model_copy(update={"id": "id"})
    return split_of(group_values(source, rows), source.split) == "validation"


def _hit_gate(subject: Subject, pool: pa.Table, asking: str, asked: str) -> GateResult:
    asks = pool["asks"].to_numpy(zero_copy_only=False)
    rows = np.arange(pool.num_rows)
    means = []
    for when in ("old", "new"):
        queries, candidates = (matrix(pool[f"{when}:{name}"].combine_chunks()) for name in (asking, asked))
        found = hits(np.nan_to_num(queries[asks]), np.nan_to_num(candidates), rows[asks], rows, (K,))
        means.append(float(found[K].mean()))
    drop, limit = means[0] - means[1], subject.gates.hit_at_10_drop
    detail = (
        f"{asking} finds its {asked} among {pool.num_rows} for {means[1]:.1%} of {asks.sum()} held-out records, "
        f"in live for {means[0]:.1%}; allowed is a drop of {limit:.1%}"
    )
    return GateResult(f"hit@10 {asking} to {asked}", drop <= limit + 1e-9, detail, _AGAIN, means[1], means[0] - limit)
