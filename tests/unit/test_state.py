"""State per source file, the manifest that belongs to a version, and the quarantine that belongs to a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import commits, quarantine, state, store
from conjoin.pipeline.errors import StorageError, TableError
from conjoin.pipeline.source import SourceFile

FILES = {n: SourceFile(f"/s/{n}.parquet", 10 + n, f"e{n}", rows, (rows,)) for n, rows in enumerate((3, 0, 2))}
SCHEMA = state.state_schema(pa.string(), ["text"])


def part(places: list[tuple[int, int, str]]) -> pa.Table:
    rows = [
        {"file": file, "row_group": 0, "row": row, "id": key, "text_hash": key.encode().ljust(16)}
        for file, row, key in places
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


PARTS = [part([(0, 0, "a"), (0, 1, "b")]), part([(0, 2, "c"), (2, 0, "d")]), part([(2, 1, "e")])]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def manifest(files: tuple[state.FileState, ...], run_id: str = "r1") -> state.Manifest:
    return state.Manifest(run_id, "f" * 32, "/e", "config", "plan", 5, files, (run_id,))


def committed(uri: str, run_id: str) -> None:
    schema = store.table_schema(
        store.Layout(pa.string(), pa.schema([]), ("text",), (), False, pa.list_(pa.float32(), 2), "f" * 32, "/e")
    )
    head = store.head(uri)
    version = 0 if head is None else int(head.version)
    commits.commit(uri, commits.Commit(run_id, schema, [], version, {store.STATE: state.manifest_path(run_id)}))


def test_one_state_file_per_source_file(uri: str) -> None:
    written = state.write_state(uri, "r1", FILES, PARTS)
    ids = {}
    for entry in written:
        table = pq.read_table(Path(store.bookkeeping(uri)) / entry.path) if entry.path else None
        ids[entry.file.path] = [] if table is None else table["id"].to_pylist()
    assert ids == {"/s/0.parquet": ["a", "b", "c"], "/s/1.parquet": [], "/s/2.parquet": ["d", "e"]}


def test_state_of_a_file_that_nobody_named_is_an_error(uri: str) -> None:
    with pytest.raises(TableError, match=r"files \[2\] that the plan does not name"):
        state.write_state(uri, "r1", {n: FILES[n] for n in (0, 1)}, PARTS)


def test_the_manifest_is_found_from_the_version(uri: str) -> None:
    for run_id in ("r1", "r2"):
        state.write_manifest(uri, manifest(state.write_state(uri, run_id, FILES, PARTS), run_id))
        committed(uri, run_id)
    assert state.read_manifest(store.open_version(uri, 1)) == manifest(state.write_state(uri, "r1", FILES, PARTS))
    newest = state.read_manifest(store.open_version(uri, None))
    assert newest is not None
    assert newest.run_id == "r2"


def test_a_manifest_that_is_gone_is_an_error(uri: str) -> None:
    committed(uri, "r1")
    with pytest.raises(StorageError, match="no such file"):
        state.read_manifest(store.open_version(uri, None))


def bad(run_id: str, *ids: str) -> pa.Table:
    row = {"modality": "image", "run_id": run_id, "stage": "decode", "reason": "torn", "file": "f", "row_group": 0}
    rows = [{**row, "id": key, "row": n} for n, key in enumerate(ids)]
    return pa.Table.from_pylist(rows, quarantine.quarantine_schema(pa.string()))


def test_a_run_replaces_its_own_quarantine_only(uri: str) -> None:
    state.write_manifest(uri, manifest((), "r1"))
    committed(uri, "r1")
    assert quarantine.read_quarantine(uri, None) is None
    quarantine.replace_rows(uri, "r1", bad("r1", "a", "b"))
    quarantine.replace_rows(uri, "r2", bad("r2", "x"))
    quarantine.replace_rows(uri, "r1", bad("r1", "a"))
    quarantine.replace_rows(uri, "r1", bad("r1", "a"))
    found = quarantine.read_quarantine(uri, None)
    assert found is not None
    assert found["id"].to_pylist() == ["a"]
    assert store.open_version(store.quarantine_uri(uri), None).count_rows() == 2
