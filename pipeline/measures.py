"""What is known of a version's vectors without reading them again: exact answers to fixed queries, sums and counts.

Assumes: a run id stands for one content, so versions that only index, compact or rename share its file; whoever takes
rows out of a table otherwise (to forget an id) calls `drop`, since the file names ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from conjoin.pipeline import storage, store
from conjoin.pipeline.answers import KEPT, Answers, unanswered
from conjoin.pipeline.difference import Difference, difference
from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.sample import take

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

QUERIES = 64  # of every column of the same encoder
_SEED = 20_240_601
_BATCH_ROWS = 8192
_GROWTH = 4  # the queries are drawn anew when the table has so many times as many rows, or as few
_METADATA = b"conjoin"
# Off unit length by more than rounding: float16 keeps about three digits.
_LENGTH_ERROR = {"float": 1e-4, "halffloat": 2e-3}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The vectors that came with a run. broken: with NaN or infinity; off_length: others of another length than 1."""

    seen: int = 0
    broken: int = 0
    off_length: int = 0


@dataclass(frozen=True, slots=True)
class Measure:
    """One vector column. count: vectors that are not null; sum_D: of them, float64; drawn_from: rows of the table when
    the queries were drawn."""

    modality: str
    fingerprint: str
    count: int
    sum_D: np.ndarray
    drawn_from: int
    answers: Answers
    arrivals: Arrivals

    def with_rows(self, ids: pa.Array, vectors: pa.Array, sign: int = 1) -> Measure:
        """The same after rows came (sign 1), or went (-1: of the answers, take the ids out with `without`)."""
        present = vectors.is_valid()
        matrix_ND, arrivals = _checked(vectors.filter(present))
        came = sign > 0
        return replace(
            self,
            count=self.count + sign * len(matrix_ND),
            sum_D=self.sum_D + sign * matrix_ND.sum(axis=0, dtype=np.float64),
            answers=self.answers.with_rows(ids.filter(present), matrix_ND) if came else self.answers,
            arrivals=_both(self.arrivals, arrivals) if came else self.arrivals,
        )

    def without(self, ids: pa.Array) -> Measure:
        return replace(self, answers=self.answers.without(ids))


@dataclass(frozen=True, slots=True)
class Measures:
    """One version; num_rows: of the table; columns: by modality and fingerprint, so that a renamed column keeps its
    own."""

    num_rows: int
    columns: Mapping[tuple[str, str], Measure]

    def of(self, column: store.VectorColumn) -> Measure | None:
        return self.columns.get((column.modality, column.fingerprint))


def measure(dataset: lance.LanceDataset, since: lance.LanceDataset | None = None) -> Measures:
    """What is known of a version; where its run kept nothing, from what `since` kept and the rows that differ, else
    from one pass over the column. Kept for the run, so that asking again costs one small file.
    """
    run = store.run_of(dataset).get(store.RUN_ID)
    kept = _read(dataset, run)
    old = known(since) if since is not None else None
    columns = store.vector_columns(dataset)
    found: dict[tuple[str, str], Measure] = {}
    change: Difference | None = None
    for column in columns.values():
        ready = kept.of(column) if kept else None
        before = old.of(column) if old else None
        if ready is None and before is not None and since is not None and column.name in since.schema.names:
            change = change or difference(since, dataset)
            ready = _updated(before, column, change)
        found[column.modality, column.fingerprint] = ready or _whole(dataset, column)
    measures = Measures(dataset.count_rows(), found)
    if run is not None and (kept is None or set(found) != set(kept.columns)):
        storage.write_bytes(_path(dataset, run), _to_bytes(measures, dataset.schema.field("id").type))
    return measures


def known(dataset: lance.LanceDataset) -> Measures | None:
    """What was kept of a version's run, None if nothing was; reads no row."""
    return _read(dataset, store.run_of(dataset).get(store.RUN_ID))


def drop(uri: str) -> int:
    """Remove what is kept of every run (it names ids); the next night measures with one pass. Returns how many."""
    found = [path for path in storage.list_files(storage.join(store.bookkeeping(uri), "state")) if path.endswith(_FILE)]
    for path in found:
        storage.remove(path)
    return len(found)


_FILE = "/measures.parquet"


def _path(dataset: lance.LanceDataset, run: str) -> str:
    """Beside the run's state, so that it lives and goes with that."""
    return storage.join(store.bookkeeping(str(dataset.uri)), f"state/{run}{_FILE}")


