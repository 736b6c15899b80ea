"""What a frozen tower makes of its inputs, computed once per distinct content and kept, so that heads train fast.

Assumes: a part holds whole contents and is written by rename; its name is the digest of the contents in it, so a
repeated computation replaces its own. Kept below `<train.output>/features/<fingerprint of the frozen backbone>/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conjoin.pipeline import storage, workers
from conjoin.pipeline.errors import TrainError
from conjoin.pipeline.order import Positions
from conjoin.pipeline.progress import Progress, ShowProgress
from conjoin.pipeline.selection import Selection

if TYPE_CHECKING:
    from conjoin.pipeline.embedder import Embedder
    from conjoin.pipeline.source import SourceConfig

_PART_CONTENTS = 512


@dataclass(frozen=True, slots=True)
class Frozen:
    """Where features come from: an encoder folder (heads do not matter) and one of its modalities."""

    encoder: str
    modality: str
    directory: str


@dataclass(frozen=True, slots=True)
class Features:
    """values_CW: float32, one row per distinct content.

    Record n has the contents content_M[start_N[n] : start_N[n + 1]]: one, several where its value is a list, none
    where it has no usable value.
    """

    values_CW: NDArray[np.float32]
    content_M: Positions
    start_N: Positions

    def pick(self, rows: Positions, drawn_by: tuple[int, int] | None, offset: int = 0) -> Positions:
        """The content of each record (B,), -1 for none: the first, or one drawn by (seed, epoch) and the record.

        offset: of the rows within the records that the features are of.
        """
        start, counts = self.start_N[rows + offset], np.diff(self.start_N)[rows + offset]
        chosen = np.zeros(len(rows), dtype=np.int64)
        if drawn_by is not None:
            for place in np.flatnonzero(counts > 1):
                chosen[place] = draw_item(drawn_by, int(rows[place]), int(counts[place]))
        picked = self.content_M[np.minimum(start + chosen, len(self.content_M) - 1)]
        return np.where(counts > 0, picked, -1)


def draw_item(drawn_by: tuple[int, int], row: int, num_items: int) -> int:
    """Which item of a list a record is trained on; drawn_by: seed and epoch."""
    return int(np.random.default_rng([*drawn_by, row, 0]).integers(num_items))


def compute(frozen: Frozen, rows: Selection, num_actors: int, progress: ShowProgress) -> Features:
    """Features of these records; only contents that are not kept yet are computed, on a fixed-size actor pool.

    Raises TrainError when no record has a usable value.
    """
    hashes_N = _hashes(frozen, rows, progress)
    counts = np.array([len(hashes) for hashes in hashes_N], dtype=np.int64)
    flat_M = np.array([name for hashes in hashes_N for name in hashes], dtype=object)
    owner_M = np.repeat(np.arange(len(rows)), counts)
    contents, first = np.unique(flat_M.astype(str), return_index=True)
    known = {name for part in _parts(frozen.directory) for name in part}
    unknown = [name not in known for name in contents.tolist()]
    _run(frozen, (rows, np.unique(owner_M[first[unknown]])), num_actors, progress)
    values: dict[str, NDArray[np.float32]] = {}
    needed = set(contents.tolist())
    for part in _parts(frozen.directory):
        values |= {name: value for name, value in part.items() if name in needed}
    there = [name for name in contents.tolist() if name in values]
    if not there:
        raise TrainError(f"no record has a usable {frozen.modality}", where=rows.files[0])
    place = {name: number for number, name in enumerate(there)}
    content_M = np.array([place.get(name, -1) for name in flat_M.tolist()], dtype=np.int64)
    good = content_M >= 0
    start_N = np.concatenate([[0], np.cumsum(np.bincount(owner_M[good], minlength=len(rows)))])
    return Features(np.stack([values[name] for name in there]), content_M[good], start_N)


def _parts(directory: str) -> Iterator[dict[str, NDArray[np.float32]]]:
    from safetensors.numpy import load

    for uri in storage.list_files(directory):
        if uri.endswith(".safetensors"):
            part = load(storage.read_bytes(uri))
            yield {bytes(name).hex(): value for name, value in zip(part["hash"], part["value"], strict=True)}


def _hashes(frozen: Frozen, rows: Selection, progress: ShowProgress) -> list[list[str]]:
    """The content hashes of every record's values in hex, by position; an empty list where there is none."""
    from ray.data import from_items

    sources, modality = rows.sources, frozen.modality

    def hash_rows(batch: Mapping[str, NDArray[np.object_]]) -> dict[str, list[object]]:
        from conjoin.pipeline.source import content_hash

        values = _read(sources, batch, modality)
        hashes = [" ".join(content_hash(item).hex() for item in items_of(value)) for value in values]
        return {"position": list(batch["position"][0]), "hashes": hashes}

    items = [unit for unit in reading_units(rows, np.arange(len(rows))) if _gives(sources, unit, modality)]
    hashes_N: list[list[str]] = [[] for _ in range(len(rows))]
    total, done = sum(len(np.array(unit["rows"])) for unit in items), 0
    with workers.data_settings():
        dataset = from_items(items, override_num_blocks=len(items) or 1).map_batches(hash_rows, batch_size=1)
        for batch in dataset.iter_batches(batch_size=None):
            for position, hashes in zip(batch["position"], batch["hashes"], strict=True):
                hashes_N[position] = hashes.split()
            done += len(batch["position"])
            progress(Progress(f"hash {modality}", done, total))
    return hashes_N


