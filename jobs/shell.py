"""The interactive shell of `conjoin query`: statements up to `;` from a terminal or a pipe, until `\\q` or the end.

Assumes: an error or Ctrl-C ends a statement and never the shell; encoders that a query loaded stay warm. Rows go to
stdout; errors, times and prompts to stderr. Only a terminal needs prompt_toolkit.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.jobs.queries import pointed
from conjoin.jobs.render import Style, readable, write_rows
from conjoin.pipeline.errors import ConjoinError, QueryError
from conjoin.pipeline.query.parse import split_explain, statements

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from conjoin.pipeline.query import Table

# What gives the next line, told whether a statement is unfinished; EOFError ends the shell.
Read = Callable[[bool], str]
_COMMANDS = {
    "\\d": "the tables, or the columns of one: \\d [table]",
    "\\timing": "times on and off",
    "\\q": "leave; so does Ctrl-D",
    "\\?": "this list",
}
_STOPPED = "stopped"


def run_shell(table: Table, style: Style = "table", *, exact: bool = False, recall: float | None = None) -> int:
    """Until the end of the input; from a pipe 1 if a statement failed, as a script would want to know."""
    shell = Shell(table, style, exact=exact, recall=recall)
    if not sys.stdin.isatty():
        return shell.run(_from_pipe)
    print(f"{table.name} version {table.version}; end statements with `;`, \\? for help", file=sys.stderr)
    session = _session(table)
    shell.run(lambda unfinished: session.prompt("    ...> " if unfinished else f"{table.name}> "))
    return 0


def _from_pipe(_: bool) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


class Shell:
    """What has been typed so far, and how answers are shown."""

    def __init__(
        self, table: Table, style: Style = "table", *, exact: bool = False, recall: float | None = None
    ) -> None:
        self.table, self.style = table, style
        self.exact, self.recall = exact, recall
        self.timing, self.failed = False, False
        self._text = ""

    def run(self, read: Read) -> int:
        """Answers lines until EOFError or `\\q`; what is left unfinished then is a statement as well."""
        while True:
            try:
                line = read(bool(self._text.strip()))
            except KeyboardInterrupt:
                self._text = ""
                continue
            except EOFError:
                break
            if line.strip() == "\\q":
                return int(self.failed)
            self.feed(line)
        rest, self._text = self._text, ""
        if rest.strip():
            self._try(rest, self._answer)
        return int(self.failed)

    def feed(self, line: str) -> None:
        """One line: a command of the shell, or more of a statement; answers every statement that it completes."""
        if not self._text.strip() and line.lstrip().startswith("\\"):
            self._try(line.strip().rstrip(";"), self._command)
            return
        self._text += line + "\n"
        if ";" not in line:
            return
        complete, self._text = statements(self._text)
        for sql in complete:
            self._try(sql, self._answer)

    def _try(self, text: str, action: Callable[[str], None]) -> None:
        try:
            action(text)
        except KeyboardInterrupt:
            print(_STOPPED, file=sys.stderr)
            self.failed = True
        except ConjoinError as error:
            print(f"conjoin: {pointed(error, text)}", file=sys.stderr)
            self.failed = True

    def _answer(self, sql: str) -> None:
        start = time.perf_counter()
        if split_explain(sql)[0] and self.style != "csv":
            found = self.table.explain(sql, exact=self.exact, recall=self.recall)
            print(found.to_json() if self.style == "json" else found)
        else:
            write_rows(self.table.sql(sql, exact=self.exact, recall=self.recall).to_arrow(), style=self.style)
        seconds = time.perf_counter() - start
        sys.stdout.flush()
        if self.timing:
            print(f"{seconds * 1000:,.0f} ms", file=sys.stderr)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip().strip('"')
        if name == "\\d":
            rows = self.table.describe(argument) if argument else self.table.tables()
            write_rows(readable(rows), style=self.style)
        elif name == "\\timing":
            self.timing = argument == "on" if argument in ("on", "off") else not self.timing
            print(f"times are {'on' if self.timing else 'off'}", file=sys.stderr)
        elif name == "\\?":
            print("\n".join(f"{command:<9} {help_}" for command, help_ in _COMMANDS.items()), file=sys.stderr)
        else:
            raise QueryError(f"the shell has no {name}", next="\\? lists its commands")


def history_file() -> Path | None:
    """Below the user's state directory; None where it cannot be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "conjoin"
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = state / "history"
        file.touch(mode=0o600)
    except OSError:
        return None
    return file


def _session(table: Table) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = history_file()
    words = Words(table)
    # prompt_toolkit looks for words backwards: first letters, then the backslash of a command
    completer = WordCompleter(words.known, ignore_case=True, pattern=re.compile(r"^\w+\\?"))
    history = FileHistory(str(file)) if file else InMemoryHistory()
    return PromptSession(history=history, completer=completer, complete_while_typing=False)


class Words:
    """What Tab offers: tables, columns, functions and a few words of SQL; read on the first Tab and then kept."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._found: list[str] = []

    def known(self) -> list[str]:
        if not self._found:
            self._found = list(dict.fromkeys(self._read()))
        return self._found

    def _read(self) -> Iterator[str]:
        from conjoin.pipeline.query.execute import function_names
        from conjoin.pipeline.query.functions import FUNCTIONS

        names = self._table.tables().column("table").to_pylist()
        yield from map(_quoted, names)
        for name in names:
            try:
                yield from map(_quoted, self._table.describe(name).column("column").to_pylist())
            except ConjoinError:
                continue  # a file that is missing now; naming it in a query says so
        yield from FUNCTIONS
        yield from _COMMANDS
        yield from _SQL.split()
        yield from function_names()


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else '"' + name.replace('"', '""') + '"'


_SQL = (
    "SELECT DISTINCT FROM WHERE AND OR NOT IN BETWEEN LIKE ILIKE IS NULL GROUP BY HAVING QUALIFY ORDER ASC DESC "
    "LIMIT OFFSET JOIN LEFT RIGHT FULL CROSS LATERAL USING ON AS WITH UNION ALL EXCEPT INTERSECT CASE WHEN THEN ELSE "
    "END OVER PARTITION EXCLUDE CAST VALUES TRUE FALSE"
)
