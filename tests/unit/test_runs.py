"""Runs of a table: ids, directories, the unfinished one."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from conjoin.pipeline import runs, storage

DAY = dt.date(2024, 2, 29)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def plan(uri: str, run_id: str) -> None:
    storage.write_json(f"{runs.run_directory(uri, run_id)}/plan.json", {})


def test_the_first_run_of_a_day_and_further_ones(uri: str) -> None:
    names = []
    for _ in range(11):
        names.append(runs.next_run_id(uri, "things", DAY))
        plan(uri, names[-1])
    assert names == ["things-2024-02-29", *(f"things-2024-02-29.{i}" for i in range(2, 12))]
    assert sorted(runs.run_ids(uri)) == sorted(names)
    assert runs.next_run_id(uri, "things", dt.date(2024, 3, 1)) == "things-2024-03-01"


def test_a_run_is_unfinished_until_its_report(uri: str) -> None:
    assert runs.unfinished(uri) == []
    plan(uri, "a")
    plan(uri, "b")
    runs.finish(uri, "a", {"status": "published"})
    assert runs.unfinished(uri) == ["b"]
    assert runs.read_report(uri, "a")["status"] == "published"


def test_a_directory_without_a_plan_is_no_run(uri: str) -> None:
    storage.write_json(f"{runs.run_directory(uri, 'torn')}/rows.json", {})
    assert runs.run_ids(uri) == []
    assert runs.run_directory("s3://b/v/things.lance", "a") == "s3://b/v/things.conjoin/runs/a"