def _gives(sources: Sequence[SourceConfig], unit: Mapping[str, object], modality: str) -> bool:
    return modality in sources[int(str(unit["source"]))].modalities


def _read(sources: Sequence[SourceConfig], batch: Mapping[str, NDArray[np.object_]], modality: str) -> Sequence[object]:
    """The values of a reading unit, as Ray hands it over."""
    from conjoin.pipeline.source import columns_of, python_values, read_rows, values_of

    source = sources[int(batch["source"][0])]
    where = str(batch["file"][0]), int(batch["row_group"][0])
    table = read_rows(source, *where, columns_of(source, modality), np.array(batch["rows"][0]))
    return python_values(values_of(source, table, modality))


def items_of(value: object) -> list[object]:
    """The values of a record: the items of a list, or itself; nulls left out."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if item is not None]


def reading_units(rows: Selection, wanted: Positions, most: int = 1 << 62) -> Iterator[dict[str, object]]:
    """Reads of up to `most` rows of one row group: source (its number in rows.sources), file, row_group, rows within
    it (ascending), and their positions."""
    reading = rows.taken(wanted).reading
    for group in np.unique(reading):
        positions = wanted[reading == group]
        positions = positions[np.argsort(rows.row_N[positions])]
        for piece in np.array_split(positions, -(-len(positions) // most)):
            first = piece[0]
            yield {
                "source": rows.part_of_file[rows.file_N[first]],
                "file": rows.files[rows.file_N[first]],
                "row_group": int(rows.row_group_N[first]),
                "rows": rows.row_N[piece],
                "position": piece,
            }


def _run(frozen: Frozen, wanted: tuple[Selection, Positions], num_actors: int, progress: ShowProgress) -> None:
    """wanted: positions of a selection."""
    import ray.data

    items = list(reading_units(*wanted, _PART_CONTENTS))
    if not items:
        return
    size = min(num_actors, len(items))
    gpus = min(1, workers.num_gpus())
    threads = max(1, workers.num_cpus() // size)
    done = 0
    with workers.data_settings():
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            FeatureActor,
            fn_constructor_args=(frozen, wanted[0].sources, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=gpus,
        )
        for batch in dataset.iter_batches(batch_size=None):
            done += int(batch["done"].sum())
            progress(Progress(f"features {frozen.modality}", done, len(wanted[1])))


class FeatureActor:
    """One process's frozen tower: a read of rows in, one part of the feature store out; threads: torch's."""

    def __init__(self, frozen: Frozen, sources: Sequence[SourceConfig], threads: int) -> None:
        import torch

        from conjoin.pipeline.embedder import load

        torch.set_num_threads(threads)
        self._frozen, self._sources = frozen, sources
        self._embedder: Embedder = load(frozen.encoder)

    def __call__(self, batch: Mapping[str, NDArray[np.object_]]) -> dict[str, list[int]]:
        from conjoin.pipeline.decode import decode
        from conjoin.pipeline.source import content_hash

        modality = self._frozen.modality
        records = _read(self._sources, batch, modality)
        items = list(dict.fromkeys(item for record in records for item in items_of(record)))
        decoded = decode(self._embedder.spec.towers[modality], items)
        found = self._embedder.features(modality, decoded)
        good = np.isfinite(found).all(axis=1)
        hashes = [content_hash(items[number]) for number in decoded.owners[good]]
        _write_part(self._frozen.directory, hashes, found[good])
        return {"done": [len(records)]}


def _write_part(directory: str, hashes: Sequence[bytes], values_CW: NDArray[np.float32]) -> None:
    from safetensors.numpy import save

    if not hashes:
        return
    name = hashlib.blake2b(b"".join(hashes), digest_size=12).hexdigest()
    codes = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1)
    body = save({"hash": codes, "value": np.ascontiguousarray(values_CW, dtype=np.float32)})
    storage.write_bytes(storage.join(directory, f"{name}.safetensors"), body)
