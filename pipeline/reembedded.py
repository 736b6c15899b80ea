"""A fixed sample of rows, read from the source and embedded again: is that what the table holds?

Assumes: rows that did not change since live tell whether encoder, libraries or machine did; state files say where they
lie in the source. A file that was replaced meanwhile is left to the next night.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline import sample, storage, store
from conjoin.pipeline.gates import GateResult, Subject
from conjoin.pipeline.state import Manifest, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.embedder import Embedder

NAME = "embedded again"
_FILES, _ROWS_OF_A_FILE = 8, 8
_WITHIN = 256  # rows lie near the beginning of a row group, since reading goes through all before them
# Cosine of a vector and the same one computed by other batches; bf16 on a GPU and float32 here agree to two digits.
_SAME = {"float32": 0.999, "bf16": 0.99, "auto": 0.99}
_SEED = 20_240_603


@dataclass(frozen=True, slots=True)
class _Pick:
    """Rows of one row group, ascending, and their ids."""

    path: str
    row_group: int
    rows: np.ndarray
    ids: pa.Array


def gates(subject: Subject) -> list[GateResult]:
    """One gate per vector column; none where the source cannot be asked, or rows not be looked up by id."""
    import pyarrow as pa

    from conjoin.pipeline.embedder import load

    catalog, dataset = subject.catalog, subject.dataset
    manifest = read_manifest(dataset) if catalog is not None and sample.can_look_up(dataset) else None
    picks = _picks(str(dataset.uri), manifest) if manifest is not None else []
    if catalog is None or not picks:
        return []
    columns = list(subject.columns.values())
    hashes = [f"{column.modality}_hash" for column in columns if f"{column.modality}_hash" in dataset.schema.names]
    ids = pa.concat_arrays([pick.ids for pick in picks])
    stored = sample.rows_of_ids(dataset, ids, [*(column.name for column in columns), *hashes])
    sources = [(pick.ids, _values(catalog, pick, [column.modality for column in columns])) for pick in picks]
    embedder = load(catalog.encoder, precision=catalog.embed.precision)
    results = []
    for column in columns:
        vectors = {
            row["id"]: np.asarray(row[column.name], np.float32)
            for row in _unchanged(subject, column, stored).select(["id", column.name]).to_pylist()
            if row[column.name] is not None
        }
        found = [_cosines(embedder, column.modality, names, values, vectors) for names, values in sources]
        results.append(_gate(subject, column, {name: cosine for part in found for name, cosine in part.items()}))
    return results


def _picks(uri: str, manifest: Manifest) -> list[_Pick]:
    """A few rows of a few files that are as the manifest says; the same ones as long as the files are the same."""
    import pyarrow.parquet as pq

    rng = np.random.default_rng(_SEED)
    known = [file for file in manifest.files if file.path]
    picks = []
    for at in sorted(rng.choice(len(known), min(_FILES, len(known)), replace=False).tolist()):
        file = known[at]
        now = storage.list_stats(file.file.path)
        if [(stat.size_bytes, stat.etag) for stat in now] != [(file.file.size_bytes, file.file.etag)]:
            continue
        state = io.BytesIO(storage.read_bytes(storage.join(store.bookkeeping(uri), file.path)))
        rows = pq.read_table(state, columns=["row_group", "row", "id"])
        groups, numbers = rows["row_group"].to_numpy(), rows["row"].to_numpy()
        group = int(rng.choice(np.unique(groups)))
        near = np.flatnonzero((groups == group) & (numbers < _WITHIN))
        if len(near):
            some = rng.choice(near, min(_ROWS_OF_A_FILE, len(near)), replace=False)
            some = some[np.argsort(numbers[some])]
            picks.append(_Pick(file.file.path, group, numbers[some], rows["id"].take(some).combine_chunks()))
    return picks


def _values(catalog: Catalog, pick: _Pick, modalities: Sequence[str]) -> dict[str, list[object]]:
    """The rows' values by modality, in the order of the pick."""
    from conjoin.pipeline.source import columns_of, python_values, read_rows, values_of

    source = catalog.source
    names = [name for modality in modalities for name in columns_of(source, modality)]
    rows = read_rows(source, pick.path, pick.row_group, names, pick.rows)
    return {modality: python_values(values_of(source, rows, modality)) for modality in modalities}


def _unchanged(subject: Subject, column: store.VectorColumn, stored: pa.Table) -> pa.Table:
    """The rows whose vector is older than tonight; all of them where there is none, or another encoder made it."""
    import pyarrow.compute as pc

    live, name = subject.live, f"{column.modality}_hash"
    if live is None or not sample.can_look_up(live) or name not in live.schema.names or name not in stored.schema.names:
        return stored
    theirs = {other.modality: other.fingerprint for other in store.vector_columns(live).values()}
    if theirs.get(column.modality) != column.fingerprint:
        return stored
    before = sample.rows_of_ids(live, stored["id"], [name])
    then = before[name].take(pc.index_in(stored["id"], value_set=before["id"]))
    same = stored.filter(pc.fill_null(pc.equal(then, stored[name]), False))
    return same if same.num_rows else stored


def _cosines(
    embedder: Embedder,
    modality: str,
    ids: pa.Array,
    values: Mapping[str, list[object]],
    vectors: Mapping[object, np.ndarray],
) -> dict[object, float]:
    """By id, for values that can be had now and are stored: a URI may have gone since."""
    wanted = [(name, value) for name, value in zip(ids.to_pylist(), values[modality], strict=True) if name in vectors]
    found = embedder.embed(modality, [value for _, value in wanted])
    lengths = {name: max(float(np.linalg.norm(vectors[name])), 1e-9) for name, _ in wanted}
    return {
        name: float(vector @ vectors[name] / lengths[name])
        for (name, _), vector, present in zip(wanted, found.vectors, found.present, strict=True)
        if present
    }


def _gate(subject: Subject, column: store.VectorColumn, cosines: Mapping[object, float]) -> GateResult:
    assert subject.catalog is not None
    least, limit = _SAME[subject.catalog.embed.precision], subject.gates.reembedded
    other = [name for name, cosine in cosines.items() if not cosine >= least]
    share = len(other) / max(len(cosines), 1)
    worst = min(cosines, key=lambda name: cosines[name], default=None)
    lowest = f", the lowest cosine is {cosines[worst]:.4f} ({worst!r})" if worst is not None else ""
    detail = (
        f"{column.name}: {len(other)} of {len(cosines)} sampled rows embed to something else than what is stored"
        f"{lowest}, allowed are {limit:.0%} below {least}"
    )
    advice = "Encoder, libraries or machine changed, or a URI gives something else now: `conjoin run --full`"
    return GateResult(f"{NAME}: {column.name}", share <= limit, detail, advice, share, limit)