def _updated(measure: Measure, column: store.VectorColumn, change: Difference) -> Measure | None:
    """By the rows that differ; None where one pass over everything costs less, or the queries are too old."""
    changed = change.num_added + change.num_removed + 2 * change.num_rewritten(column.name)
    num_rows = change.after.count_rows()
    if changed > num_rows or not measure.drawn_from / _GROWTH <= num_rows <= measure.drawn_from * _GROWTH:
        return None
    names = ["id", column.name]
    found = replace(measure, arrivals=Arrivals())
    for rows in change.removed_rows(names):
        found = found.with_rows(rows["id"], rows[column.name], -1).without(rows["id"])
    rewritten = list(change.rewritten_rows(names)) if column.name in change.rewritten else []
    for then, now in rewritten:
        found = found.with_rows(then["id"], then[column.name], -1).without(then["id"])
        found = found.with_rows(now["id"], now[column.name])
    for rows in change.added_rows(names):
        found = found.with_rows(rows["id"], rows[column.name])
    short_Q = found.answers.short
    if not short_Q.any():
        return found
    again = _answered(change.after, column, found.answers.forgotten(short_Q))
    return replace(found, answers=found.answers.replaced(short_Q, again))


def _whole(dataset: lance.LanceDataset, column: store.VectorColumn) -> Measure:
    """One pass over the column."""
    nothing = np.zeros(dataset.schema.field(column.name).type.list_size, np.float64)
    answers, num_rows = _questions(dataset, column), dataset.count_rows()
    found = Measure(column.modality, column.fingerprint, 0, nothing, num_rows, answers, Arrivals())
    for rows in _batches(dataset, column):
        found = found.with_rows(rows["id"], rows[column.name])
    return found


def _answered(dataset: lance.LanceDataset, column: store.VectorColumn, questions: Answers) -> Answers:
    for rows in _batches(dataset, column):
        present = rows[column.name].is_valid()
        questions = questions.with_rows(rows["id"].filter(present), _checked(rows[column.name].filter(present))[0])
    return questions


def _batches(dataset: lance.LanceDataset, column: store.VectorColumn) -> Iterable[pa.RecordBatch]:
    return cast("Iterable[pa.RecordBatch]", dataset.to_batches(columns=["id", column.name], batch_size=_BATCH_ROWS))


def _questions(dataset: lance.LanceDataset, column: store.VectorColumn) -> Answers:
    """Queries from every column of the same encoder: words asking pictures differ from pictures asking pictures.

    Vectors of the column itself lean towards one of another row. A row that is only moved finds its near-duplicates, in
    partitions that one probe reaches; a picture that nothing of the table resembles that much does not (1,000,000 rows
    that come ten times, recall with 10 probes: pictures of no row .95, these .93, moved rows 1).
    """
    rng = np.random.default_rng(_SEED)
    count = dataset.count_rows()
    rows = np.sort(rng.choice(count, min(4 * QUERIES, count), replace=False))
    askers: list[str] = []
    kind = dataset.schema.field(column.name).type
    parts = [np.zeros((0, kind.list_size), np.float32)]
    for other in store.vector_columns(dataset).values():
        if other.fingerprint != column.fingerprint or dataset.schema.field(other.name).type != kind:
            continue
        queries_QD = _queries(dataset, other, rows)
        if other.name == column.name:
            queries_QD = leaning(queries_QD, rng)
        parts.append(queries_QD / np.maximum(np.linalg.norm(queries_QD, axis=1, keepdims=True), 1e-9))
        askers += [other.modality] * len(queries_QD)
    return unanswered(np.concatenate(parts), askers)


