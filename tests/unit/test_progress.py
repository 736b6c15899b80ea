"""Progress on stderr: stdout stays clean whatever is printed meanwhile."""

from __future__ import annotations

import signal

import pytest

from conjoin.jobs.progress import Screen
from conjoin.jobs.stopping import stoppable
from conjoin.pipeline.progress import Progress


def test_stdout_belongs_to_data(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        print("a library's chatter")
        screen.show(Progress("embed", 1_000, 2_000, facts={"rows/s": 123.4, "units": "1/2"}))
    print("data")
    out, err = capsys.readouterr()
    assert out == "data\n"
    assert "a library's chatter" in err
    assert "embed: 1,000/2,000 rows  rows/s 123  units 1/2" in err


def test_without_a_terminal_a_step_speaks_now_and_then_and_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        for done in range(101):
            screen.show(Progress("train", done, 100, "steps"))
        screen.show(Progress("train", 100, 100, "steps"))
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["0/100", "100/100"]


def test_sigterm_is_ctrl_c_while_work_can_be_stopped() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
