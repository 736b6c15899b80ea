"""Nights one after the other, without Ray: after each the table equals one made anew from the same source."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from shop import DATE, Shop, open_shop, picture, row

from conjoin.jobs.nightly import plan, run
from conjoin.pipeline import comparison, heartbeat, night_page, store
from conjoin.pipeline import publish as publishing
from conjoin.pipeline.errors import GateError, Interrupted, StorageError
from conjoin.pipeline.heartbeat import read_beats
from conjoin.pipeline.night import read_night
from conjoin.pipeline.plan import load_plan
from conjoin.pipeline.query import open_table
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.stager import Stager
from conjoin.pipeline.status import look


@pytest.fixture
def shop(tmp_path: Path, small_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = open_shop(tmp_path, small_encoder, monkeypatch)
    made.night()
    return made


def embedded(shop: Shop) -> dict[str, int]:
    found: dict[str, int] = {}
    for modality, count in shop.embedded:
        found[modality] = found.get(modality, 0) + count
    return found


def test_the_first_night_embeds_everything(shop: Shop) -> None:
    assert embedded(shop) == {"image": 18, "text": 18}
    shop.check()


def test_nothing_changed(shop: Shop) -> None:
    version = store.head(str(shop.folder / "things.lance")).version
    assert shop.night().status == "unchanged"
    assert store.head(str(shop.folder / "things.lance")).version == version


def test_new_changed_and_deleted_rows(shop: Shop) -> None:
    shop.write(a=[row(0), row(1, caption="green"), *(row(n) for n in range(3, 8)), row(100)])
    report = shop.night()
    assert shop.plan(report) == {"new": 1, "changed": 1, "changed_text": 1, "unchanged": 6, "deleted": 1, "skipped": 10}
    assert embedded(shop) == {"text": 2, "image": 1}
    shop.check()


def test_only_prices(shop: Shop) -> None:
    shop.write(b=[row(n, price=n / 2) for n in range(8, 14)])
    report = shop.night()
    assert shop.plan(report) == {"kept": 6, "skipped": 12}
    assert embedded(shop) == {}
    shop.check()


def test_rows_that_move_between_files(shop: Shop) -> None:
    shop.write(a=[row(n) for n in range(4)], c=[*(row(n) for n in range(14, 18)), *(row(n) for n in range(4, 8))])
    report = shop.night()
    assert shop.plan(report) == {"moved": 4, "unchanged": 8, "skipped": 6}
    assert embedded(shop) == {}
    shop.check()
    shop.write(c=[row(n) for n in range(14, 18)])
    shop.night()
    shop.check()


def test_all_files_rewritten_under_new_names(shop: Shop) -> None:
    shop.write(a=None, b=None, c=None, x=[row(n) for n in range(9)], y=[row(n, caption="blue") for n in range(9, 18)])
    report = shop.night()
    assert shop.plan(report) == {"changed": 9, "changed_text": 9, "moved": 9}
    assert embedded(shop) == {"text": 1}
    shop.check()


def test_a_new_encoder(shop: Shop, tmp_path: Path) -> None:
    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    towers = {"text": TowerOptions(max_tokens=16, width=16), "image": TowerOptions(size_px=16, width=16)}
    save(build(towers, 8, ["blue car", "red apple"]), tmp_path / "other", {})
    shop.encoder = tmp_path / "other"
    shop.write(
        a=[row(0), row(1, caption="green", price=7.0), row(2, price=9.0), *(row(n) for n in range(3, 8)), row(100)]
    )
    before = shop.table()
    report = shop.night()
    assert report.status == "published"
    assert embedded(shop) == {"image": 19, "text": 19}
    shop.check()
    uri = str(shop.folder / "things.lance")
    assert store.open_version(uri, "previous").to_table().sort_by("id").equals(before)
    assert [column.encoder for column in store.vector_columns(store.open_version(uri)).values()] == [
        str(shop.encoder)
    ] * 2


def test_a_modality_more(shop: Shop) -> None:
    """First only texts, then pictures too."""
    shop.source = {"image": None}
    shop.write(a=[row(n) for n in range(6)], b=None, c=None)
    run(shop.config("texts.lance"), DATE)
    shop.source = {}
    shop.embedded.clear()
    run(shop.config("texts.lance"), DATE)
    assert embedded(shop) == {"image": 6}
    shop.night()
    ours, theirs = shop.table("texts.lance"), shop.table()
    assert sorted(ours.schema.names) == sorted(theirs.schema.names)
    for name in theirs.schema.names:
        assert ours[name].to_pylist() == pytest.approx(theirs[name].to_pylist()) if name == "price" else True
    assert ours["image_hash"].to_pylist() == theirs["image_hash"].to_pylist()


def test_changed_by_spares_reading_the_pictures(shop: Shop) -> None:
    shop.source = {"changed_by": "updated"}
    shop.night()
    shop.check()
    shop.write(a=[row(0, updated=1, picture=picture(50)), row(1, updated=1), *(row(n) for n in range(2, 8))])
    report = shop.night()
    assert embedded(shop) == {"image": 1}
    assert shop.plan(report)["changed_image"] == 1
    shop.check()


def test_another_kept_column(shop: Shop) -> None:
    shop.source = {"keep": ["price", "updated"]}
    report = shop.night()
    assert embedded(shop) == {}
    assert shop.plan(report) == {"kept": 18}
    shop.check()


def test_the_plan_tells_what_the_night_then_does(shop: Shop) -> None:
    assert plan(shop.config()).lines() == ["nothing to do: the live version is up to date with the source"]
    shop.write(a=[row(0), row(1, caption="green"), row(2, caption="green"), *(row(n) for n in range(3, 7)), row(100)])
    found = plan(shop.config())
    assert {kind: count for kind, count in found.counts.items() if count} == {
        "new": 1,
        "changed": 2,
        "changed_text": 2,
        "unchanged": 5,
        "deleted": 1,
        "skipped": 10,
    }
    assert (found.embed, found.contents) == ({"image": 1, "text": 3}, {"text": 2})
    assert (found.uris, found.nothing, dict(found.files)) == (
        0,
        False,
        {"opened": 1, "recalled": 0, "skipped": 2, "gone": 0},
    )
    assert found.expected is not None
    before = sorted(shop.folder.rglob("*"))
    plan(shop.config())
    assert sorted(shop.folder.rglob("*")) == before
    over = plan(shop.config(limits={"hours": 1e-9})).over
    assert "limits.hours" in over
    shop.night()
    assert embedded(shop) == {"image": 1, "text": 2}


def test_a_second_night_of_the_day_goes_on_where_a_dead_one_stopped(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes between two attempts is left to the next night, which the same command begins."""
    shop.write(a=[row(n, caption="green") for n in range(8)], b=[row(n, caption="blue") for n in range(8, 14)])
    whole = Stager.stage

    def dies(self: Stager, number: int) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return whole(self, number)

    monkeypatch.setattr(Stager, "stage", dies)
    with pytest.raises(Interrupted):
        shop.night()
    monkeypatch.setattr(Stager, "stage", whole)
    shop.write(b=[row(n, caption="yellow") for n in range(9, 15)], c=[row(n) for n in range(15, 18)])
    report = shop.night()
    assert report.run_id == "things-2026-01-01.3"
    shop.check()
    assert load_plan(run_directory(str(shop.folder / "things.lance"), "things-2026-01-01.2")).counts["changed"] == 14


