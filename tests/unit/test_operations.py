"""status, report, history, rollback, publish --force and repair as people type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command import Run

from conjoin.pipeline import publish, runs, state, storage, store
from conjoin.pipeline.gates import GateResult
from conjoin.pipeline.hook import Hook
from conjoin.pipeline.night import Night
from conjoin.pipeline.quarantine import quarantine_schema, replace_rows
from conjoin.pipeline.retries import due

RUN = "things-2026-01-01"


@pytest.fixture
def uri(make_table: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A published table of 40 rows whose night has a record, in the current directory with its run file."""
    monkeypatch.chdir(tmp_path)
    made = str(make_table(40, dim=8, live=False).uri)
    publish.publish(made, 1, RUN)
    gates = (GateResult("recall", True, "fine", value=0.993, limit=0.99),)
    night = Night(RUN, "published", version=1, rows=40, quarantined=2, counts={"new": 40}, gates=gates)
    over(made, night)
    write_run_file(made)
    return made


def over(uri: str, night: Night) -> None:
    storage.write_json(f"{runs.run_directory(uri, night.run_id)}/plan.json", {"units": []})
    runs.finish(uri, night.run_id, night.to_json())


def write_run_file(uri: str, **more: object) -> None:
    source = {"path": "rows.parquet", "id": "id", "text": "caption"}
    Path("conjoin.yaml").write_text(
        yaml.safe_dump({"name": "things", "source": source, "table": {"path": uri}, **more})
    )


def test_status(conjoin: Run, uri: str) -> None:
    lines = conjoin("status").out.splitlines()
    assert lines[0] == "no night is running"
    assert lines[1].startswith(f"live: version 1 of run {RUN} with 40 rows, publish ")
    assert lines[2:] == [f"last night: {RUN} published", "quarantine: empty"]
    found = json.loads(conjoin("status", uri, "--json").out)
    assert (found["live"]["version"], found["last"]["run_id"], found["working"]) == (1, RUN, [])


def test_status_of_a_bad_night(conjoin: Run, uri: str) -> None:
    hook = Hook("curl x", 7, 1.0, "no answer")
    over(uri, Night("things-2026-01-02", "rejected", seconds={"embed": 600.0}, hook=hook, problem="recall: .5"))
    storage.write_json(f"{runs.run_directory(uri, 'things-2026-01-03')}/plan.json", {"units": [{}] * 4})
    out = conjoin("status").out
    for words in (
        "run things-2026-01-03 is unfinished, 0 of 4 units done; `conjoin run` resumes it",
        "last night: things-2026-01-02 rejected in 10 min: recall: .5",
        "publish.hook ended with exit code 7, the version stays live (curl x): no answer",
    ):
        assert words in out


def test_the_page_of_a_night(conjoin: Run, uri: str, tmp_path: Path) -> None:
    path = Path(conjoin("report").out.strip())
    assert path == tmp_path / "things.conjoin" / "runs" / RUN / "report.html"
    assert RUN in path.read_text()
    assert conjoin("report", RUN).out == conjoin("report", uri, RUN).out == f"{path}\n"
    assert conjoin("report", uri, "-o", "page.html").out == "page.html\n"
    assert "report.json" not in Path("page.html").read_text()
    assert json.loads(conjoin("report", "--json").out)["counts"] == {"new": 40}
    done = conjoin("report", "things-2020-01-01")
    assert (done.code, done.out) == (1, "")
    assert f"The newest are: {RUN}" in done.err
    assert conjoin("report", "-o", "/nowhere/page.html").code == 2


def test_history_has_the_figures_of_its_nights(conjoin: Run, uri: str) -> None:
    publish.reject(uri, 1, "things-2026-01-02")
    rejected, published = json.loads(conjoin("history", "--json").out)
    assert (rejected["action"], rejected["new"], rejected["figures"]) == ("rejected", None, {})
    assert (published["live"], published["new"], published["quarantined"]) == (True, 40, 2)
    assert published["figures"] == {"recall": 0.993}
    assert len(json.loads(conjoin("history", "--json", "--last", "1").out)) == 1
    assert "recall 0.993" in conjoin("history").out


def beside(uri: str, rows: int, make: Callable[..., Any], tmp_path: Path) -> int:
    """A rejected candidate of so many rows, not on the head."""
    from lance.fragment import write_fragments

    head = lance.dataset(uri)
    other = make(rows, dim=8, uri=f"{tmp_path}/other.lance").rows.cast(head.schema)
    fragments = write_fragments(other, uri, schema=head.schema, mode="overwrite", data_storage_version="2.2")
    work = lance.Transaction(
        read_version=head.version,
        operation=lance.LanceOperation.Overwrite(head.schema, list(fragments)),
        transaction_properties={"run_id": "things-2026-01-02"},
    )
    return int(lance.LanceDataset.commit(uri, work, detached=True).version)


