"""Cleaning after real nights: what may go goes, what is needed stays, and it is shown first."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import lance
import pytest
from small_nights import Nights, rows

from conjoin.pipeline import commits, publish, runs, state, storage, store
from conjoin.pipeline.cleaning import clean, housekeep, rubbish
from conjoin.pipeline.quarantine import rows_of
from conjoin.pipeline.retention import retention
from conjoin.pipeline.upkeep import Upkeep


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Six nights: versions 1 to 12 (a commit and an index each), the last six live one after the other."""
    made = Nights(tmp_path, bad=["bad-0"])
    made.night(a=[f"a{n}" for n in range(20)] + ["bad-0"], b=[f"b{n}" for n in range(20)])
    for number in range(1, 6):
        made.night(a=[f"a{n}" for n in range(number, 20 + number)] + ["bad-0"])
    return made


def later(days: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def upkeep(**changes: object) -> Upkeep:
    return Upkeep.model_validate({"keep_versions": 2, "keep_days": 5, "keep_run_days": 3, **changes})


def kinds(found: object) -> dict[str, int]:
    return {item.kind: item.count for item in found}  # type: ignore[attr-defined]  # Item


def test_nothing_goes_on_the_same_day(nights: Nights) -> None:
    assert rubbish(nights.uri, upkeep()).items() == ()


def test_after_some_days_plans_go_and_versions_stay(nights: Nights) -> None:
    found = rubbish(nights.uri, upkeep(), later(4))
    assert not found.versions
    assert kinds(found.items()) == {"plans and units of nights that are over": 18, "old leases": 3}
    clean(found)
    assert runs.run_ids(nights.uri) == [f"night-{n}" for n in range(1, 7)]
    assert runs.unfinished(nights.uri) == []
    assert runs.read_report(nights.uri, "night-1")["run_id"] == "night-1"
    assert runs.next_run_id(nights.uri, "night", dt.date(2026, 1, 1)) == "night-2026-01-01"


def test_later_old_versions_go_with_their_state_and_quarantine(nights: Nights) -> None:
    published = [entry.version for entry in publish.history(nights.uri)]
    found = rubbish(nights.uri, upkeep(), later(40))
    assert published[:2] == [12, 10]
    # Each published version keeps the commit below it, from which its run is read.
    assert found.versions == (1, 2, 3, 4, 5, 6, 7, 8)
    assert found.version_bytes > 0
    assert found.quarantine_runs == tuple(f"night-{n}" for n in range(1, 5))
    before = {version: nights.ids(version) for version in (10, 12)}
    items = clean(found)
    assert all(item.deleted for item in items)
    assert nights.versions() == [9, 10, 11, 12]
    for version, ids in before.items():
        dataset = store.open_version(nights.uri, version)
        manifest = state.read_manifest(dataset)
        assert manifest is not None
        assert nights.ids(version) == ids
        assert [len(state.state_file(nights.uri, entry)) for entry in manifest.files] == [21, 20]
        assert rows_of(nights.uri, manifest)["id"].to_pylist() == ["bad-0"]  # type: ignore[index]  # there is one
    assert kinds(rubbish(nights.uri, upkeep(), later(40)).items()) == {}


def test_state_of_unchanged_files_outlives_the_run_that_wrote_it(nights: Nights) -> None:
    clean(rubbish(nights.uri, upkeep(), later(40)))
    left = {str(path.relative_to(nights.books)) for path in (nights.books / "state").rglob("*.*")}
    assert "state/night-1/00001.parquet" in left  # file b was never written again
    assert "state/night-1/manifest.json" not in left
    nights.night(b=["b0"])
    assert nights.ids()[-1] == "b0"


def test_tagged_versions_stay(nights: Nights) -> None:
    lance.dataset(nights.uri).tags.create("christmas", 4)
    found = rubbish(nights.uri, upkeep(), later(40))
    assert found.versions == (1, 2, 5, 6, 7, 8)
    clean(found)
    assert nights.ids("christmas")


def test_what_a_restored_version_is_read_from_stays(nights: Nights) -> None:
    publish.rollback(nights.uri, 4)
    store.restore(nights.uri)
    lance.dataset(nights.uri).create_scalar_index("price", "BTREE")
    publish.publish(nights.uri, 14, "by hand")
    clean(rubbish(nights.uri, upkeep(keep_versions=1, keep_days=0), later(40)))
    assert store.run_of(store.open_version(nights.uri))[store.RUN_ID] == "night-2"
    assert nights.versions() == [3, 4, 13, 14]  # 13, the Restore itself: the walk down to night-2 leads over it
    nights.files["a"] = []
    nights.night(a=["a7"])
    assert "a7" in nights.ids()


def rejected(nights: Nights) -> int:
    """A candidate beside the head that failed its gates."""
    head = lance.dataset(nights.uri)
    fragments = [lance.FragmentMetadata.from_json(json.dumps(commits.stage(nights.uri, rows(["x"]), mode="append")))]
    shorter = head.get_fragments()[0].delete_rows([15])
    operation = lance.LanceOperation.Update(new_fragments=fragments, updated_fragments=[shorter])
    version = int(lance.LanceDataset.commit(nights.uri, operation, read_version=head.version, detached=True).version)
    head.tags.create("rejected-night-9", version)
    return version


def test_rejected_versions_beside_the_head(nights: Nights) -> None:
    version = rejected(nights)
    keep = upkeep(keep_rejected_days=5, orphan_days=1)
    found = rubbish(nights.uri, keep, later(4))
    assert found.tags == ()
    assert found.orphans == ()
    clean(found)
    assert "x" in nights.ids("rejected-night-9")
    found = rubbish(nights.uri, keep, later(6))
    assert found.tags == ("rejected-night-9",)
    names = sorted(stat.uri.rsplit("/", 2)[1] for stat in found.orphans)
    assert names == ["_deletions", "_transactions", "_versions", "data"]
    clean(found)
    assert "rejected-night-9" not in store.open_version(nights.uri, None).tags.list()
    assert not (nights.folder / "things.lance" / "_versions" / f"d{version}.manifest").exists()
    assert nights.ids()


def test_files_of_a_night_that_died(nights: Nights) -> None:
    commits.stage(nights.uri, rows(["lost"]), mode="append")
    storage.write_bytes(f"{runs.run_directory(nights.uri, 'dead')}/plan-1/rows.parquet", b"half")
    assert rubbish(nights.uri, upkeep(), later(6.9)).orphans == ()
    found = rubbish(nights.uri, upkeep(), later(7.1))
    assert len(found.orphans) == 1
    assert any("/dead/" in stat.uri for stat in found.plans)
    before = nights.ids()
    items = clean(found, orphans=False)
    assert [item.deleted for item in items if item.kind == "files that no version names"] == [False]
    assert len(rubbish(nights.uri, upkeep(), later(7.1)).orphans) == 1
    clean(found)
    assert rubbish(nights.uri, upkeep(), later(7.1)).items() == ()
    assert nights.ids() == before


def test_an_unfinished_run_holds_the_table(nights: Nights) -> None:
    storage.write_json(f"{runs.run_directory(nights.uri, 'night-7')}/plan.json", {"run_id": "night-7"})
    found = rubbish(nights.uri, upkeep(), later(400))
    assert found.held == "run night-7 is not over; `conjoin run` ends it"
    assert (found.versions, found.orphans, found.tags) == ((), (), ())
    assert not any("night-7" in stat.uri for stat in found.plans)


def test_housekeeping_of_a_night_counts_orphans_only(nights: Nights) -> None:
    assert housekeep(nights.uri, upkeep()) == ()
    assert retention(nights.uri, upkeep(), later(0)).versions == ()
