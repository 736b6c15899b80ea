"""Nights over a small catalog as a run leaves them, without Ray and torch: table, state, quarantine, plans, tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conjoin.pipeline import commits, edits, publish, quarantine, runs, state, storage, store
from conjoin.pipeline.source import SourceFile

DIM = 4
SCHEMA = store.table_schema(
    store.Layout(
        id_type=pa.string(),
        kept=pa.schema([("price", pa.float64())]),
        modalities=("text",),
        uris=(),
        thumbnails=False,
        vector_type=pa.list_(pa.float32(), DIM),
        fingerprint="f" * 32,
        encoder="/encoders/one",
    )
)


def rows(ids: Sequence[str], price: float = 1.0) -> pa.Table:
    vectors = np.random.default_rng(len(ids)).normal(size=(len(ids), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = {
        "id": pa.array(ids),
        "price": pa.array([price] * len(ids)),
        "text": pa.array([f"words of {key}" for key in ids]),
        "text_hash": pa.array([key.encode()[-16:].ljust(16) for key in ids], pa.binary(16)),
        "text_vec": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=SCHEMA.field("text_vec").type),
    }
    return pa.table([made[name] for name in SCHEMA.names], schema=SCHEMA)


@dataclass
class Nights:
    """files: ids by source file as they are now; bad: ids in quarantine; where: of the table, the folder by default."""

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    done: int = 0
    where: str = ""

    @property
    def uri(self) -> str:
        return f"{self.where or self.folder}/things.lance"

    @property
    def books(self) -> Path:
        return Path(store.bookkeeping(self.uri))

    def source(self, name: str) -> Path:
        return self.folder / "source" / f"{name}.parquet"

    def write(self, name: str) -> SourceFile:
        """The source file as the catalog's owner writes it; unchanged content keeps its etag."""
        path, table = self.source(name), pa.table({"id": pa.array(self.files[name], pa.string())})
        if not path.exists() or not pq.read_table(path).equals(table):
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(".new")
            pq.write_table(table, beside)
            beside.replace(path)
        stat = storage.list_stats(str(path))[0]
        return SourceFile(stat.uri, stat.size_bytes, stat.etag, len(table), (len(table),))

    def night(self, publishing: bool = True, **files: list[str]) -> int:
        """One night: these source files are now so; rows come and go accordingly. Returns the version."""
        self.done += 1
        run_id, head = f"night-{self.done}", store.head(self.uri)
        before = self._state(head)
        self.files.update(files)
        known = [key for ids in self.files.values() for key in ids]
        there = [] if head is None else head.to_table(columns=["id"])["id"].to_pylist()
        new = [key for key in known if key not in there and key not in self.bad]
        gone = [key for key in there if key not in known]
        listed = {number: self.write(name) for number, name in enumerate(self.files)}
        changed = {number: file for number, file in listed.items() if file not in {entry.file for entry in before}}
        parts = [self._part(number, name) for number, name in enumerate(self.files) if number in changed]
        written = state.write_state(self.uri, run_id, changed, parts)
        kept = [entry for entry in before if entry.file in listed.values()]
        manifest = state.Manifest(
            run_id, "f" * 32, "/encoders/one", "c", "p", len(known) - len(self.bad), (*written, *kept), (run_id,)
        )
        state.write_manifest(self.uri, manifest)
        self._quarantine(run_id)
        run = runs.run_directory(self.uri, run_id)
        storage.write_json(f"{run}/plan.json", {"run_id": run_id, "base_version": 0})
        storage.write_bytes(f"{run}/plan-1/rows.parquet", state.parquet_bytes(pa.table({"id": pa.array(known)})))
        storage.write_json(f"{run}/units/00000.json", {"unit": 0})
        commits.commit(self.uri, self._commit(run_id, head, new, gone))
        self.index()
        version = int(store.open_version(self.uri, None).version)
        if publishing:
            publish.publish(self.uri, version, run_id)
        runs.finish(self.uri, run_id, {"run_id": run_id, "example_id": known[0], "rows_per_s": 1.0})
        return version

    def _state(self, head: object) -> tuple[state.FileState, ...]:
        manifest = None if head is None else state.read_manifest(head)  # type: ignore[arg-type]  # a dataset
        return () if manifest is None else manifest.files

    def _part(self, number: int, name: str) -> pa.Table:
        schema = state.state_schema(pa.string(), ["text"])
        found = [
            {"file": number, "row_group": 0, "row": row, "id": key, "text_hash": key.encode()[-16:].ljust(16)}
            for row, key in enumerate(self.files[name])
        ]
        return pa.Table.from_pylist(found, schema)

    def _quarantine(self, run_id: str) -> None:
        schema = quarantine.quarantine_schema(pa.string())
        found = [
            {"id": key, "modality": "text", "run_id": run_id, "stage": "read", "reason": "bad"} for key in self.bad
        ]
        quarantine.replace_rows(self.uri, run_id, pa.Table.from_pylist(found, schema))

    def _commit(self, run_id: str, head: object, new: Sequence[str], gone: Sequence[str]) -> commits.Commit:
        facts: Mapping[str, str] = {store.FINGERPRINT: "f" * 32, store.STATE: state.manifest_path(run_id)}
        if head is None:
            return commits.Commit(run_id, SCHEMA, [commits.stage(self.uri, rows(new), mode="create")], 0, facts)
        fragments = [commits.stage(self.uri, rows(new), mode="append")] if new else []
        at = list(
            edits.addresses_of(store.open_version(self.uri, None), pa.chunked_array([pa.array(gone, pa.string())]))
        )
        addresses = np.concatenate([np.zeros(0, np.uint64), *(part["address"].to_numpy() for part in at)])
        updated, removed = edits.merged({}, edits.delete(store.open_version(self.uri, None), addresses))
        edited = commits.Edits(updated, removed, [], len(addresses))
        version = int(store.open_version(self.uri, None).version)
        return commits.Commit(run_id, SCHEMA, fragments, version, facts, edited)

    def index(self) -> None:
        head = store.open_version(self.uri, None)
        if not head.describe_indices():
            head.create_scalar_index("id", "BTREE", name="id_idx")
        else:
            head.optimize.optimize_indices(index_names=["id_idx"])

    def ids(self, version: str | int | None = "live") -> list[str]:
        return sorted(store.open_version(self.uri, version).to_table(columns=["id"])["id"].to_pylist())

    def versions(self) -> list[int]:
        return [int(found["version"]) for found in store.open_version(self.uri, None).versions()]
