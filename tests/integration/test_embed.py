"""Plan, embed on real Ray, land: what is in the table is what the encoder gives, row by row."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conjoin.pipeline import chunks as chunking
from conjoin.pipeline import landing, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.chunks import Chunk, Recipe, chunks
from conjoin.pipeline.embed import EmbedConfig, embed
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import EncoderError, SourceError
from conjoin.pipeline.plan import Plan, open_rows, plan_run, survey
from conjoin.pipeline.progress import Progress
from conjoin.pipeline.quarantine import read_quarantine
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.stager import pieces_of
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.store import TableConfig
from conjoin.pipeline.units import Record, read_records

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def table(emoji: Path) -> pa.Table:
    """240 pictures; the last 40 repeat the first 40."""
    rows = pq.read_table(emoji, columns=["id", "image", "caption", "category"]).slice(0, 200)
    again = rows.slice(0, 40)
    again = again.set_column(0, "id", pa.array([f"again-{n}" for n in range(40)], rows.schema.field("id").type))
    return pa.concat_tables([rows, again])


@pytest.fixture
def catalog(tmp_path: Path, table: pa.Table, tiny_encoder: Path) -> Catalog:
    (tmp_path / "source").mkdir()
    for n, (start, count) in enumerate(((0, 90), (90, 150))):
        pq.write_table(table.slice(start, count), tmp_path / f"source/{n}.parquet", row_group_size=40)
    return Catalog(
        "things",
        SourceConfig(path=str(tmp_path / "source"), id="id", image="image", text="caption", keep=["category"]),
        str(tiny_encoder),
        TableConfig(path=str(tmp_path / "things.lance")),
        EmbedConfig(unit_rows=70),
    )


def planned(catalog: Catalog) -> Plan:
    return plan_run(catalog, "things-2026-01-01", survey(catalog), full=False)


def land(catalog: Catalog, plan: Plan, records: dict[int, Record]) -> pa.Table:
    uri = catalog.table.path
    store.commit(uri, landing.prepare(uri, run_directory(uri, plan.run_id), plan, records))
    return store.open_version(uri, None).to_table()


def night(catalog: Catalog) -> pa.Table:
    plan = planned(catalog)
    return land(catalog, plan, embed(catalog, plan))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.stack(column.to_pylist())


def test_the_table_holds_what_the_encoder_gives(catalog: Catalog, table: pa.Table, tiny_encoder: Path) -> None:
    events: list[Progress] = []
    plan = planned(catalog)
    records = embed(catalog, plan, progress=events.append)
    found = land(catalog, plan, records)
    assert found["id"].to_pylist() == table["id"].to_pylist()
    assert found["category"].to_pylist() == table["category"].to_pylist()
    assert found["text"].to_pylist() == table["caption"].to_pylist()
    assert len(records) == len(plan.units) == 4
    assert sum(record.planned for record in records.values()) == 240
    assert [event.done for event in events][-1] == events[-1].total == 240
    embedder = load(str(tiny_encoder))
    for modality, column in (("image", "image"), ("text", "caption")):
        expected = embedder.embed(modality, table[column].to_pylist()).vectors
        np.testing.assert_allclose(matrix(found[f"{modality}_vec"]), expected, atol=1e-6)
        hashes = found[f"{modality}_hash"].to_pylist()
        assert hashes[200:] == hashes[:40]
    with Image.open(io.BytesIO(found["image_thumb"][0].as_py())) as thumbnail:
        assert (thumbnail.format, max(thumbnail.size)) == ("WEBP", 96)


def test_embedded_units_are_not_embedded_again(catalog: Catalog) -> None:
    plan = planned(catalog)
    records = embed(catalog, plan)
    run = Path(run_directory(catalog.table.path, plan.run_id))
    (run / "units/00002.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (run / "units").glob("*.json")}
    again = embed(catalog, plan)
    after = {path.name: path.stat().st_mtime_ns for path in (run / "units").glob("*.json")}
    assert {name for name in after if after[name] != before.get(name)} == {"00002.json"}
    assert again[2].ids == records[2].ids
    assert land(catalog, plan, again).num_rows == 240


def with_bad_rows(catalog: Catalog, table: pa.Table, tmp_path: Path) -> None:
    """Row 3: a torn picture; row 5: an empty caption; row 7: both; row 9: nothing at all."""
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    images[3] = images[7] = b"torn"
    captions[5] = captions[7] = "  "
    images[9] = captions[9] = None
    changed = table.set_column(1, "image", pa.array(images)).set_column(2, "caption", pa.array(captions))
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    pq.write_table(changed, tmp_path / "source/bad.parquet", row_group_size=50)


def test_bad_rows_land_in_quarantine_with_their_reason(catalog: Catalog, table: pa.Table, tmp_path: Path) -> None:
    with_bad_rows(catalog, table, tmp_path)
    found = night(replace(catalog, embed=EmbedConfig(unit_rows=70, max_bad_fraction=0.1)))
    ids = table["id"].to_pylist()
    assert found["id"].to_pylist() == [key for n, key in enumerate(ids) if n not in (7, 9)]
    by_id = {row["id"]: row for row in found.to_pylist()}
    assert by_id[ids[3]]["image_vec"] is None
    assert by_id[ids[3]]["text_vec"] is not None
    assert by_id[ids[5]]["text_vec"] is None
    quarantined = read_quarantine(catalog.table.path, None)
    assert quarantined is not None
    rows = {(row["id"], row["modality"]): row for row in quarantined.to_pylist()}
    assert set(rows) == {(ids[3], "image"), (ids[5], "text"), (ids[7], "image"), (ids[7], "text"), (ids[9], "")}
    assert (rows[ids[5], "text"]["reason"], rows[ids[5], "text"]["stage"]) == ("empty text", "decode")
    assert rows[ids[3], "image"]["file"].endswith("bad.parquet")
    assert rows[ids[3], "image"]["row"] == 3
    manifest = read_manifest(store.open_version(catalog.table.path, None))
    assert manifest is not None
    assert (manifest.rows, manifest.quarantine) == (238, ("things-2026-01-01",))
    state = pq.read_table(Path(store.bookkeeping(catalog.table.path)) / manifest.files[0].path)
    assert state["id"].to_pylist() == ids
    assert state["image_hash"].to_pylist()[9] is None


def test_too_many_bad_rows_stop_the_night(catalog: Catalog, table: pa.Table, tmp_path: Path) -> None:
    with_bad_rows(catalog, table, tmp_path)
    plan = planned(catalog)
    with pytest.raises(SourceError, match=r"4 of 240 rows cannot be embedded, 1 may: .*\(image\): ") as raised:
        embed(catalog, plan)
    assert "max_bad_fraction" in raised.value.next
    assert store.head(catalog.table.path) is None
    patient = replace(catalog, embed=EmbedConfig(unit_rows=70, max_bad_fraction=0.1))
    assert land(patient, plan, embed(patient, plan)).num_rows == 238


def test_a_file_that_changes_under_the_plan_is_an_error_of_ours(catalog: Catalog, tmp_path: Path) -> None:
    plan = planned(catalog)
    path = tmp_path / "source/1.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take(pa.array(range(rows.num_rows - 1, -1, -1))), path, row_group_size=40)
    with pytest.raises(SourceError, match="ids differ from the plan"):
        embed(catalog, plan)
    run = run_directory(catalog.table.path, plan.run_id)
    assert all(record.rows for record in read_records(run, plan.digest).values())


def test_an_encoder_that_changed_is_an_error_of_ours(catalog: Catalog, tmp_path: Path) -> None:
    found = replace(survey(catalog), fingerprint="0" * 32)
    plan = plan_run(catalog, "things-2026-01-01", found, full=False)
    with pytest.raises(EncoderError, match="the encoder changed since the run was planned"):
        embed(catalog, plan)


@pytest.fixture
def recipe(catalog: Catalog) -> tuple[Recipe, list[chunking.Piece]]:
    found, plan = survey(catalog), planned(catalog)
    with open_rows(run_directory(catalog.table.path, plan.run_id)) as rows:
        pieces = list(pieces_of(rows.read_row_group(1), [file.path for file in plan.files], 25))
    return Recipe(catalog.source, found.spec.towers, plan.schema, 32), pieces


def shown(found: Iterator[Chunk]) -> list[tuple[int, list[str], list[int], bytes]]:
    return [
        (
            chunk.start,
            chunk.columns["id"].to_pylist(),
            chunk.decoded["image"].owners.tolist(),
            b"".join(value.tobytes() for value in chunk.decoded["image"].values if not isinstance(value, str)),
        )
        for chunk in found
    ]


@pytest.mark.parametrize("ahead", [1, 3])
def test_tasks_decode_the_same_chunks(recipe: tuple[Recipe, list[chunking.Piece]], ahead: int) -> None:
    assert shown(chunks(*recipe, ahead)) == shown(chunks(*recipe, 0))


def test_chunks_are_bounded_in_bytes(
    recipe: tuple[Recipe, list[chunking.Piece]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shown(chunks(*recipe, 0))
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 10 * 3 * 16 * 16)
    cut = shown(chunks(*recipe, 0))
    assert max(len(ids) for _, ids, _, _ in cut) == 10
    assert [key for _, ids, _, _ in cut for key in ids] == [key for _, ids, _, _ in whole for key in ids]


def test_without_a_free_cpu_the_actor_decodes_itself(
    recipe: tuple[Recipe, list[chunking.Piece]], monkeypatch: pytest.MonkeyPatch, all_cpus_taken: Callable[[], None]
) -> None:
    monkeypatch.setattr(chunking, "PATIENCE_S", 1.0)
    all_cpus_taken()
    assert shown(chunks(*recipe, 2)) == shown(chunks(*recipe, 0))


@pytest.fixture
def all_cpus_taken() -> Iterator[Callable[[], None]]:
    import ray

    class Holder:
        def ready(self) -> None: ...

    cpus = int(ray.cluster_resources()["CPU"])
    holders: list[ray.actor.ActorHandle] = []

    def take() -> None:
        holders.extend(ray.remote(Holder).options(num_cpus=1).remote() for _ in range(cpus))
        ray.get([holder.ready.remote() for holder in holders])

    yield take
    for holder in holders:
        ray.kill(holder)
