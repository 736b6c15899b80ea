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
from conjoin.pipeline.progress import Progress, ShowProgress
from conjoin.pipeline.selection import Positions, Selection

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
    source: SourceConfig


@dataclass(frozen=True, slots=True)
class Features:
    """values_CW: float32, one row per distinct content; content_N: that row for every record, -1 where it has none."""

    values_CW: NDArray[np.float32]
    content_N: Positions
    bad: int


def compute(frozen: Frozen, rows: Selection, num_actors: int, progress: ShowProgress) -> Features:
    """Features of these records; only contents that are not kept yet are computed, on a fixed-size actor pool.

    Raises TrainError when no record has a usable value.
    """
    hashes_N = _hashes(frozen, rows, progress)
    contents, first = np.unique(hashes_N, return_index=True)
    keep = contents != ""
    contents, first = contents[keep], first[keep]
    known = {name for part in _parts(frozen.directory) for name in part}
    wanted = np.sort(first[[name not in known for name in contents.tolist()]])
    _run(frozen, rows, wanted, num_actors, progress)
    values: dict[str, NDArray[np.float32]] = {}
    needed = set(contents.tolist())
    for part in _parts(frozen.directory):
        values |= {name: value for name, value in part.items() if name in needed}
    there = [name for name in contents.tolist() if name in values]
    if not there:
        raise TrainError(f"no record has a usable {frozen.modality}", where=str(frozen.source.path))
    place = {name: number for number, name in enumerate(there)}
    content_N = np.array([place.get(name, -1) for name in hashes_N.tolist()], dtype=np.int64)
    bad = int(((content_N < 0) & (hashes_N != "")).sum())
    return Features(np.stack([values[name] for name in there]), content_N, bad)


def _parts(directory: str) -> Iterator[dict[str, NDArray[np.float32]]]:
    from safetensors.numpy import load

    for uri in storage.list_files(directory):
        if uri.endswith(".safetensors"):
            part = load(storage.read_bytes(uri))
            yield {bytes(name).hex(): value for name, value in zip(part["hash"], part["value"], strict=True)}


def _hashes(frozen: Frozen, rows: Selection, progress: ShowProgress) -> NDArray[np.object_]:
    """The content hash of every record in hex, by position; empty where the value is null."""
    from ray.data import from_items

    from conjoin.pipeline.source import columns_of, content_hashes, read_rows, values_of

    def hash_rows(batch: Mapping[str, NDArray[np.object_]]) -> dict[str, list[object]]:
        where = batch["rows"][0]
        table = read_rows(frozen.source, batch["file"][0], int(batch["row_group"][0]), columns, np.array(where))
        found = content_hashes(values_of(frozen.source, table, frozen.modality)).to_pylist()
        return {"position": list(batch["position"][0]), "hash": [name.hex() if name else "" for name in found]}

    columns = columns_of(frozen.source, frozen.modality)
    items = list(reading_units(rows, np.arange(len(rows))))
    hashes_N = np.zeros(len(rows), dtype=object)
    done = 0
    with workers.data_settings():
        dataset = from_items(items, override_num_blocks=len(items)).map_batches(hash_rows, batch_size=1)
        for batch in dataset.iter_batches(batch_size=None):
            hashes_N[batch["position"]] = batch["hash"]
            done += len(batch["position"])
            progress(Progress(f"hash {frozen.modality}", done, len(rows)))
    return hashes_N


def reading_units(rows: Selection, wanted: Positions, most: int = 1 << 62) -> Iterator[dict[str, object]]:
    """Reads of up to `most` rows of one row group: file, row_group, rows within it (ascending), and their positions."""
    reading = rows.reading[wanted]
    for group in np.unique(reading):
        positions = wanted[reading == group]
        positions = positions[np.argsort(rows.row_N[positions])]
        for piece in np.array_split(positions, -(-len(positions) // most)):
            first = piece[0]
            yield {
                "file": rows.files[rows.file_N[first]],
                "row_group": int(rows.row_group_N[first]),
                "rows": rows.row_N[piece],
                "position": piece,
            }


def _run(frozen: Frozen, rows: Selection, wanted: Positions, num_actors: int, progress: ShowProgress) -> None:
    import ray.data

    items = list(reading_units(rows, wanted, _PART_CONTENTS))
    if not items:
        return
    pool = ray.data.ActorPoolStrategy(size=min(num_actors, len(items)))
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    done = 0
    with workers.data_settings():
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            FeatureActor, fn_constructor_args=(frozen,), batch_size=1, compute=pool, num_cpus=1, num_gpus=gpus
        )
        for batch in dataset.iter_batches(batch_size=None):
            done += int(batch["done"].sum())
            progress(Progress(f"features {frozen.modality}", done, len(wanted)))


class FeatureActor:
    """One process's frozen tower: a read of rows in, one part of the feature store out."""

    def __init__(self, frozen: Frozen) -> None:
        from conjoin.pipeline.embedder import load

        self._frozen = frozen
        self._embedder: Embedder = load(frozen.encoder)

    def __call__(self, batch: Mapping[str, NDArray[np.object_]]) -> dict[str, list[int]]:
        from conjoin.pipeline.decode import decode
        from conjoin.pipeline.source import columns_of, content_hash, python_values, read_rows, values_of

        source, modality = self._frozen.source, self._frozen.modality
        columns = columns_of(source, modality)
        table = read_rows(source, batch["file"][0], int(batch["row_group"][0]), columns, np.array(batch["rows"][0]))
        values = python_values(values_of(source, table, modality))
        hashes = [content_hash(value) for value in values]
        decoded = decode(self._embedder.spec.towers[modality], values)
        found = self._embedder.features(modality, decoded)
        # one vector per content: of a list's values the first stands for it
        kept, place = np.unique(decoded.owners, return_index=True)
        good = np.isfinite(found[place]).all(axis=1)
        kept, place = kept[good], place[good]
        _write_part(self._frozen.directory, [hashes[number] for number in kept], found[place])
        return {"done": [len(values)], "bad": [len(values) - len(kept)]}


def _write_part(directory: str, hashes: Sequence[bytes], values_CW: NDArray[np.float32]) -> None:
    from safetensors.numpy import save

    if not hashes:
        return
    name = hashlib.blake2b(b"".join(hashes), digest_size=12).hexdigest()
    codes = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1)
    body = save({"hash": codes, "value": np.ascontiguousarray(values_CW, dtype=np.float32)})
    storage.write_bytes(storage.join(directory, f"{name}.safetensors"), body)
