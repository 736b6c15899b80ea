"""`conjoin run` on real Ray and Lance: what is in the table is what the encoder gives, row by row."""

from __future__ import annotations

import datetime as dt
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conjoin.jobs.config import RunFile, read_run_file
from conjoin.jobs.nightly import run
from conjoin.pipeline import night as records
from conjoin.pipeline import storage, store
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import EncoderError, SourceError
from conjoin.pipeline.progress import Progress
from conjoin.pipeline.quarantine import read_quarantine
from conjoin.pipeline.records import content_hash
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.units import read_records

DAY = dt.date(2026, 1, 2)
COLUMNS = {"image": "picture", "text": "caption"}


@dataclass(frozen=True, slots=True)
class Night:
    """One finished night. events: what was shown while it ran."""

    config: RunFile
    report: records.Night
    events: list[Progress]

    @property
    def uri(self) -> str:
        return self.config.table.path

    def table(self, version: str = "live") -> pa.Table:
        return store.open_version(self.uri, version).to_table()


def configured(file: Path, **overrides: object) -> RunFile:
    return read_run_file(file, [(key.replace("__", "."), value) for key, value in overrides.items()], DAY)


def night(file: Path, full: bool = False, **overrides: object) -> Night:
    config, events = configured(file, **overrides), list[Progress]()
    return Night(config, run(config, DAY, full=full, progress=events.append), events)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(N, D) float32, NaN rows where null."""
    dim = column.type.list_size
    return np.array([row or [np.nan] * dim for row in column.to_pylist()], np.float32).reshape(-1, dim)


def assert_same(found: pa.Table, expected: pa.Table, most: float = 1e-6) -> None:
    """The same rows, whatever their order; vectors up to rounding."""
    found, expected = (table.sort_by("id") for table in (found, expected))
    vectors = [name for name in expected.column_names if name.endswith("_vec")]
    assert found.column_names == expected.column_names
    assert found.drop_columns(vectors).to_pylist() == expected.drop_columns(vectors).to_pylist()
    for name in vectors:
        np.testing.assert_allclose(matrix(found[name]), matrix(expected[name]), rtol=0, atol=most, equal_nan=True)


def write(rows: pa.Table, path: Path, row_group_size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=row_group_size)
    return path


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps log records; those of Ray Data's errors hold its executor, actors and CPUs."""
    caplog.set_level(logging.CRITICAL + 1, logger="ray.data")


