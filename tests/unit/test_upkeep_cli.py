"""clean, forget and export --since as people type them: data on stdout, words on stderr, exit 0, 1 or 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import Run
from small_nights import Nights

from conjoin.pipeline import runs, storage, store


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """Two nights and their run file, `conjoin.yaml` in the working directory."""
    made = Nights(tmp_path)
    made.night(a=["one-1", "two-2", "three-3"])
    made.night(a=["one-1", "two-2", "four-4"])
    fields = {
        "name": "things",
        "source": {"path": str(made.folder / "source"), "id": "id", "text": "id"},
        "table": {"path": made.uri},
        "upkeep": {"keep_run_days": 0},
    }
    (tmp_path / "conjoin.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    return made


def test_clean_shows_before_it_deletes(nights: Nights, conjoin: Run) -> None:
    plan = Path(runs.run_directory(nights.uri, "night-1"), "plan.json")
    shown = conjoin("clean")
    assert (shown.code, "plans and units of nights that are over" in shown.out) == (0, True)
    assert shown.err == "nothing was deleted; --yes deletes it\n"
    assert plan.exists()
    done = conjoin("clean", "conjoin.yaml", "--yes", "--json")
    found = json.loads(done.out)
    assert [(item["kind"], item["count"], item["deleted"]) for item in found["items"]] == [
        ("plans and units of nights that are over", 6, True)
    ]
    assert not plan.exists()
    assert conjoin("clean").out == "nothing to clean\n"


def test_clean_says_what_an_unfinished_night_holds(nights: Nights, conjoin: Run) -> None:
    storage.write_json(f"{runs.run_directory(nights.uri, 'night-7')}/plan.json", {"run_id": "night-7"})
    assert "stay: run night-7 is not over; `conjoin run` ends it" in conjoin("clean").err


def test_clean_without_a_table(tmp_path: Path, conjoin: Run) -> None:
    done = conjoin("clean", str(tmp_path / "none.lance"))
    assert (done.code, done.out) == (1, "")
    assert "no table" in done.err


def test_forget_refuses_then_erases_and_prints_the_proof(nights: Nights, conjoin: Run) -> None:
    refused = conjoin("forget", "two-2")
    assert (refused.code, "still in the source" in refused.err) == (1, True)
    nights.files["a"].remove("two-2")
    nights.write("a")
    done = conjoin("forget", "two-2", "--file", "conjoin.yaml")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("1 rows erased; live is version ")
    assert sum("not found in" in line for line in lines) == 4
    assert nights.ids() == ["four-4", "one-1"]


def test_forget_by_the_tables_path_as_json(nights: Nights, conjoin: Run) -> None:
    nights.files["a"].remove("two-2")
    nights.write("a")
    done = conjoin("forget", "two-2", "three-3", "--file", nights.uri, "--json")
    found = json.loads(done.out)
    assert (done.code, found["proven"], found["rows"]) == (0, True, 1)
    assert "not looked into, since no run file was given" in done.err


def test_export_since(nights: Nights, conjoin: Run, tmp_path: Path) -> None:
    done = conjoin("export", "--since", "night-1", "--to", str(tmp_path / "out"))
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'out'}\n", "1 upserts, 1 deletes\n")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format"], manifest["since"]["run_id"], manifest["until"]["run_id"]) == (1, "night-1", "night-2")
    back = conjoin("export", nights.uri, "--since", "live", "--until", "1", "--to", str(tmp_path / "back"), "--json")
    assert back.code == 1  # version 1 is a commit that was never live
    back = conjoin(
        "export", nights.uri, "--since", "live", "--until", "night-1", "--to", str(tmp_path / "back"), "--json"
    )
    assert (json.loads(back.out)["upserts"], json.loads(back.out)["deletes"]) == (1, 1)
    assert store.open_version(nights.uri).count_rows() == 3


def test_export_of_nothing_is_a_usage_error(nights: Nights, conjoin: Run, tmp_path: Path) -> None:
    done = conjoin("export", "--to", str(tmp_path / "out"))
    assert (done.code, "name an encoder's folder" in done.err) == (2, True)