def test_the_night_after_a_rollback_builds_on_what_is_live(shop: Shop) -> None:
    uri = str(shop.folder / "things.lance")
    sql = "SELECT id, price, distance(text_vec, text('green')) AS d FROM things ORDER BY d, id LIMIT 10"
    before, answers = shop.table(), open_table(uri).sql(sql).to_pylist()
    shop.write(a=[row(n, caption="green") for n in range(8)])
    shop.night()
    assert open_table(uri).sql(sql).to_pylist() != answers
    publishing.rollback(uri)
    assert shop.table().equals(before)
    assert open_table(uri).sql(sql).to_pylist() == answers
    shop.write(b=[row(n, price=1.0) for n in range(8, 14)])
    report = shop.night()
    assert shop.plan(report)["changed"] == 8
    shop.check()
    assert store.head(uri).to_table().num_rows == 18


def test_rows_of_a_stranger_on_the_head_are_not_built_on(shop: Shop) -> None:
    import lance

    uri = str(shop.folder / "things.lance")
    lance.write_dataset(store.head(uri).to_table(limit=3), uri, mode="append")
    shop.write(a=[row(n, caption="green") for n in range(8)])
    shop.night()
    shop.check()
    assert store.head(uri).count_rows() == 18


def test_a_canary_is_a_table_of_its_own(shop: Shop) -> None:
    before = shop.table()
    for limit in (5, 12):
        report = run(shop.config(), DATE, limit=limit)
        assert (report.rows, report.status, Path(report.table).name) == (limit, "published", "things__canary.lance")
    assert shop.table("things__canary.lance")["id"].to_pylist() == sorted(f"r{n}" for n in range(12))
    assert shop.table().equals(before)
    assert shop.night().status == "unchanged"


