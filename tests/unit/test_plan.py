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
from conjoin.pipeline import plan as planning
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.embed import EmbedConfig
from conjoin.pipeline.errors import SourceError, TableError
from conjoin.pipeline.plan import Plan, Survey, check_resumable, is_current, load_plan, plan_run
from conjoin.pipeline.runs import finish, next_run_id, run_directory, run_ids, unfinished
from conjoin.pipeline.source import SourceConfig, list_source
from conjoin.pipeline.state import FileState, Manifest
from conjoin.pipeline.store import TableConfig, vector_columns
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
    return Survey(list_source(catalog.source), SPEC, fingerprint, planning._config_digest(catalog))


def made(catalog: Catalog, run_id: str = "things-2026-01-01") -> Plan:
    return plan_run(catalog, run_id, survey_of(catalog), full=False)


def test_a_plan_is_frozen_with_one_row_group_per_unit(catalog: Catalog) -> None:
    plan = made(catalog)
    run = run_directory(catalog.table.path, plan.run_id)
    assert load_plan(run) == plan
    assert (plan.counts, plan.rows, plan.base_version, plan.thumbnail_px) == ({"new": 5}, 5, 0, 96)
    with planning.open_rows(run) as rows:
        tables = [rows.read_row_group(unit.number) for unit in plan.units]
    assert [table["id"].to_pylist() for table in tables] == [["a0", "a1"], ["a2"], ["b0", "b1"]]
    assert [table["unit"].unique().to_pylist() for table in tables] == [[0], [1], [2]]
    assert [ids_digest(table["id"]) for table in tables] == [unit.ids for unit in plan.units]
    assert tables[1].drop_columns(["unit", "id"]).to_pylist() == [{"file": 0, "row_group": 1, "row": 0}]


def test_a_large_row_group_is_cut_at_fixed_rows(catalog: Catalog, tmp_path: Path) -> None:
    cut = replace(catalog, embed=EmbedConfig(unit_rows=1))
    plan = made(cut)
    with planning.open_rows(run_directory(catalog.table.path, plan.run_id)) as rows:
        tables = [rows.read_row_group(unit.number).drop_columns(["unit", "file"]).to_pylist() for unit in plan.units]
    assert tables[:3] == [
        [{"row_group": 0, "row": 0, "id": "a0"}],
        [{"row_group": 0, "row": 1, "id": "a1"}],
        [{"row_group": 1, "row": 0, "id": "a2"}],
    ]


def test_the_same_source_gives_the_same_plan(catalog: Catalog) -> None:
    assert made(catalog) == made(catalog)


def test_the_schema_is_the_tables(catalog: Catalog) -> None:
    schema = made(catalog).schema
    assert schema.names == ["id", "price", "text", "image_thumb", "image_hash", "text_hash", "image_vec", "text_vec"]
    assert schema.field("id").type == pa.string()
    assert schema.field("image_vec").type == pa.list_(pa.float32(), 8)


def test_float16_where_asked_or_where_float32_would_be_large(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(catalog, table=catalog.table.model_copy(update={"vector_dtype": "float16"}))
    assert made(asked).schema.field("text_vec").type.value_type == pa.float16()
    monkeypatch.setattr(planning, "FLOAT16_FROM_BYTES", 5 * 2 * 8 * 4)
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
        plan_run(catalog, "r", survey_of(catalog), full=True)


def test_another_encoders_table_needs_full(catalog: Catalog) -> None:
    first = made(catalog)
    lance.write_dataset(first.schema.empty_table(), catalog.table.path)
    assert vector_columns(lance.dataset(catalog.table.path))["text_vec"].fingerprint == "f" * 32
    with pytest.raises(TableError, match="another encoder filled"):
        plan_run(catalog, "r2", survey_of(catalog, "0" * 32), full=False)
    assert plan_run(catalog, "r2", survey_of(catalog, "0" * 32), full=True).base_version == 1


def test_an_unchanged_source_may_be_resumed_also_from_another_directory(catalog: Catalog, tmp_path: Path) -> None:
    plan, now = made(catalog), survey_of(catalog)
    check_resumable(plan, now)
    write(tmp_path / "source/new.parquet", ["n0"])
    check_resumable(plan, survey_of(catalog))
    check_resumable(plan, replace(now, files=()))


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "another-day"])
@pytest.mark.parametrize(("change", "message"), [("replace", "a.parquet changed"), ("remove", "a.parquet is gone")])
def test_a_changed_source_is_named(catalog: Catalog, tmp_path: Path, change: str, message: str, listed: bool) -> None:
    plan = made(catalog)
    (tmp_path / "source/a.parquet").unlink()
    if change == "replace":
        write(tmp_path / "source/a.parquet", ["a0", "a9"])
    now = survey_of(catalog)
    with pytest.raises(SourceError, match=message) as raised:
        check_resumable(plan, now if listed else replace(now, files=()))
    assert "--full" in raised.value.next


def test_another_encoder_or_configuration_is_not_resumed(catalog: Catalog) -> None:
    plan = made(catalog)
    with pytest.raises(TableError, match="another encoder"):
        check_resumable(plan, survey_of(catalog, "0" * 32))
    with pytest.raises(TableError, match="other columns"):
        check_resumable(plan, replace(survey_of(catalog), config="other"))


def test_current_means_same_files_encoder_and_configuration(catalog: Catalog, tmp_path: Path) -> None:
    now = survey_of(catalog)
    files = tuple(FileState(file, "") for file in now.files)
    live = Manifest("r", now.fingerprint, "/e", now.config, "p", 5, files, ("r",))
    assert is_current(live, now)
    assert not is_current(None, now)
    assert not is_current(live, survey_of(catalog, "0" * 32))
    assert not is_current(replace(live, config="other"), now)
    write(tmp_path / "source/new.parquet", ["n0"])
    assert not is_current(live, survey_of(catalog))


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
