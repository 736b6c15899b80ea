"""`conjoin query`: one query from the command line, or the shell when there is none.

Assumes: nothing heavy is imported before a command runs, and ray, torch and pydantic only by queries that need them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from conjoin.jobs.render import Style
    from conjoin.pipeline.errors import ConjoinError
    from conjoin.pipeline.query.parameters import Params

DEFAULT = "conjoin.yaml"
_NAMED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PLACE = re.compile(r"line (\d+), column (\d+)")
_CONTEXT = 60  # characters shown on either side of a mistake
_TARGETS = (".lance", ".lance/", ".yaml", ".yml")

Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Csv = Annotated[bool, typer.Option("--csv", help="comma-separated values on stdout")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="write a .parquet, .csv or .json file")]


def query(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [SQL]",
            help="SELECT ... with text('..'), image('file'), distance(column, vector); none opens a shell",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            help="name=value for $name, or a value for the next ?; JSON if it is some, else text; repeatable",
        ),
    ] = None,
    out: Out = None,
    as_csv: Csv = False,
    as_json: Json = False,
    explain: Annotated[bool, typer.Option("--explain", help="say how it would be answered, do not answer it")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="use no index of vectors")] = False,
    recall: Annotated[
        float | None, typer.Option(help="at least this share of the nearest rows; default: what the index was made for")
    ] = None,
) -> None:
    """Answer SQL over the published table; FILE is a run file or a table's path. Without SQL: a shell.

    The shell reads statements up to `;`, from a terminal or a pipe; `\\?` lists its commands.
    """
    from conjoin.jobs.target import open_given
    from conjoin.pipeline.errors import QueryError
    from conjoin.pipeline.query.parse import split_explain

    target, sql = _split(words or [])
    style = one_style(as_json, as_csv, out)
    table = open_given(target)
    if sql is None:
        from conjoin.jobs.shell import run_shell

        if param or explain or out:
            raise typer.BadParameter("--param, --explain and --out need SQL")
        raise typer.Exit(run_shell(table, style, exact=exact, recall=recall))
    from conjoin.jobs.render import write_rows

    try:
        params = parameters(param or [], sql)
        if explain or (split_explain(sql)[0] and not as_csv and out is None):
            found = table.explain(sql, params, exact=exact, recall=recall)
            print(found.to_json() if as_json else found)
        else:
            write_rows(table.sql(sql, params, exact=exact, recall=recall).to_arrow(), out=out, style=style)
    except QueryError as error:
        if os.environ.get("CONJOIN_TRACEBACK"):
            raise
        print(f"conjoin: {pointed(error, sql)}", file=sys.stderr)
        raise typer.Exit(1) from None


def _split(words: Sequence[str]) -> tuple[str, str | None]:
    """[FILE] [SQL]: what looks like a run file or a table, and the rest."""
    if len(words) > 2:
        raise typer.BadParameter(f"expected [FILE] and the SQL, got {len(words)} arguments; quote the SQL")
    if len(words) == 2:
        return words[0], words[1]
    if not words or words[0].endswith(_TARGETS):
        return (words[0] if words else DEFAULT), None
    return DEFAULT, words[0]


def one_style(as_json: bool, as_csv: bool, out: Path | None) -> Style:
    if as_json + as_csv + (out is not None) > 1:
        raise typer.BadParameter("one of --json, --csv and --out")
    return "json" if as_json else "csv" if as_csv else "table"


def parameters(given: Sequence[str], sql: str) -> Params:
    """--param values: all by name, or all in order. `name=value` is a name where the SQL has $name, else a value."""
    named = [match for item in given if (match := _NAMED.fullmatch(item)) and f"${match[1]}" in sql]
    if not named:
        return [_value(item) for item in given] or None
    if len(named) < len(given):
        raise typer.BadParameter("--param: give all parameters by name, or all in order")
    return {match[1]: _value(match[2]) for match in named}


def _value(text: str) -> object:
    """A JSON number, string, list, true, false or null; anything else is text as it stands."""

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
    return text if isinstance(value, dict) else value


def pointed(error: ConjoinError, sql: str) -> str:
    """The error, and below it the line of the query with a caret where the error has a place in it."""
    found = _PLACE.match(error.where)
    if found is None:
        return str(error)
    row, column = int(found[1]), int(found[2])
    lines = sql.splitlines() or [""]
    line = lines[min(row, len(lines)) - 1].replace("\t", " ")
    start = max(column - 1 - _CONTEXT, 0)
    shown = line[start : column - 1 + _CONTEXT]
    place = f"{error.what} [{found[0]}]" + (f". {error.next}" if error.next else "")
    return f"{place}\n  {shown}\n  {' ' * (column - 1 - start)}^"
