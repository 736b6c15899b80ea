"""FOR VERSION AS OF: numbers, tags, runs and times; drift between versions; every version's own encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

from conjoin.pipeline import publish
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table, versions


@pytest.fixture
def three(make_table: Callable[..., Any]) -> Table:
    """Versions 1 to 3 of 10, 20 and 30 rows, published by the runs r1 to r3 on three days of 2024."""
    for version in (1, 2, 3):
        made = make_table(10 * version, dim=4, live=False, mode="create" if version == 1 else "overwrite", seed=version)
        publish.publish(made.uri, version, f"r{version}")
    for path in Path(f"{made.uri.removesuffix('things.lance')}").rglob("history/*.json"):
        text = path.read_text()
        entry = publish.history(made.uri)[-int(path.name[:8])]
        path.write_text(text.replace(entry.at, f"2024-01-0{entry.version}T12:00:00+00:00"))
    return open_table(made.uri)


def count(table: Table, version: str, params: Any = None) -> int:
    found = table.sql(f"SELECT count(*) AS n FROM things FOR VERSION AS OF {version}", params)
    return int(str(found.to_pylist()[0]["n"]))


@pytest.mark.parametrize(
    ("version", "rows"),
    [
        ("1", 10),
        ("'2'", 20),
        ("'live'", 30),
        ("'previous'", 20),
        ("'r1'", 10),
        ("TIMESTAMP '2024-01-01 12:00:00'", 10),
        ("TIMESTAMP '2024-01-02 11:59:59'", 10),
        ("TIMESTAMP '2024-01-02 23:00:00'", 20),
        ("DATE '2024-01-03'", 20),
        ("TIMESTAMPTZ '2024-01-03 12:30:00+02:00'", 20),
        ("TIMESTAMP '2030-01-01 00:00:00'", 30),
    ],
)
def test_a_version_by_number_tag_run_and_time(three: Table, version: str, rows: int) -> None:
    assert count(three, version) == rows


def test_a_version_can_be_a_parameter(three: Table) -> None:
    assert count(three, "?", [1]) == 10
    assert count(three, "$v", {"v": "previous"}) == 20


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("9", "no version 9"),
        ("'r9'", "things has no version 'r9'; known: live, previous, r1, r2, r3"),
        ("'prevous'", "has no version 'prevous'; did you mean 'previous'"),
        ("-1", "this is not a version"),
        ("1.5", "not a version number"),
        ("TIMESTAMP '2023-12-31 00:00:00'", "first version was published at 2024-01-01"),
        ("TIMESTAMP 'soon'", "'soon' is not a time"),
        ("(SELECT 1)", "this is not a version"),
    ],
)
def test_versions_that_are_not_there(three: Table, version: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        count(three, version)


def test_frames_have_no_versions(three: Table) -> None:
    with pytest.raises(QueryError, match="deals is not a Lance table"):
        three.sql("SELECT 1 FROM deals FOR VERSION AS OF 3", deals=[{"a": 1}])
    with pytest.raises(QueryError, match="no table 'thing'; did you mean 'things'"):
        three.sql("SELECT 1 FROM thing FOR VERSION AS OF 3")


def test_versions_join_and_each_is_told(make_table: Callable[..., Any]) -> None:
    """Drift: rows whose vectors moved from the version before to this one."""
    made = make_table(40, dim=4)
    before = made.vectors["image_vec"]
    make_table(40, dim=4, mode="overwrite", seed=0, live=False)
    dataset = lance.dataset(made.uri)
    moved = make_table(40, dim=4, uri=f"{made.uri}2", seed=9).vectors["image_vec"]
    rows = dataset.to_table().to_pylist()
    for i in (3, 5):
        rows[i]["image_vec"] = moved[i].tolist()
    import pyarrow as pa

    lance.write_dataset(pa.Table.from_pylist(rows, schema=dataset.schema), made.uri, mode="overwrite")
    dataset = lance.dataset(made.uri)
    dataset.tags.create("previous", 1)
    sql = (
        "SELECT a.id, distance(a.image_vec, b.image_vec) AS drift FROM things a "
        "JOIN things FOR VERSION AS OF 'previous' b USING (id) WHERE distance(a.image_vec, b.image_vec) > 0.0001 "
        "ORDER BY a.id"
    )
    found = open_table(made.uri, None).sql(sql)
    assert [row["id"] for row in found] == ["row-0-000003", "row-0-000005"]
    assert found.to_pylist()[0]["drift"] == pytest.approx(1 - float(before[3] @ moved[3]), abs=1e-5)
    assert found.versions == {"things": 3, "things@1": 1}


def test_each_reference_keeps_its_own_name(three: Table) -> None:
    sql = "SELECT things.id FROM things FOR VERSION AS OF 1 ORDER BY things.id LIMIT 1"
    assert three.sql(sql).to_pylist() == [{"id": "row-1-000000"}]
    with pytest.raises(QueryError, match="own alias"):
        three.sql("SELECT 1 FROM things JOIN things FOR VERSION AS OF 1 USING (id)")
    both = "SELECT count(*) AS n FROM things FOR VERSION AS OF 1 UNION ALL SELECT count(*) FROM things ORDER BY 1"
    assert [row["n"] for row in three.sql(both)] == [10, 30]


def test_an_old_versions_words_are_embedded_by_its_own_encoder(
    make_table: Callable[..., Any], tiny_encoder: Path, small_encoder: Path
) -> None:
    from conjoin.pipeline.embedder import load

    encoders = [load(str(tiny_encoder)), load(str(small_encoder))]
    for number, (encoder, path) in enumerate(zip(encoders, (tiny_encoder, small_encoder), strict=True)):
        mode = "overwrite" if number else "create"
        made = make_table(20, dim=8, mode=mode, fingerprint=encoder.fingerprint, encoder=str(path))
    table = open_table(made.uri)
    sql = "SELECT id, distance(image_vec, text('red apple')) AS d FROM things {} ORDER BY d LIMIT 1"
    for version, encoder in zip(("FOR VERSION AS OF 1", ""), encoders, strict=True):
        query = encoder.embed("text", ["red apple"]).vectors[0]
        nearest = (1 - made.vectors["image_vec"] @ query).min()
        assert table.sql(sql.format(version)).to_pylist()[0]["d"] == pytest.approx(nearest, abs=1e-5)
    drift = (
        "SELECT count(*) FROM things a JOIN things FOR VERSION AS OF 1 b USING (id) "
        "WHERE distance(a.image_vec, b.image_vec) > 0.1"
    )
    with pytest.raises(QueryError, match="different encoders"):
        table.sql(drift)


def test_a_version_is_pinned_while_the_tag_moves(three: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions._open

    def rolled_back(*arguments: Any) -> Any:
        found = real(*arguments)
        publish.rollback(three.uri)
        return found

    monkeypatch.setattr(versions, "_open", rolled_back)
    sql = "SELECT (SELECT count(*) FROM things) AS a, (SELECT count(*) FROM things FOR VERSION AS OF 'previous') AS b"
    assert three.sql(sql).to_pylist() == [{"a": 30, "b": 20}]
    assert three.version == 2
