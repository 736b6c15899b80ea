"""Erasure over real nights: the id is in no version, no file and no page any more; everything else is as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import lance
import pyarrow.parquet as pq
import pytest
from small_nights import Nights, rows

from conjoin.pipeline import commits, measures, publish, runs, state, storage, store
from conjoin.pipeline.delta import export_delta
from conjoin.pipeline.erasure import Erasure, forget
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.index import incomplete
from conjoin.pipeline.quarantine import rows_of
from conjoin.pipeline.traces import without

ID = "customer-0007"
NAMES = [f"customer-{n:04d}" for n in range(30)]


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """Three nights; the id comes with the first, is in no source file any more, and live still holds it."""
    made = Nights(tmp_path, bad=["bad-0001", "bad-0002"])
    made.night(a=NAMES[:15] + made.bad, b=NAMES[15:25])
    made.night(b=NAMES[16:26])
    made.night(b=NAMES[17:27])
    return made


def leave(nights: Nights, *ids: str) -> None:
    """The owner takes ids out of the source; no night has run since."""
    for name, there in nights.files.items():
        nights.files[name] = [key for key in there if key not in ids]
        nights.write(name)


def places(nights: Nights, word: str) -> list[str]:
    """Files below the table's folder with the word in their bytes, decoded where they are Parquet."""
    found = []
    for path in sorted(nights.folder.rglob("*")):
        if path.is_file() and "source" not in path.parts:
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data = json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
            if word.encode() in data:
                found.append(str(path.relative_to(nights.folder)))
    return found


def config(nights: Nights) -> object:
    from conjoin.pipeline.source import SourceConfig

    return SourceConfig.model_validate({"path": str(nights.folder / "source"), "id": "id", "text": "id"})


def test_it_is_gone_everywhere_and_nothing_else_is(nights: Nights) -> None:
    lance.dataset(nights.uri).create_scalar_index("text", "INVERTED", name="text_words")
    publish.publish(nights.uri, int(lance.dataset(nights.uri).version), "by hand")
    measures.measure(store.open_version(nights.uri))
    before = nights.ids()
    assert any("things.lance/data" in place for place in places(nights, ID))
    assert any("things.conjoin/state" in place for place in places(nights, ID))
    leave(nights, ID)
    done = forget(nights.uri, [ID], config(nights))  # type: ignore[arg-type]  # a SourceConfig
    assert done.proven
    assert [check.found for check in done.proof] == [()] * 4
    assert (done.rows, done.warnings) == (1, ())
    assert places(nights, ID) == []
    assert places(nights, "words of " + ID) == []
    assert nights.ids() == [key for key in before if key != ID]
    dataset = store.open_version(nights.uri)
    assert incomplete(dataset) == {}
    assert {index.name for index in dataset.describe_indices()} == {"id_idx", "text_words"}
    assert dataset.to_table(columns=["id"], filter=f"id = '{NAMES[8]}'").num_rows == 1
    assert dataset.to_table(columns=["id"], full_text_query="0008").num_rows == 1
    assert store.open_version(nights.uri, None).version == dataset.version


def test_the_next_night_builds_on_it(nights: Nights) -> None:
    leave(nights, ID)
    forget(nights.uri, [ID])
    manifest = state.read_manifest(store.open_version(nights.uri))
    assert manifest is not None
    assert manifest.run_id == publish.history(nights.uri)[0].run_id
    assert manifest.run_id.startswith("forget-")
    assert manifest.rows == 24
    assert [len(state.state_file(nights.uri, entry)) for entry in sorted(manifest.files, key=str)] == [16, 10]
    assert sorted(rows_of(nights.uri, manifest)["id"].to_pylist()) == nights.bad  # type: ignore[index]  # there are two
    nights.night(b=["customer-9999"])
    assert ID not in nights.ids()
    assert "customer-9999" in nights.ids()
    assert runs.unfinished(nights.uri) == []


def test_versions_without_it_stay(nights: Nights) -> None:
    """An id that came last: older versions never had it."""
    new = "customer-0026"
    old = [entry.version for entry in publish.history(nights.uri)]
    leave(nights, new)
    done = forget(nights.uri, [new])
    assert done.proven
    assert set(old[1:]) <= set(nights.versions())
    assert old[0] not in nights.versions()
    assert done.tags_removed == ("previous",)
    publish.rollback(nights.uri, old[1])
    assert NAMES[25] in nights.ids()


def test_rows_that_live_only_hides(nights: Nights) -> None:
    """A night deleted it already; its bytes are still in live's fragments and in older versions."""
    leave(nights, ID)
    nights.night()
    assert ID not in nights.ids()
    assert places(nights, ID)
    done = forget(nights.uri, [ID])
    assert (done.proven, done.rows) == (True, 0)
    assert places(nights, ID) == []
    assert len(nights.ids()) == 24


def test_quarantine(nights: Nights) -> None:
    leave(nights, "bad-0001")
    nights.bad.remove("bad-0001")
    done = forget(nights.uri, ["bad-0001"])
    assert done.proven
    assert places(nights, "bad-0001") == []
    manifest = state.read_manifest(store.open_version(nights.uri))
    assert manifest is not None
    assert rows_of(nights.uri, manifest)["id"].to_pylist() == ["bad-0002"]  # type: ignore[index]  # there is one


def test_still_in_the_source(nights: Nights) -> None:
    with pytest.raises(TableError, match=r"still in the source: \S+/a.parquet"):
        forget(nights.uri, [ID])
    assert ID in nights.ids()
    done = forget(nights.uri, [ID], anyway=True)
    assert done.proven
    assert done.warnings[0].startswith("still in the source, a night that reads it again brings it back")


