"""Deltas, compaction, cleaning and erasure of a table in a bucket."""

from __future__ import annotations

import datetime as dt
import io
from pathlib import Path

import pyarrow.parquet as pq
from small_nights import Nights

from conjoin.pipeline import commits, storage, store
from conjoin.pipeline.cleaning import clean, rubbish
from conjoin.pipeline.compaction import compact
from conjoin.pipeline.delta import export_delta
from conjoin.pipeline.erasure import forget
from conjoin.pipeline.upkeep import Upkeep

IDS = [f"customer-{n:03d}" for n in range(40)]


def made(tmp_path: Path, s3: str) -> Nights:
    nights = Nights(tmp_path, bad=["bad-001"], where=f"{s3}/vectors")
    nights.night(a=IDS[:20] + nights.bad, b=IDS[20:30])
    for last in range(31, 35):
        nights.night(b=IDS[22:last])
    return nights


def test_a_delta_into_a_bucket(tmp_path: Path, s3: str) -> None:
    nights = made(tmp_path, s3)
    found = export_delta(nights.uri, f"{s3}/out", since="night-1")
    assert (found.upserts, found.deletes) == (4, 2)
    parts = {file.kind: pq.read_table(io.BytesIO(storage.read_bytes(f"{s3}/out/{file.path}"))) for file in found.files}
    assert sorted(parts["upserts"]["id"].to_pylist()) == IDS[30:34]
    assert sorted(parts["deletes"]["id"].to_pylist()) == IDS[20:22]
    assert storage.read_json(f"{s3}/out/manifest.json")["upserts"] == 4


def test_cleaning_and_compaction_in_a_bucket(tmp_path: Path, s3: str) -> None:
    nights = made(tmp_path, s3)
    before = nights.ids()
    assert compact(nights.uri, Upkeep(small_fragments=2)).rewritten > 2
    assert nights.ids(None) == before
    commits.stage(nights.uri, store.open_version(nights.uri).to_table(limit=1), mode="append")
    late = dt.datetime.now(dt.UTC) + dt.timedelta(days=60)
    found = rubbish(nights.uri, Upkeep(keep_versions=1, keep_days=1), late)
    assert found.versions
    assert len(found.orphans) == 1
    items = clean(found)
    assert all(item.deleted for item in items)
    assert nights.ids() == before
    assert rubbish(nights.uri, Upkeep(keep_versions=1, keep_days=1), late).items() == ()


def test_erasure_in_a_bucket(tmp_path: Path, s3: str) -> None:
    nights = made(tmp_path, s3)
    nights.files["a"].remove(IDS[3])
    nights.write("a")
    done = forget(nights.uri, [IDS[3]])
    assert done.proven
    assert done.rows == 1
    left = storage.list_files(f"{s3}/vectors")
    assert left
    assert not [path for path in left if IDS[3].encode() in storage.read_bytes(path)]
    assert nights.ids() == sorted(set(IDS[:20] + IDS[22:34]) - {IDS[3]})
