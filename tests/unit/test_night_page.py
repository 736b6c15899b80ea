"""The page about a night: everything of the record, escaped, and records of other versions."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from conjoin.pipeline import night, runs, storage
from conjoin.pipeline.gates import GateResult
from conjoin.pipeline.hook import Hook
from conjoin.pipeline.night import Night, bytes_of, from_json, read_night
from conjoin.pipeline.night_page import render, write
from conjoin.pipeline.quarantine import Group

NIGHT = Night(
    run_id="shop-2026-11-26",
    status="rejected",
    table="s3://shop/products.lance",
    source=("s3://shop/catalog/",),
    version=412,
    previous=409,
    rows=81_000,
    quarantined=231,
    bytes_written=184_000_000,
    counts={"new": 1203, "changed": 877, "changed_text": 850, "skipped": 60_000, "odd": 3, "kept": 0},
    gates=(
        GateResult("rows", True, "81,000 rows"),
        GateResult("row change", False, "32.5% <b>", "raise it", 0.325, 0.05),
        GateResult("recall", True, "image", value=0.99),
        GateResult("recall", True, "text", value=0.97),
    ),
    seconds={"embed": 912.4, "index": 301.7},
    indexes=({"column": "image_vec", "kind": "IVF_PQ", "recall": 0.993},),
    troubles=(Group("fetch", "image", "nothing there [...]", 200, "<script>", "sku-1"),),
    hook=Hook("curl $URL", 7, 1.2, "failed to connect"),
    left=("part-7.parquet",),
    problem="row change: too much",
)


def test_a_record_survives_json() -> None:
    assert from_json(json.loads(json.dumps(NIGHT.to_json()))) == NIGHT
    assert NIGHT.measured == {"row change": 0.325, "recall": 0.97}


def test_records_of_older_and_newer_versions_are_read() -> None:
    old = {"format": 1, "run_id": "r", "status": "published", "rows": 3, "indexes": [{"column": "id"}]}
    assert from_json(old).indexes == ({"column": "id"},)
    new = {**NIGHT.to_json(), "mood": "good", "gates": [{**asdict(NIGHT.gates[0]), "more": 1}]}
    assert from_json(new) == replace(NIGHT, gates=NIGHT.gates[:1])


def test_a_rejected_night_says_what_failed_first() -> None:
    text = render(NIGHT)
    assert text.index("row change: too much") < text.index("What changed")
    assert text.index(">failed<") < text.index(">passed<")
    for words in (
        "Readers still see version 409",
        "conjoin publish --force shop-2026-11-26",
        "raise it",
        "exit code 7",
    ):
        assert words in text
    assert "184.0 MB" in text
    assert "of the changed ones: text" in text
    assert ">odd<" in text
    assert "kept columns only" not in text


@pytest.mark.parametrize("status", ["published", "unchanged", "abandoned"])
def test_any_status_has_a_page(status: str) -> None:
    text = render(Night("r1", status, version=3, previous=2))
    assert f">{status}<" in text
    assert "What went wrong" not in text
    assert ("conjoin rollback --to 2" in text) == (status == "published")


def test_everything_is_escaped_and_nothing_is_loaded() -> None:
    nasty = "<script>alert('x')</script>"
    text = render(
        replace(
            NIGHT,
            run_id=nasty,
            problem=nasty,
            counts={nasty: 1},
            seconds={nasty: 1.0},
            source=(nasty,),
            indexes=({nasty: nasty},),
            left=(nasty,),
            hook=Hook(nasty, 1, 1, nasty),
            gates=(GateResult(nasty, False, nasty, nasty),),
            troubles=(Group(nasty, nasty, nasty, 1, nasty, nasty),),
        ),
        links=("report.json",),
    )
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=(?!'report\.json')", text)
    assert "url(" not in text


def test_it_lies_beside_the_record(tmp_path: Path) -> None:
    uri = str(tmp_path / "things.lance")
    assert read_night(uri, NIGHT.run_id) is None
    runs.finish(uri, NIGHT.run_id, NIGHT.to_json())
    assert read_night(uri, NIGHT.run_id) == NIGHT
    path = write(uri, NIGHT)
    assert path == f"{tmp_path}/things.conjoin/runs/shop-2026-11-26/report.html"
    text = storage.read_bytes(path).decode()
    assert "href='report.json'" in text
    assert "prefers-color-scheme: dark" in text


def test_bytes_of_fragments() -> None:
    fragments: list[night.Json] = [{"files": [{"file_size_bytes": 5}, {"file_size_bytes": None}]}, None, {"files": []}]
    assert bytes_of(fragments) == 5
