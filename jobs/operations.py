"""Commands of whoever runs the nights: status, report, history, rollback, publish --force, repair.

Assumes: nothing heavy is imported before a command runs; only what is asked for by name changes anything.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conjoin.jobs.queries import DEFAULT, Json, Out

if TYPE_CHECKING:
    from conjoin.pipeline.hook import PublishConfig
    from conjoin.pipeline.publish import Entry
    from conjoin.pipeline.state import Manifest
    from conjoin.pipeline.store import TableConfig

commands = typer.Typer()

Target = Annotated[str, typer.Argument(help="the run file, or a table's path (.lance)", metavar="[FILE]")]


@commands.command()
def status(target: Target = DEFAULT, as_json: Json = False) -> None:
    """Say what a night is doing and when it will be done, what is live, the last night, what is in quarantine."""
    from conjoin.jobs.config import table_of
    from conjoin.jobs.render import status_lines
    from conjoin.pipeline.status import look

    found = look(table_of(target))
    print(json.dumps(found.to_json(), indent=1) if as_json else status_lines(found))


@commands.command()
def report(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE] [RUN]", help="a run id; default: the newest that is over")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the page there instead")] = None,
    as_json: Json = False,
) -> None:
    """Print where the page about a night is: what changed, gates, times, quarantine, versions."""
    from conjoin.jobs.config import table_of
    from conjoin.pipeline.errors import ConfigError
    from conjoin.pipeline.night import read_night
    from conjoin.pipeline.night_page import render, write
    from conjoin.pipeline.status import find_run

    target, run_id = _target_and_run(words or [])
    uri = table_of(target)
    night = read_night(uri, find_run(uri, run_id))
    assert night is not None
    if as_json:
        print(json.dumps(night.to_json(), indent=1))
    elif out is None:
        print(write(uri, night))
    else:
        try:
            out.write_text(render(night), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the page: {error.strerror or error}", where=str(out)) from error
        print(out)


def _target_and_run(words: list[str]) -> tuple[str, str | None]:
    if len(words) > 2:
        raise typer.BadParameter(f"expected [FILE] and [RUN], got {len(words)} arguments")
    if len(words) == 2:
        return words[0], words[1]
    is_target = bool(words) and words[0].rstrip("/").endswith((".lance", ".yaml", ".yml"))
    return (words[0], None) if is_target else (DEFAULT, words[0] if words else None)


@commands.command()
def history(
    target: Target = DEFAULT,
    last: Annotated[int, typer.Option(min=0, help="at most so many, newest first; 0: all")] = 30,
    as_json: Json = False,
) -> None:
    """Versions that were published, rolled back, forced or rejected: runs, rows, figures, and who is live."""
    import pyarrow as pa

    from conjoin.jobs.config import table_of
    from conjoin.jobs.render import write_rows
    from conjoin.jobs.tasks import history_entries

    rows = history_entries(table_of(target), last)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    shown = [{**row, "figures": _figures(row["figures"])} for row in rows]
    names = list(shown[0]) if shown else ["number", "action", "run_id", "version"]
    write_rows(pa.table({name: [None if row[name] is None else str(row[name]) for row in shown] for name in names}))


def _figures(figures: object) -> str:
    assert isinstance(figures, dict)
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


@commands.command()
def rollback(
    target: Target = DEFAULT,
    to: Annotated[
        str | None, typer.Option(help="a version that was live, or the run that published it; default: the one before")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an earlier version live again; readers follow at once. The run file's publish.hook runs."""
    from conjoin.pipeline.publish import rollback as move

    table, hook = _sections(target)
    _moved(move(table.path, to), table.path, hook, as_json)


@commands.command()
def publish(
    force: Annotated[
        str, typer.Option("--force", metavar="RUN|VERSION", help="a version that its gates rejected, by run or number")
    ],
    target: Target = DEFAULT,
    as_json: Json = False,
) -> None:
    """Make a rejected version live in spite of its gates; history names it `forced`, the next night builds on it.

    Nights publish by themselves. The run file's publish.hook runs.
    """
    from conjoin.jobs.tasks import force as move

    table, hook = _sections(target)
    _moved(move(table, force), table.path, hook, as_json)


def _sections(target: str) -> tuple[TableConfig, PublishConfig]:
    """The table and the hook of a run file; a table's own path has no hook."""
    from conjoin.jobs.config import read_run_file, table_of
    from conjoin.pipeline.hook import PublishConfig
    from conjoin.pipeline.store import TableConfig

    if target.rstrip("/").endswith(".lance") or "://" in target:
        return TableConfig(path=table_of(target)), PublishConfig()
    config = read_run_file(Path(target), [], None)
    return config.table, config.publish


def _moved(entry: Entry, uri: str, hook: PublishConfig, as_json: bool) -> None:
    """Say what is live now and run the hook; exit 1 if that failed."""
    from conjoin.jobs.render import moved
    from conjoin.pipeline.hook import run_hook

    ran = run_hook(hook, uri, entry)
    facts = {**asdict(entry), "hook": None if ran is None else asdict(ran)}
    print(json.dumps(facts, indent=1) if as_json else moved(entry))
    if ran is not None and ran.failed:
        print(f"conjoin: {ran.problem}", file=sys.stderr)
        raise typer.Exit(1)


@commands.command()
def repair(
    target: Target = DEFAULT,
    sample: Annotated[int, typer.Option(min=0, help="show so many values of every kind of trouble")] = 0,
    retry: Annotated[
        list[str],
        typer.Option(help="have the next night try again: all, a stage (fetch, decode, embed), or an id; repeatable"),
    ] = [],  # noqa: B006
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show what is in quarantine, by stage and reason; sample it; mark values to be tried again by the next night."""
    from conjoin.jobs.config import table_of
    from conjoin.jobs.render import quarantine_lines, write_rows
    from conjoin.pipeline.quarantine import groups_of, rows_of, sample_of
    from conjoin.pipeline.retries import mark

    uri = table_of(target)
    manifest = _manifest(uri)
    if retry:
        marked = mark(uri, manifest, retry)
        print(f"{marked.num_rows:,} value(s) are due: the next `conjoin run` tries them again", file=sys.stderr)
        return
    rows = rows_of(uri, manifest)
    groups = () if rows is None else groups_of(rows)
    if rows is not None and (sample or out is not None):
        found = sample_of(rows, sample) if sample else rows
        write_rows(found, out=out, style="json" if as_json else "table")
        return
    print(json.dumps([asdict(group) for group in groups], indent=1) if as_json else quarantine_lines(groups))


def _manifest(uri: str) -> Manifest:
    from conjoin.pipeline.errors import TableError
    from conjoin.pipeline.state import read_manifest
    from conjoin.pipeline.store import open_version

    manifest = read_manifest(open_version(uri))
    if manifest is None:
        raise TableError("no night of ours filled the live version: it has no quarantine", where=uri)
    return manifest