def test_a_rejected_night_leaves_readers_alone_and_can_be_forced(shop: Shop) -> None:
    """Gates look beside the head; what they reject is tagged, and plain readers see the old rows."""
    uri, before = str(shop.folder / "things.lance"), shop.table()
    shop.write(c=None)
    strict = shop.config(gates={"row_change": 0.01})
    with pytest.raises(GateError, match="row change"):
        run(strict, DATE)
    assert shop.table().equals(before)
    assert store.head(uri).to_table().sort_by("id").equals(before)
    night = read_night(uri, "things-2026-01-01.2")
    assert (night.status, "row change" in night.problem) == ("rejected", True)
    assert "rejected-things-2026-01-01.2" in store.head(uri).tags.list()
    assert publishing.find_rejected(uri, "things-2026-01-01.2").num_rows == 14
    with pytest.raises(GateError, match="row change"):
        run(strict, DATE)
    shop.night()
    shop.check()


def test_an_index_gate_that_fails_gives_plain_readers_the_old_rows(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, before = str(shop.folder / "things.lance"), shop.table()
    shop.write(c=None)

    def fails(*args: object, **options: object) -> None:
        raise GateError("recall", where=f"{uri} version {store.head(uri).version}")

    monkeypatch.setattr("conjoin.jobs.tonight.check_indexed", fails)
    with pytest.raises(GateError):
        shop.night()
    monkeypatch.undo()
    assert shop.table().equals(before)
    assert store.head(uri).to_table().sort_by("id").equals(before)
    assert publishing.find_rejected(uri, "things-2026-01-01.2").num_rows == 14


def test_a_night_clears_up_behind_itself_and_says_so(shop: Shop) -> None:
    uri = str(shop.folder / "things.lance")
    leases = shop.folder / "things.conjoin" / "lease"
    for price in (1.0, 2.0, 3.0):
        shop.write(b=[row(n, price=price) for n in range(8, 14)])
        shop.night()
    for path in leases.iterdir():
        os.utime(path, (0, 0))
    shop.write(b=[row(n, price=4.0) for n in range(8, 14)])
    report = shop.night(upkeep={"keep_run_days": 0})
    gone = {item.kind: item.count for item in report.cleaned if item.deleted}
    assert gone.keys() == {"plans and units of nights that are over", "old leases"}
    assert [path.name for path in sorted(leases.iterdir())] == ["00000003.json", "00000004.json", "00000005.json"]
    assert read_night(uri, report.run_id) == report
    assert "plans and units of nights that are over" in night_page.render(report)
    shop.write(b=[row(n, price=5.0) for n in range(8, 14)])
    assert shop.night().status == "published"
    shop.check()


def test_housekeeping_that_fails_leaves_the_night_published(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise StorageError("no right to delete")

    monkeypatch.setattr("conjoin.pipeline.cleaning.housekeep", refused)
    shop.write(b=[row(n, price=1.0) for n in range(8, 14)])
    report = shop.night()
    assert report.status == "published"
    assert "no right to delete" in report.problem
    assert read_night(report.table, report.run_id) == report


def test_a_night_says_how_far_its_plan_is(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, seen = str(shop.folder / "things.lance"), []
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)
    whole = comparison._join

    def slowly(*given: object) -> None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not any(beat.done == 6 for beat in read_beats(uri)):
            time.sleep(0.01)
        seen.extend([*read_beats(uri), *look(uri).working])
        whole(*given)  # type: ignore[arg-type]  # as it came

    monkeypatch.setattr(comparison, "_join", slowly)
    shop.write(b=[row(n, price=1.0) for n in range(8, 14)])
    report = shop.night()
    beat, working = seen
    assert (beat.run_id, beat.step, beat.done, beat.total) == (report.run_id, "plan", 6, 6)
    assert (working.run_id, working.state, working.step, working.units) == (report.run_id, "running", "plan", 0)
    assert read_beats(uri) == ()