@pytest.fixture(scope="module")
def first(
    ray_session: None, things: Any, run_file_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Night:
    """A directory of two files with row groups that units do not divide, embedded and published."""
    folder = tmp_path_factory.mktemp("first")
    write(things.rows.slice(0, 50), folder / "source/a.parquet", 20)
    write(things.rows.slice(50), folder / "source/b.parquet", 33)
    return night(run_file_in(folder, str(folder / "source")))


@pytest.fixture
def copied(first: Night, tmp_path: Path) -> Night:
    """The same table at a place of its own, to be changed."""
    for name in ("things.lance", "things.conjoin", "things__quarantine.lance"):
        shutil.copytree(Path(first.uri).with_name(name), tmp_path / name)
    moved = first.config.table.model_copy(update={"path": str(tmp_path / "things.lance")})
    return Night(first.config.model_copy(update={"table": moved}), first.report, [])


def test_every_row_is_there_once_as_in_the_source(first: Night, things: Any) -> None:
    found, source = first.table(), {row["id"]: row for row in things.rows.to_pylist()}
    assert found["id"].to_pylist() == things.landed
    for row in found.to_pylist():
        origin = source[row["id"]]
        assert (row["text"], row["price"], row["tags"]) == (origin["caption"], origin["price"], origin["tags"])
        for modality, column in COLUMNS.items():
            value = origin[column]
            assert row[f"{modality}_hash"] == (None if value is None else content_hash(value)), (row["id"], modality)


def test_vectors_are_what_the_encoder_gives_without_ray(first: Night, things: Any, things_encoder: Path) -> None:
    found, embedder = first.table(), load(str(things_encoder))
    landed = things.rows.filter(pa.compute.is_in(things.rows["id"], pa.array(things.landed)))
    for modality, column in COLUMNS.items():
        expected = embedder.embed(modality, landed[column].to_pylist())
        vectors = found[f"{modality}_vec"]
        assert vectors.is_valid().to_pylist() == expected.present.tolist()
        np.testing.assert_allclose(matrix(vectors)[expected.present], expected.vectors[expected.present], atol=1e-6)
        assert vectors.type == pa.list_(pa.float32(), embedder.spec.dim)
        column = store.vector_columns(store.open_version(first.uri))[f"{modality}_vec"]
        assert (column.fingerprint, column.encoder) == (embedder.fingerprint, str(things_encoder))


def test_a_modality_that_lacks_or_fails_is_null_alone(first: Night, things: Any) -> None:
    rows = {row["id"]: row for row in first.table().to_pylist()}
    missing = {name: {key for key, row in rows.items() if row[f"{name}_vec"] is None} for name in COLUMNS}
    both = set(things.no_image) & set(things.no_text)
    for name, positions in (("image", things.no_image), ("text", things.no_text)):
        assert missing[name] == {things.ids[row] for row in set(positions) - both}


def test_unusable_values_are_in_quarantine_with_their_place(first: Night, things: Any) -> None:
    found = read_quarantine(first.uri)
    assert found is not None
    rows = {(row["id"], row["modality"]): row for row in found.to_pylist()}
    assert {key: row["stage"] for key, row in rows.items()} == things.quarantined
    torn = rows[things.ids[33], "image"]
    assert torn["file"].endswith("source/a.parquet")
    assert (torn["row_group"], torn["row"], torn["run_id"]) == (1, 13, first.report.run_id)
    assert "empty text" in rows[things.ids[35], "text"]["reason"]
    assert first.report.quarantined == 4


def test_thumbnails_are_small_pictures(first: Night) -> None:
    thumbnails = first.table()["image_thumb"]
    with Image.open(io.BytesIO(thumbnails[0].as_py())) as image:
        assert (image.format, max(image.size)) == ("WEBP", 24)
    assert thumbnails.null_count == 2


def test_a_night_says_what_it_did(first: Night, things: Any) -> None:
    report, shown = first.report, [event for event in first.events if event.step == "embed"]
    assert (report.status, report.rows, report.run_id) == ("published", len(things.landed), "things-2026-01-02")
    assert report.units == len(read_records(f"{store.bookkeeping(first.uri)}/runs/{report.run_id}", plan_digest(first)))
    assert (shown[-1].done, shown[-1].total) == (120, 120)
    assert [event.done for event in shown] == sorted(event.done for event in shown)


def plan_digest(done: Night) -> str:
    manifest = read_manifest(store.open_version(done.uri))
    assert manifest is not None
    return manifest.plan


def test_the_state_of_each_file_is_what_was_read(first: Night, things: Any) -> None:
    manifest = read_manifest(store.open_version(first.uri))
    assert manifest is not None
    states = [pq.read_table(storage.join(store.bookkeeping(first.uri), entry.path)) for entry in manifest.files]
    assert [state.num_rows for state in states] == [50, 70]
    assert [key for state in states for key in state["id"].to_pylist()] == things.ids
    images = things.rows["picture"].to_pylist()
    hashes = [digest for state in states for digest in state["image_hash"].to_pylist()]
    assert hashes == [None if image is None else content_hash(image) for image in images]


NOTHING_TO_DO = """
import datetime as dt, json, pathlib, sys
from conjoin.jobs.config import read_run_file
from conjoin.jobs.nightly import run
config = read_run_file(pathlib.Path(sys.argv[1]), [], dt.date(2026, 1, 3))
report = run(config, dt.date(2026, 1, 3))
print(json.dumps([report.status, report.version, sorted({"ray", "torch"} & set(sys.modules))]))
"""


def test_a_second_night_has_nothing_to_do_and_starts_no_ray(first: Night, conjoin: Any) -> None:
    file = Path(first.uri).with_name("conjoin.yaml")
    done = type(conjoin)((sys.executable, "-W", "error", "-c", NOTHING_TO_DO)).run(str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["unchanged", first.report.version, []]


def test_full_gives_the_same_rows_in_a_new_version(ray_session: None, copied: Night) -> None:
    before = copied.table()
    report = run(copied.config, DAY, full=True)
    assert (report.run_id, report.status) == ("things-2026-01-02.2", "published")
    assert report.version > copied.report.version
    assert_same(copied.table(), before, most=0)
    assert copied.table("previous") == before
    assert store.open_version(copied.uri, "previous").version == copied.report.version
    quarantined = read_quarantine(copied.uri)
    assert quarantined is not None
    assert set(quarantined["run_id"].to_pylist()) == {report.run_id}
    assert run(copied.config, DAY).status == "unchanged"


def test_a_table_does_not_depend_on_how_the_source_is_cut(
    first: Night, things: Any, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = things.rows
    large = rows.set_column(2, "caption", rows["caption"].cast(pa.large_string()))
    parts = [
        write(large.slice(0, 10), tmp_path / "one.parquet", 1000),
        write(rows.slice(10, 40), tmp_path / "many/dt=2026-01-01/part.parquet", 7),
        write(rows.slice(50, 69), tmp_path / "many/dt=2026-01-02/part.parquet", 64),
        write(rows.slice(119), tmp_path / "glob-1.parquet", 1),
    ]
    write(rows.slice(0, 0), tmp_path / "many/empty.parquet", 1)
    done = night(run_file([str(parts[0]), str(tmp_path / "many"), str(tmp_path / "glob-*.parquet")], unit_rows=17))
    assert done.report.units == 9
    assert_same(done.table(), first.table())


def test_pictures_named_by_files_are_those_in_bytes(
    first: Night, things: Any, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    names: list[str | None] = []
    for row, image in enumerate(things.rows["picture"].to_pylist()):
        names.append(None if image is None else f"pictures/{row}.png" if row % 2 else f"{tmp_path}/pictures/{row}.png")
        if image is not None:
            path = tmp_path / f"pictures/{row}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
    names[50] = "pictures/none.png"
    rows = things.rows.set_column(1, "picture", pa.array(names))
    done = night(run_file(str(write(rows, tmp_path / "things.parquet", 25)), unit_rows=50))
    found, expected = done.table(), first.table()
    assert "image_thumb" in found.column_names
    by_id = {row["id"]: row for row in found.to_pylist()}
    absolute = [None if name is None else str(tmp_path / name) for name in names]
    assert [by_id[key]["image_uri"] for key in things.landed] == [
        uri for key, uri in zip(things.ids, absolute, strict=True) if key in by_id
    ]
    assert by_id[things.ids[50]]["image_vec"] is None
    quarantined = read_quarantine(done.uri)
    assert quarantined is not None
    stages = {(row["id"], row["modality"]): row["stage"] for row in quarantined.to_pylist()}
    assert stages == {**things.quarantined, (things.ids[50], "image"): "fetch"}
    kept = [key for key in things.landed if key != things.ids[50]]
    vectors = {row["id"]: row["image_vec"] for row in expected.to_pylist()}
    left, right = ([rows[key] or [0.0] * 8 for key in kept] for rows in (image_vectors(found), vectors))
    np.testing.assert_allclose(left, right, atol=1e-6)


def image_vectors(table: pa.Table) -> dict[str, list[float] | None]:
    return dict(zip(table["id"].to_pylist(), table["image_vec"].to_pylist(), strict=True))


def test_too_many_unusable_rows_stop_the_night_and_publish_nothing(
    ray_session: None, things: Any, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = run_file(str(write(things.rows, tmp_path / "things.parquet", 40)))
    with pytest.raises(SourceError, match=r"\d of 120 rows cannot be embedded, 1 may: .*\(image\): ") as raised:
        night(file, embed__max_bad_fraction=0.001)
    assert "max_bad_fraction" in raised.value.next
    assert store.head(f"{tmp_path}/things.lance") is None
    assert night(file).report.rows == len(things.landed)


def test_a_file_that_changes_under_the_plan_is_named(
    ray_session: None, things: Any, run_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conjoin.jobs import nightly

    path = write(things.rows, tmp_path / "things.parquet", 40)
    freeze = nightly.freeze

    def then_replaced(*given: Any) -> object:
        plan = freeze(*given)
        write(things.rows.take(pa.array(range(119, -1, -1))), path, 40)
        return plan

    monkeypatch.setattr(nightly, "freeze", then_replaced)
    with pytest.raises(SourceError, match="ids differ from the plan: the file was replaced") as raised:
        night(run_file(str(path)))
    assert "things.parquet" in raised.value.where
    monkeypatch.undo()
    done = night(run_file(str(path)))
    assert (done.report.run_id, done.report.status) == ("things-2026-01-02.2", "published")
    assert done.table()["id"].to_pylist() == things.landed[::-1]


def test_workers_errors_arrive_as_ours(
    ray_session: None, things: Any, run_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conjoin.jobs import nightly

    file = run_file(str(write(things.rows, tmp_path / "things.parquet", 40)))
    survey = nightly.survey

    def other_encoder(*given: object) -> object:
        from dataclasses import replace

        return replace(survey(*given), fingerprint="0" * 32)

    monkeypatch.setattr(nightly, "survey", other_encoder)
    with pytest.raises(EncoderError, match="the encoder changed since the run was planned"):
        night(file)


def test_a_bucket_gives_the_same_rows_and_vectors(
    first: Night, things: Any, run_file: Callable[..., Path], s3: str, conjoin: Any
) -> None:
    """Through the real command: source and table in a bucket; then read by plain lancedb."""
    import s3fs

    fs = s3fs.S3FileSystem()
    for name, rows in (("a", things.rows.slice(0, 50)), ("b", things.rows.slice(50))):
        with fs.open(f"{s3}/source/{name}.parquet", "wb") as out:
            pq.write_table(rows, out, row_group_size=33)
    file = run_file(f"{s3}/source/", f"{s3}/vectors/things.lance")
    done = conjoin.run("run", str(file), "--date", str(DAY), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "published"
    options = storage.lance_options(s3)
    table = lancedb.connect(f"{s3}/vectors", storage_options=options).open_table("things")
    table.checkout("live")
    assert_same(table.to_arrow().cast(first.table().schema), first.table())
    nearest = table.search(first.table()["text_vec"][0].as_py(), vector_column_name="text_vec").limit(1).to_list()
    assert nearest[0]["_distance"] < 1e-6
    # core_worker.cc: an error of Ray's C++ that it prints for every pool of actors of Ray Data
    said = [line for line in done.stderr.splitlines() if not line.startswith(("plan: ", "embed: "))]
    noise = [line for line in said if "issues/53727" not in line]
    assert noise == []
