"""Held-out rows of the source, embedded now on Ray: groups, content hashes and vectors, as Arrow.

Assumes: reads are cut by the source alone and put back in its order, so that no number of actors changes the result.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from conjoin.pipeline import workers
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.embed import Pool, pool_for
from conjoin.pipeline.progress import Progress, ShowProgress, silent
from conjoin.pipeline.source import list_source, read_rows

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from conjoin.pipeline.embedder import Embedder

# One read of one actor: seconds of a picture tower on a CPU, a few MB of vectors.
_READ_ROWS = 1024
_Batch = Mapping[str, Any]  # Ray Data's, of one item: numpy arrays of length 1


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A split of the catalog's source, `validation` or `test`; label: a column that is kept beside the vectors."""

    catalog: Catalog
    split: str
    label: str | None = None


def embedded(wanted: HeldOut, *, address: str | None = None, progress: ShowProgress = silent) -> pa.Table | None:
    """The split's rows in the source's order: group, label, <modality>_vec and <modality>_hash; None if it is empty.

    Joins Ray at `address`, or starts it here. CPU tasks choose the rows; then one actor per GPU, or one on the CPUs,
    embeds them. Raises what a worker raised, ConjoinError when one died.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    workers.start(address)
    reads = _reads(wanted, progress)
    parts: list[pa.Table] = []
    total, done = sum(len(read["rows"]) for read in reads), 0
    for part in _finished(wanted, reads) if reads else ():
        parts.append(part)
        done += part.num_rows
        progress(Progress("embed", done, total))
    if not parts:
        return None
    rows = pa.concat_tables(parts)
    return rows.take(pc.sort_indices(rows["position"])).drop_columns("position")


def _reads(wanted: HeldOut, progress: ShowProgress) -> list[dict[str, Any]]:
    """Reads of at most _READ_ROWS rows of one row group, in the source's order: file, row_group, rows, position."""
    from ray.data import from_items

    files = list_source(wanted.catalog.source)
    groups: list[dict[str, Any]] = [
        {"order": order, "file": file.path, "row_group": number, "size": size}
        for order, (file, number, size) in enumerate(
            (file, number, size) for file in files for number, size in enumerate(file.row_groups)
        )
    ]
    chosen: dict[int, np.ndarray] = {}
    total, done = sum(file.num_rows for file in files), 0
    with workers.data_settings():
        dataset = from_items(groups, override_num_blocks=max(1, len(groups)))
        choices = dataset.map_batches(_choose, fn_args=(wanted,), batch_size=1)
        for part in _streamed(choices, wanted.catalog.encoder):
            for row in part.to_pylist():
                chosen[row["order"]] = np.asarray(row["rows"], dtype=np.int64)
                done += row["size"]
            progress(Progress("select", done, total))
    reads, first = [], 0
    for group in groups:
        rows = chosen[group["order"]]
        for start in range(0, len(rows), _READ_ROWS):
            some = rows[start : start + _READ_ROWS]
            reads.append({"file": group["file"], "row_group": group["row_group"], "rows": some, "position": first})
            first += len(some)
    return reads


def _choose(batch: _Batch, wanted: HeldOut) -> dict[str, list[Any]]:
    """The rows of a row group that are in the split, from its id and group alone."""
    from conjoin.pipeline.source import group_values, split_of

    source = wanted.catalog.source
    columns = [source.id, *([source.group] if source.group else [])]
    rows = read_rows(source, str(batch["file"][0]), int(batch["row_group"][0]), columns)
    chosen = np.flatnonzero(split_of(group_values(source, rows), source.split) == wanted.split)
    return {"order": [int(batch["order"][0])], "size": [int(batch["size"][0])], "rows": [chosen.tolist()]}


def _finished(wanted: HeldOut, reads: list[dict[str, Any]]) -> Iterator[pa.Table]:
    """Reads through the pool, in whatever order they finish."""
    from ray.data import ActorPoolStrategy, from_items

    pool = pool_for(wanted.catalog.embed.actors, workers.num_cpus(), workers.num_gpus())
    with workers.data_settings():
        done = from_items(reads, override_num_blocks=len(reads)).map_batches(
            Reader,
            fn_constructor_args=(wanted, pool),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(pool.actors, len(reads))),
            num_cpus=1,
            num_gpus=pool.gpus,
        )
        yield from _streamed(done, wanted.catalog.encoder)


class Reader:
    """One process's encoder: a read of rows in, their groups, hashes and vectors out."""

    def __init__(self, wanted: HeldOut, pool: Pool) -> None:
        self._wanted, self._pool = wanted, pool

    # What may raise waits for the first read: of an error in a constructor Ray says only that the actor died.
    @cached_property
    def _embedder(self) -> Embedder:
        import torch

        from conjoin.pipeline.embedder import load

        torch.set_num_threads(self._pool.threads)
        catalog = self._wanted.catalog
        return load(catalog.encoder, precision=catalog.embed.precision)

    def __call__(self, batch: _Batch) -> pa.Table:
        import pyarrow as pa

        from conjoin.pipeline.source import all_columns, group_values

        source, label = self._wanted.catalog.source, self._wanted.label
        names = [*all_columns(source), *([label] if label else [])]
        rows = read_rows(
            source, str(batch["file"][0]), int(batch["row_group"][0]), names, np.asarray(batch["rows"][0], np.int64)
        )
        first = int(batch["position"][0])
        columns: dict[str, pa.Array] = {"position": pa.array(np.arange(first, first + rows.num_rows))}
        columns["group"] = group_values(source, rows).cast(pa.string())
        if label:
            columns["label"] = rows[label].cast(pa.string())
        for modality in source.modalities:
            if modality in self._embedder.spec.towers:
                columns |= self._vectors(rows, modality)
        return pa.table(columns)

    def _vectors(self, rows: pa.Table, modality: str) -> dict[str, pa.Array]:
        """<modality>_vec, null where there is no usable value, and <modality>_hash."""
        import pyarrow as pa

        from conjoin.pipeline.source import content_hashes, python_values, values_of

        values = values_of(self._wanted.catalog.source, rows, modality)
        found = self._embedder.embed(modality, python_values(values))
        flat = pa.array(found.vectors.ravel(), pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self._embedder.spec.dim, mask=pa.array(~found.present))
        return {f"{modality}_vec": vectors, f"{modality}_hash": content_hashes(values)}


def _streamed(dataset: ray.data.Dataset, encoder: str) -> Iterator[pa.Table]:
    """Blocks as they are made. Raises our own error out of Ray's."""
    from ray.exceptions import RayError

    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        return
    except RayError as error:
        advice = "Give it more memory or lower embed.actors"
        failure = workers.failure(error, "an evaluation worker died", where=encoder, next=advice)
    # As in embed.py: frames of the error hold the actors and their CPUs.
    gc.collect()
    raise failure
