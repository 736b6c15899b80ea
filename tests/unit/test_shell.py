"""The shell: from a pipe, line by line, and on a real terminal with history, completion and Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conjoin.jobs.shell import Shell, Words, history_file, run_shell
from conjoin.pipeline.query import Table, open_table
from conjoin.pipeline.query.parse import statements


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("shell")
    (folder / "orders.csv").write_text("id,amount\nrow-0-000001,3\n")
    tables = {"orders": f"{folder}/orders.csv", "lost": f"{folder}/lost.csv"}
    return open_table(make_table_at(f"{folder}/things.lance", 5, dim=4).uri, tables=tables)


Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(table: Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Code, stdout and stderr of lines that come through a pipe."""

    def run(text: str, **options: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = run_shell(table, **options)
        return (code, *capsys.readouterr())

    return run


def test_statements_of_a_pipe_are_answered_in_order(typed: Typed) -> None:
    text = "SELECT count(*)\n  AS n FROM things; SELECT 1 AS a;\n\nSELECT 'x;y' AS b -- not; here\n;SELECT 2 AS last"
    assert typed(text, style="csv") == (0, "n\n5\na\n1\nb\nx;y\nlast\n2\n", "")


def test_an_error_ends_a_statement_and_not_the_shell(typed: Typed) -> None:
    code, out, err = typed("SELECT idd FROM things;\nSELECT id FROM\n  things WHERE;\nSELECT 1 AS a;\n", style="csv")
    assert (code, out) == (1, "a\n1\n")
    first, second, line, caret = err.splitlines()
    assert first == "conjoin: there is no column 'idd'; did you mean 'id'?"
    assert "line 2, column 10" in second
    assert line[caret.index("^") :] == "WHERE"


def test_tables_and_columns_are_described(typed: Typed) -> None:
    _, out, _ = typed("\\d\n\\d orders\n\\d THINGS;\n", style="csv")
    assert out.splitlines()[0] == "table,path"
    assert "amount,int64," in out
    assert re.search(r"^image_vec,.*image, 4 dimensions, cosine", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\\dd", "the shell has no \\dd. \\? lists its commands"),
        ("\\d thing", "there is no table 'thing'; did you mean 'things'?"),
        ("\\d lost", "the table 'lost' cannot be opened: no such file or directory"),
        ("SELECT 'open", "syntax error"),
        ("COPY things TO 'x.csv';", "COPY is not allowed"),
    ],
)
def test_what_is_wrong_is_said(typed: Typed, line: str, message: str) -> None:
    code, out, err = typed(line)
    assert (code, out) == (1, "")
    assert err.startswith(f"conjoin: {message}")


def test_times_are_told_when_asked_for(typed: Typed) -> None:
    _, _, err = typed("\\timing\nSELECT 1;\n\\timing off\nSELECT 1;\n\\?\n\\q\nSELECT nothing;")
    first, time_, last, *commands = err.splitlines()
    assert (first, last) == ("times are on", "times are off")
    assert re.fullmatch(r"[\d,]+ ms", time_)
    assert commands[0].startswith("\\d ")


def test_a_missing_end_is_waited_for(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C at the prompt forgets what was typed so far."""
    asked: list[bool] = []
    lines: Iterator[Any] = iter(["SELECT 1 AS a,", "", "2 AS b;", "SELECT oops", KeyboardInterrupt(), "SELECT 3 AS c;"])

    def read(unfinished: bool) -> str:
        asked.append(unfinished)
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    assert Shell(table, "csv").run(read) == 0
    assert asked == [False, True, True, False, True, False, False]
    assert capsys.readouterr() == ("a,b\n1,2\nc\n3\n", "")


@pytest.mark.parametrize(
    ("text", "complete", "rest"),
    [
        ("a; b", ["a"], " b"),
        ("a;;b;", ["a", "b"], ""),
        ("SELECT ';' ; x", ["SELECT ';'"], " x"),
        ("SELECT 'open; ", [], "SELECT 'open; "),
        ("/* ; */ a -- ;\n; b", ["/* ; */ a -- ;"], " b"),
        ("", [], ""),
    ],
)
def test_statements(text: str, complete: list[str], rest: str) -> None:
    assert statements(text) == (complete, rest)


def test_completion_offers_names_and_functions(table: Table) -> None:
    known = Words(table).known()
    assert known[:3] == ["things", "orders", "lost"]
    assert {"id", '"Odd Name"', "amount", "distance", "text", "\\timing", "QUALIFY", "array_distance"} <= set(known)
    assert not {"getenv", "read_text", "duckdb_settings"} & set(known)


def test_history_is_kept_below_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "conjoin" / "history"
    assert (tmp_path / "conjoin" / "history").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "conjoin" / "history"))
    assert history_file() is None


# Ctrl-C reaches whom the terminal belongs to.
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from conjoin.jobs.cli import main; main()"


class Terminal:
    """`conjoin query` on a terminal of its own."""

    def __init__(self, uri: str, state: Path) -> None:
        self.master, slave = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, "query", uri, "--csv"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"},
        )
        os.close(slave)

    def expect(self, pattern: str, timeout_s: float = 60) -> None:
        """Wait for it; what was shown before it is forgotten."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not come, but {self.shown[-800:]!r}"
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"{pattern!r} did not come, but {self.shown[-800:]!r}") from error
            self.answer_cursor()
        self.shown = self.shown[found.end() :]

    def answer_cursor(self) -> None:
        """A terminal says where its cursor is when it is asked."""
        if "\x1b[6n" in self.shown:
            self.shown = self.shown.replace("\x1b[6n", "")
            os.write(self.master, b"\x1b[1;1R")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_a_terminal(table: Table, tmp_path: Path) -> None:
    terminal = Terminal(table.uri, tmp_path)
    try:
        terminal.expect(r"things version 1")
        terminal.expect("things>")
        terminal.type("SELECT 40 + 2 AS sum;\r")
        terminal.expect(r"sum\r\n42\r\n")
        terminal.expect("things>")
        terminal.type("SELECT sum(hash(range)) FROM range(1000000000000);\r")
        time.sleep(1)
        terminal.type("\x03")
        terminal.expect("stopped")
        terminal.expect("things>")
        terminal.type("SELECT count(capt\t")
        terminal.expect("ion")  # drawn behind "capt", or with it as one word
        terminal.type(") AS most FROM things;\r")
        terminal.expect(r"most\r\n5\r\n")
        terminal.expect("things>")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    assert "SELECT 40 + 2 AS sum;" in (tmp_path / "conjoin" / "history").read_text()
