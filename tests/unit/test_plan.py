"""The frozen plan: its rows, digest and units; ids refused; what may be resumed; what is current."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.encoders.spec import EncoderSpec, ImageTransform, TextTransform, TowerSpec
from conjoin.pipeline import layout
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.draft import base_of, drafting
from conjoin.pipeline.embed import EmbedConfig
from conjoin.pipeline.errors import SourceError, TableError
from conjoin.pipeline.freezing import freeze
from conjoin.pipeline.plan import Plan, PlanRows, changed_since, load_plan
from conjoin.pipeline.runs import finish, next_run_id, run_directory, run_ids, unfinished
from conjoin.pipeline.source import SourceConfig, list_source
from conjoin.pipeline.state import FileState, Manifest
from conjoin.pipeline.store import TableConfig
from conjoin.pipeline.survey import Survey, config_digest, is_current
from conjoin.pipeline.units import ids_digest

SPEC = EncoderSpec(
    dim=8,
    towers={
        "text": TowerSpec("text", "transformer", {}, 8, TextTransform(16)),
        "image": TowerSpec("image", "cnn", {}, 8, ImageTransform(16), "none"),
    },
)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    for name, ids in (("a", ["a0", "a1", "a2"]), ("b", ["b0", "b1"])):
        write(tmp_path / f"source/{name}.parquet", ids)
    return Catalog(
        "things",
        SourceConfig(path=str(tmp_path / "source"), id="key", text="caption", image="picture", keep=["price"]),
        "/encoders/one",
        TableConfig(path=str(tmp_path / "things.lance")),
        EmbedConfig(unit_rows=2),
    )


def write(path: Path, ids: list[str | None], kind: pa.DataType | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    count = len(ids)
    columns = {
        "key": pa.array(ids, kind or pa.large_string()),
        "caption": pa.array(["words"] * count),
        "picture": pa.array([b"bytes"] * count),
        "price": pa.array([1.5] * count),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)


def survey_of(catalog: Catalog, fingerprint: str = "f" * 32) -> Survey:
    return Survey(list_source(catalog.source), SPEC, fingerprint, config_digest(catalog))


def made(catalog: Catalog, run_id: str = "things-2026-01-01") -> Plan:
    with drafting(catalog, survey_of(catalog), base_of(catalog.table.path)) as draft:
        return freeze(draft, run_id, run_directory(catalog.table.path, run_id))


def test_a_plan_is_frozen_with_one_row_group_per_unit(catalog: Catalog) -> None:
    plan = made(catalog)
    run = run_directory(catalog.table.path, plan.run_id)
    assert load_plan(run) == plan
    assert {kind: count for kind, count in plan.counts.items() if count} == {"new": 5}
    assert (plan.rows, plan.base_version, plan.thumbnail_px) == (5, 0, 96)
    rows = PlanRows(run, plan)
    tables = [rows.read(unit.number) for unit in plan.units]
    assert [table["id"].to_pylist() for table in tables] == [["a0", "a1"], ["a2"], ["b0", "b1"]]
    assert [table["unit"].unique().to_pylist() for table in tables] == [[0], [1], [2]]
    assert [ids_digest(table["id"]) for table in tables] == [unit.ids for unit in plan.units]
    assert tables[1].select(["file", "row_group", "row"]).to_pylist() == [{"file": 0, "row_group": 1, "row": 0}]


def test_a_large_row_group_is_cut_at_fixed_rows(catalog: Catalog, tmp_path: Path) -> None:
    cut = replace(catalog, embed=EmbedConfig(unit_rows=1))
    plan = made(cut)
    rows = PlanRows(run_directory(catalog.table.path, plan.run_id), plan)
    tables = [rows.read(unit.number).select(["row_group", "row", "id"]).to_pylist() for unit in plan.units]
    assert tables[:3] == [
        [{"row_group": 0, "row": 0, "id": "a0"}],
        [{"row_group": 0, "row": 1, "id": "a1"}],
        [{"row_group": 1, "row": 0, "id": "a2"}],
    ]


def test_the_same_source_gives_the_same_plan(catalog: Catalog) -> None:
    one, two = made(catalog, "r1"), made(catalog, "r2")
    assert one.folder != two.folder
    assert replace(one, run_id="", folder="", digest="") == replace(two, run_id="", folder="", digest="")


def test_a_run_is_planned_once(catalog: Catalog, tmp_path: Path) -> None:
    """Two processes that plan the same run at the same time go on with one plan."""
    one = made(catalog)
    write(tmp_path / "source/new.parquet", ["n0"])
    assert made(catalog) == one


def test_the_schema_is_the_tables(catalog: Catalog) -> None:
    schema = made(catalog).schema
    assert schema.names == ["id", "price", "text", "image_thumb", "image_hash", "text_hash", "image_vec", "text_vec"]
    assert schema.field("id").type == pa.string()
    assert schema.field("image_vec").type == pa.list_(pa.float32(), 8)


def test_float16_where_asked_or_where_float32_would_be_large(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(catalog, table=catalog.table.model_copy(update={"vector_dtype": "float16"}))
    assert made(asked).schema.field("text_vec").type.value_type == pa.float16()
    monkeypatch.setattr(layout, "FLOAT16_FROM_BYTES", 5 * 2 * 8 * 4)
    assert made(catalog).schema.field("text_vec").type.value_type == pa.float16()


def test_a_plan_that_was_changed_is_refused(catalog: Catalog) -> None:
    plan = made(catalog)
    run = Path(run_directory(catalog.table.path, plan.run_id))
    raw = json.loads((run / "plan.json").read_text())
    raw["units"][0]["rows"] = 1
    (run / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(TableError, match="digest"):
        load_plan(str(run))


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["x", None], "null"), (["x", "a1"], "'a1'"), (["x", "x"], "'x'")],
    ids=["null", "repeated-across-files", "repeated"],
)
def test_ids_that_are_no_key_are_refused(catalog: Catalog, tmp_path: Path, ids: list[str | None], message: str) -> None:
    write(tmp_path / "source/c.parquet", ids)
    with pytest.raises(SourceError, match=message):
        made(catalog)
    assert run_ids(catalog.table.path) == []


def test_ids_of_two_types_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    write(tmp_path / "source/c.parquet", [1, 2], pa.int64())  # type: ignore[list-item]
    with pytest.raises(SourceError, match="key"):
        made(catalog)


def test_integer_ids(catalog: Catalog, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"source/{name}.parquet").unlink()
    write(tmp_path / "source/c.parquet", [7, 5], pa.int32())  # type: ignore[list-item]
    plan = made(catalog)
    assert plan.schema.field("id").type == pa.int64()
    assert plan.units[0].ids == ids_digest(pa.array([7, 5]))


def test_somebody_elses_table_is_not_planned_over(catalog: Catalog) -> None:
    lance.write_dataset(pa.table({"id": ["x"]}), catalog.table.path)
    with pytest.raises(TableError, match="not made by conjoin"):
        base_of(catalog.table.path, full=True)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "another-day"])
def test_files_that_changed_since_the_plan_are_named(catalog: Catalog, tmp_path: Path, listed: bool) -> None:
    plan = made(catalog)

    def changed() -> dict[str, str]:
        now = {file.path: file for file in survey_of(catalog).files} if listed else {}
        return {Path(path).name: what for path, what in changed_since(plan, now).items()}

    write(tmp_path / "source/new.parquet", ["n0"])
    assert changed() == {}
    (tmp_path / "source/b.parquet").unlink()
    write(tmp_path / "source/a.parquet", ["a0", "a9"])
    assert changed() == {"a.parquet": "changed", "b.parquet": "is gone"}


def test_current_means_same_files_encoder_and_configuration(catalog: Catalog, tmp_path: Path) -> None:
    now = survey_of(catalog)
    files = tuple(FileState(file, "") for file in now.files)
    live = Manifest("r", now.fingerprint, "/e", now.config, "p", 5, files, ("r",))
    assert is_current(live, now, "auto")
    assert not is_current(None, now, "auto")
    assert not is_current(live, survey_of(catalog, "0" * 32), "auto")
    assert not is_current(replace(live, config="other"), now, "auto")
    assert not is_current(live, now, "bf16")
    write(tmp_path / "source/new.parquet", ["n0"])
    assert not is_current(live, survey_of(catalog), "auto")


def test_run_ids_count_up_within_a_day(catalog: Catalog) -> None:
    import datetime as dt

    uri, day = catalog.table.path, dt.date(2026, 1, 1)
    for expected in ("things-2026-01-01", "things-2026-01-01.2"):
        run_id = next_run_id(uri, "things", day)
        assert run_id == expected
        made(catalog, run_id)
    finish(uri, "things-2026-01-01", {"status": "published"})
    assert unfinished(uri) == ["things-2026-01-01.2"]
    assert next_run_id(uri, "things", dt.date(2026, 1, 2)) == "things-2026-01-02"
