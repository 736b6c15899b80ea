"""The command after the tag moved: its environment, its failure, its end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conjoin.pipeline.hook import Hook, PublishConfig, run_hook
from conjoin.pipeline.publish import Entry

ENTRY = Entry(2, "publish", "shop-2026-01-02", 7, 5, 100, "2026-01-02T01:00:00+00:00")


def ran(command: str, entry: Entry = ENTRY, timeout_s: float = 20) -> Hook:
    found = run_hook(PublishConfig(hook=command, hook_timeout_s=timeout_s), "/data/shop.lance", entry)
    assert found is not None
    return found


def test_no_hook() -> None:
    assert run_hook(PublishConfig(), "/data/shop.lance", ENTRY) is None


@pytest.mark.parametrize(("before", "previous"), [(5, "5"), (None, "")])
def test_it_knows_what_moved(tmp_path: Path, before: int | None, previous: str) -> None:
    out = tmp_path / "out"
    names = "$CONJOIN_RUN_ID,$CONJOIN_VERSION,$CONJOIN_PREVIOUS,$CONJOIN_TABLE,$CONJOIN_ACTION"
    found = ran(f'echo "{names}" > {out}', Entry(2, "rollback", "shop-2026-01-02", 7, before, 100, ""))
    assert (found.exit_code, found.failed, found.problem) == (0, False, "")
    assert out.read_text() == f"shop-2026-01-02,7,{previous},/data/shop.lance,rollback\n"


def test_a_failure_says_its_exit_code_and_the_end_of_stderr() -> None:
    found = ran("echo to stdout; seq 1 5000 >&2; echo cannot reach the cache >&2; exit 3")
    assert (found.exit_code, found.failed) == (3, True)
    assert found.output.endswith("5000\ncannot reach the cache")
    assert len(found.output) <= 1000
    assert "ended with exit code 3, the version stays live" in found.problem


def test_without_stderr_the_end_of_stdout_is_told() -> None:
    assert ran("echo why; exit 1").output == "why"
    assert ran("no-such-command-here").exit_code == 127


def test_one_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    found = ran(f"(sleep 2; touch {tmp_path}/late) & sleep 60", timeout_s=0.3)
    assert time.monotonic() - started < 2
    assert (found.timed_out, found.failed, found.exit_code) == (True, True, -9)
    assert "was killed after 0 s" in found.problem
    time.sleep(2.2)
    assert not (tmp_path / "late").exists()