def test_a_rejected_candidate_is_forced(conjoin: Run, uri: str, make_table: Callable[..., Any], tmp_path: Path) -> None:
    version = beside(uri, 30, make_table, tmp_path)
    publish.reject(uri, version, "things-2026-01-02")
    assert str(version) in conjoin("history").out
    done = conjoin("publish", "--force", "things-2026-01-02")
    assert done.out.startswith("version ")
    assert "of run things-2026-01-02, forced, with 30 rows is live, before it version 1" in done.out
    dataset = store.open_version(uri)
    assert (dataset.count_rows(), store.run_of(dataset)["run_id"]) == (30, "things-2026-01-02")
    assert dataset.describe_indices(), "it is indexed before it is live"
    entry = json.loads(conjoin("publish", "--force", "things-2026-01-02", "--json").out)
    assert (entry["action"], entry["version"], entry["hook"]) == ("forced", dataset.version, None)
    assert len(json.loads(conjoin("history", "--json").out)) == 3
    assert conjoin("rollback").out.startswith(f"version 1 of run {RUN} ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["publish"], 2, "Missing option '--force'"),
        (["publish", "--force", "x"], 1, "no rejected run or version 'x'"),
        (["publish", "--force", RUN], 1, "Rejected runs are: none"),
        (["repair"], 1, "no night of ours filled the live version"),
        (["report", "a", "b", "c"], 2, "expected [FILE] and [RUN]"),
        (["status", "none.yaml"], 2, "no run file"),
    ],
)
def test_errors(conjoin: Run, uri: str, words: list[str], code: int, message: str) -> None:
    done = conjoin(*words)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_a_rollback_runs_the_hook_and_says_when_it_fails(
    conjoin: Run, uri: str, make_table: Callable[..., Any]
) -> None:
    make_table(41, dim=8, mode="overwrite", live=False)
    publish.publish(uri, 2, "things-2026-01-02")
    write_run_file(uri, publish={"hook": 'echo "$CONJOIN_ACTION $CONJOIN_VERSION $CONJOIN_PREVIOUS" > told'})
    assert conjoin("rollback").code == 0
    assert Path("told").read_text() == "rollback 1 2\n"
    write_run_file(uri, publish={"hook": "echo no cache there >&2; exit 5"})
    done = conjoin("rollback", "--json")
    assert (done.code, json.loads(done.out)["hook"]["exit_code"]) == (1, 5)
    assert done.err.startswith("conjoin: publish.hook ended with exit code 5, the version stays live")
    assert "no cache there" in done.err
    assert store.live_version(store.open_version(uri)) == 2


def test_a_night_whose_hook_failed_is_loud(conjoin: Run, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night("things-2026-01-02", "published", version=2, hook=Hook("curl x", 7, 1.0, "no answer"))
    monkeypatch.setattr("conjoin.jobs.nightly.run", lambda *_, **__: night)
    done = conjoin("run", "--json")
    assert (done.code, json.loads(done.out)["version"]) == (1, 2)
    assert done.err == ("conjoin: publish.hook ended with exit code 7, the version stays live (curl x): no answer\n")


@pytest.fixture
def troubled(uri: str) -> str:
    """The live version comes from a night that left three values in quarantine."""
    entries = [
        {"id": key, "modality": "image", "run_id": "night", "stage": stage, "reason": reason, "file": "/a.parquet"}
        for key, stage, reason in (
            ("a", "fetch", "nothing there (HTTP 404) [https://x.org/1.jpg]"),
            ("b", "fetch", "nothing there (HTTP 404) [https://x.org/2.jpg]"),
            ("c", "decode", "zero bytes"),
        )
    ]
    replace_rows(uri, "night", pa.Table.from_pylist(entries, quarantine_schema(pa.string())))
    manifest = state.Manifest("night", "f", "e", "c", "p", 40, (), ("night",))
    state.write_manifest(uri, manifest)
    head = lance.dataset(uri)
    facts = {"run_id": "night", store.STATE: state.manifest_path("night")}
    operation = lance.LanceOperation.Append([])
    work = lance.Transaction(read_version=head.version, operation=operation, transaction_properties=facts)
    publish.publish(uri, int(lance.LanceDataset.commit(uri, work).version), "night")
    return uri


def test_repair_shows_samples_and_marks(conjoin: Run, troubled: str) -> None:
    manifest = state.read_manifest(store.open_version(troubled))
    assert manifest is not None
    lines = conjoin("repair").out.splitlines()
    assert lines[0] == "3 value(s) in quarantine"
    assert lines[1].split() == ["2", "fetch", "image", "nothing", "there", "(HTTP", "404)", "[...]"]
    assert lines[2].strip() == "e.g. a: nothing there (HTTP 404) [https://x.org/1.jpg]"
    assert [group["count"] for group in json.loads(conjoin("repair", "--json").out)] == [2, 1]
    sample = json.loads(conjoin("repair", "--sample", "1", "--json").out)
    assert [(row["id"], row["attempts"], row["run_id"]) for row in sample] == [("a", 1, "night"), ("c", 1, "night")]
    assert conjoin("repair", "--out", "all.parquet").out == "all.parquet\n"
    assert pq.read_table("all.parquet").num_rows == 3
    assert "quarantine: 2 fetch, 1 decode" in conjoin("status").out
    assert due(troubled, manifest, 0) is None
    done = conjoin("repair", "--retry", "c", "--retry", "fetch")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("3 value(s) are due")
    found = due(troubled, manifest, 0)
    assert found is not None
    assert found.num_rows == 3
    unknown = conjoin("repair", "--retry", "zzz")
    assert (unknown.code, unknown.err[:34]) == (1, "conjoin: not in quarantine: zzz [/")