def leaning(vectors_QD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each of these unit vectors with a share of another (Q, D), not of unit length."""
    order = rng.permutation(len(vectors_QD))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # never itself
    return np.asarray(0.7 * vectors_QD + 0.3 * vectors_QD[other], np.float32)


def _queries(dataset: lance.LanceDataset, column: store.VectorColumn, rows: np.ndarray) -> np.ndarray:
    """Vectors of the rows; of the first rows that have one where most have none."""
    found = take(dataset, rows, [column.name]).column(0).combine_chunks().drop_null()
    if len(found) < QUERIES:
        present = f"`{column.name}` IS NOT NULL"
        found = dataset.to_table(columns=[column.name], filter=present, limit=QUERIES).column(0).combine_chunks()
    return _checked(found)[0][:QUERIES]


def matrix(vectors: pa.Array) -> np.ndarray:
    """Arrow vectors without nulls to (N, D) float32."""
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(-1, vectors.type.list_size)


def _checked(vectors: pa.Array) -> tuple[np.ndarray, Arrivals]:
    """(N, D) float32 with zeros for what is not finite, so that no sum is lost to it, and what was found."""
    matrix_ND = matrix(vectors)
    limit = _LENGTH_ERROR.get(str(vectors.type.value_type), 1e-4)
    with np.errstate(over="ignore", invalid="ignore"):
        error_N = np.abs(np.sqrt(np.einsum("nd,nd->n", matrix_ND, matrix_ND)) - 1)
    off_N = ~(error_N <= limit)
    if not off_N.any():
        return matrix_ND, Arrivals(len(matrix_ND))
    broken_N = ~np.isfinite(matrix_ND).all(axis=1)
    whole_ND = np.where(broken_N[:, None], np.float32(0), matrix_ND)
    return whole_ND, Arrivals(len(matrix_ND), int(broken_N.sum()), int((off_N & ~broken_N).sum()))


def _both(one: Arrivals, two: Arrivals) -> Arrivals:
    return Arrivals(one.seen + two.seen, one.broken + two.broken, one.off_length + two.off_length)


def _to_bytes(measures: Measures, id_type: pa.DataType) -> bytes:
    """Parquet, one row per query; what belongs to a column is JSON in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts: list[dict[str, object]] = []
    parts: list[pa.Table] = []
    for number, found in enumerate(measures.columns.values()):
        facts.append(
            {
                "modality": found.modality,
                "fingerprint": found.fingerprint,
                "count": found.count,
                "sum": found.sum_D.tolist(),
                "drawn_from": found.drawn_from,
                "arrivals": [found.arrivals.seen, found.arrivals.broken, found.arrivals.off_length],
            }
        )
        answers = found.answers
        columns = {
            "column": pa.array([number] * len(answers), pa.int32()),
            "asker": pa.array(answers.askers, pa.string()),
            "query": pa.array(list(answers.queries_QD), pa.list_(pa.float32())),
            "ids": pa.array(answers.ids_QK.tolist(), pa.list_(id_type)),
            "similarities": pa.array(list(answers.similarities_QK), pa.list_(pa.float32())),
            "floor": pa.array(answers.floor_Q, pa.float32()),
        }
        parts.append(pa.table(columns))
    about = json.dumps({"format": storage.FORMAT, "num_rows": measures.num_rows, "columns": facts}).encode()
    out = io.BytesIO()
    pq.write_table(pa.concat_tables(parts).replace_schema_metadata({_METADATA: about}), out, compression="zstd")
    return out.getvalue()


def _read(dataset: lance.LanceDataset, run: str | None) -> Measures | None:
    """What a run kept, if it is about as many rows as there are. Raises StorageError for a newer format."""
    import pyarrow.parquet as pq

    if run is None or not storage.exists(path := _path(dataset, run)):
        return None
    table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
    about = json.loads(table.schema.metadata[_METADATA])
    if about["format"] > storage.FORMAT:
        what = f"written by a newer conjoin (format {about['format']})"
        raise StorageError(what, where=path, next="Upgrade conjoin")
    if about["num_rows"] != dataset.count_rows():
        return None
    numbers = table["column"].to_numpy()
    found = [_from(facts, table.filter(numbers == number)) for number, facts in enumerate(about["columns"])]
    return Measures(about["num_rows"], {(one.modality, one.fingerprint): one for one in found})


def _from(facts: dict[str, object], rows: pa.Table) -> Measure:
    sum_D = np.array(facts["sum"], dtype=np.float64)
    ids = rows["ids"].to_pylist()
    ids_QK = np.full((len(ids), KEPT), None, dtype=object)
    for query, names in enumerate(ids):
        ids_QK[query] = names
    answers = Answers(
        np.array(rows["query"].to_pylist(), np.float32).reshape(-1, len(sum_D)),
        tuple(rows["asker"].to_pylist()),
        ids_QK,
        np.array(rows["similarities"].to_pylist(), np.float32).reshape(-1, KEPT),
        rows["floor"].to_numpy().astype(np.float32),
    )
    return Measure(
        str(facts["modality"]),
        str(facts["fingerprint"]),
        cast(int, facts["count"]),
        sum_D,
        cast(int, facts["drawn_from"]),
        answers,
        Arrivals(*cast("list[int]", facts["arrivals"])),
    )