def test_a_source_file_that_changed_but_still_has_it(nights: Nights) -> None:
    leave(nights, NAMES[8])
    found = forget(nights.uri, [ID], anyway=True).warnings
    assert "not looked into" in found[0]
    nights.night(a=NAMES[:15])
    leave(nights, NAMES[9])
    with pytest.raises(TableError, match=r"a\.parquet"):
        forget(nights.uri, [ID], config(nights))  # type: ignore[arg-type]  # a SourceConfig


def test_somebodys_tag_is_respected(nights: Nights) -> None:
    leave(nights, ID)
    lance.dataset(nights.uri).tags.create("audit", 2)
    with pytest.raises(TableError, match="the tag audit keeps version 2, which holds the id"):
        forget(nights.uri, [ID])
    assert ID in nights.ids()


def test_rejected_versions_beside_the_head_go(nights: Nights) -> None:
    head = lance.dataset(nights.uri)
    fragment = lance.FragmentMetadata.from_json(json.dumps(commits.stage(nights.uri, rows(["x"]), mode="append")))
    operation = lance.LanceOperation.Update(new_fragments=[fragment])
    beside = lance.LanceDataset.commit(nights.uri, operation, read_version=head.version, detached=True)
    head.tags.create("rejected-night-9", beside.version)
    leave(nights, ID)
    done = forget(nights.uri, [ID])
    assert "rejected-night-9" in done.tags_removed
    assert done.proven
    assert places(nights, "words of x") == []


def test_an_unfinished_run_refuses(nights: Nights) -> None:
    storage.write_json(f"{runs.run_directory(nights.uri, 'night-7')}/plan.json", {"run_id": "night-7"})
    with pytest.raises(TableError, match="run night-7 is not over"):
        forget(nights.uri, [ID])


def test_exports_are_named_and_reports_redacted(nights: Nights, tmp_path: Path) -> None:
    export_delta(nights.uri, str(tmp_path / "out"), since="0")
    report = nights.books / "runs" / "night-1" / "report.json"
    storage.write_json(str(report), {"run_id": "night-1", "problem": f"row {ID} of {ID}2", "example_id": ID})
    (report.parent / "report.html").write_text(f"<p>{ID}</p>")
    leave(nights, ID)
    done = forget(nights.uri, [ID])
    assert done.warnings[-1] == f"an export holds it, and so may whoever read it: {tmp_path / 'out'}"
    assert json.loads(report.read_text())["problem"] == f"row (forgotten) of {ID}2"
    assert not (report.parent / "report.html").exists()
    assert done.proven


def test_again_and_unknown_ids_change_nothing(nights: Nights) -> None:
    leave(nights, ID)
    forget(nights.uri, [ID])
    version = store.open_version(nights.uri).version
    again = forget(nights.uri, [ID, "nobody"])
    assert (again.rows, again.version, again.versions_dropped, again.proven) == (0, version, (), True)


def test_several_at_once(nights: Nights) -> None:
    gone = [NAMES[3], NAMES[9], NAMES[20]]
    leave(nights, *gone)
    done = forget(nights.uri, gone)
    assert (done.proven, done.rows) == (True, 3)
    assert not set(gone) & set(nights.ids())


def test_killed_before_older_versions_went_it_is_repeated(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    from conjoin.pipeline import erasure

    leave(nights, ID)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_reindex", "_stamp", "publish", "_drop_versions", "_clean_books", "_rewrite_quarantine"):
        with monkeypatch.context() as patch:
            patch.setattr(erasure, name, killed)
            with pytest.raises(KeyboardInterrupt):
                forget(nights.uri, [ID])
        assert nights.ids()
    done = forget(nights.uri, [ID])
    assert done.proven
    assert places(nights, ID) == []
    assert len(nights.ids()) == 24


def test_ids_inside_other_ids_do_not_count(tmp_path: Path) -> None:
    made = Nights(tmp_path)
    made.night(a=["c1", "c12", "c13"])
    leave(made, "c1")
    done = forget(made.uri, ["c1"])
    assert done.proven
    assert "within values of other rows" in done.proof[-1].note
    assert made.ids() == ["c12", "c13"]


@pytest.mark.parametrize(
    ("keys", "before", "after"),
    [
        (["r1"], {"problem": "row r1, not r12 or x-r1"}, {"problem": "row (forgotten), not r12 or x-r1"}),
        (
            ["r1"],
            {"run_id": "r1", "deep": [{"ids": ["r1", "r2"]}]},
            {"run_id": "r1", "deep": [{"ids": ["(forgotten)", "r2"]}]},
        ),
        ([7], {"rows": 7, "ids": [7, 8], "text": "7 rows"}, {"rows": 7, "ids": ["(forgotten)", 8], "text": "7 rows"}),
        (["7"], {"rows": 7, "text": "7 rows", "id": "7"}, {"rows": 7, "text": "7 rows", "id": "(forgotten)"}),
    ],
    ids=["words", "nested", "numbers", "digits"],
)
def test_redaction(keys: list[str | int], before: object, after: object) -> None:
    assert json.loads(without(json.dumps(before).encode(), keys)) == after


def test_the_proof_fails_where_something_is_left(nights: Nights) -> None:
    leave(nights, ID)
    done = forget(nights.uri, [ID])
    assert isinstance(done, Erasure)
    (nights.books / "state" / "stray.txt").write_text(f"about {ID}")
    from conjoin.pipeline.erasure import _left
    from conjoin.pipeline.traces import Tracer, prove

    proof = prove(Tracer(nights.uri, [ID]), _left(nights.uri))
    assert not dataclasses.replace(done, proof=proof).proven
