"""Commands that look after a table's past: clean shows and deletes what nobody needs, forget erases ids and proves it.

Assumes: nothing heavy is imported before a command runs; without --yes `clean` changes nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conjoin.jobs.queries import DEFAULT, Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conjoin.pipeline.cleaning import Item
    from conjoin.pipeline.delta import Delta
    from conjoin.pipeline.erasure import Erasure
    from conjoin.pipeline.source import SourceConfig
    from conjoin.pipeline.upkeep import Upkeep

commands = typer.Typer()

Target = Annotated[str, typer.Argument(help="the run file, or a table's path (.lance)", metavar="[FILE]")]


@commands.command()
def clean(
    target: Target = DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="delete it; without, it is only shown")] = False,
    as_json: Json = False,
) -> None:
    """Show what a table's past left behind and nobody needs: old versions, plans, state, files of nights that died.

    The run file's `upkeep` says how long things stay. Versions that are live, previous, tagged or were live lately
    stay, and so does all that they are read from.
    """
    from conjoin.pipeline.cleaning import clean as delete
    from conjoin.pipeline.cleaning import rubbish

    uri, upkeep, _ = _section(target)
    found = rubbish(uri, upkeep)
    items = delete(found) if yes else found.items()
    if as_json:
        print(json.dumps({"table": uri, "held": found.held, "items": [asdict(item) for item in items]}, indent=1))
        return
    print(_lines(items))
    if found.held:
        print(f"versions and files of the table stay: {found.held}", file=sys.stderr)
    if items and not yes:
        print("nothing was deleted; --yes deletes it", file=sys.stderr)


def _lines(items: Sequence[Item]) -> str:
    rows = [f"{item.count:>8,}  {item.size_bytes / 1e6:>10,.1f} MB  {item.kind}" for item in items]
    return "\n".join(rows) if rows else "nothing to clean"


@commands.command()
def forget(
    ids: Annotated[list[str], typer.Argument(help="ids to erase")],
    file: Annotated[str, typer.Option("--file", help="the run file, or a table's path (.lance)")] = DEFAULT,
    anyway: Annotated[bool, typer.Option("--anyway", help="erase them although the source still has them")] = False,
    as_json: Json = False,
) -> None:
    """Erase ids from the table, its past and everything written down about them, and prove it.

    A new version without them is published; older versions that hold one are dropped, with `previous` if it was one
    of them. The source is not touched: take the ids out there first. Exit 1 if the proof finds one.
    """
    from conjoin.pipeline.erasure import forget as erase

    uri, _, source = _section(file)
    done = erase(uri, ids, source, anyway=anyway)
    print(json.dumps(done.to_json(), indent=1) if as_json else _told(done))
    for line in done.warnings:
        print(line, file=sys.stderr)
    if not done.proven:
        raise typer.Exit(1)


def _told(done: Erasure) -> str:
    tags = f", tags {', '.join(done.tags_removed)} removed" if done.tags_removed else ""
    lines = [
        f"{done.rows} rows erased; live is version {done.version}",
        f"{len(done.versions_dropped)} older versions dropped{tags}; "
        f"{done.files_removed} files removed, {done.files_redacted} redacted",
        "proof:",
    ]
    for check in done.proof:
        verdict = "not found" if not check.found else f"FOUND in {', '.join(check.found)}"
        note = f" ({check.note})" if check.note else ""
        lines.append(f"  {verdict} in {check.searched} {check.what}{note}" if not check.found else f"  {verdict}")
    return "\n".join(lines)


def export_changes(target: str, to: str, since: str, until: str) -> Delta:
    """The delta of the table that a run file, or a table's own path, stands for."""
    from conjoin.pipeline.delta import export_delta

    return export_delta(_section(target)[0], to, since=since, until=until)


def _section(target: str) -> tuple[str, Upkeep, SourceConfig | None]:
    """(the table, how it is kept, its source): a table's own path has the defaults and no source."""
    from conjoin.jobs.config import read_run_file, table_of
    from conjoin.pipeline.upkeep import Upkeep

    if target.rstrip("/").endswith(".lance") or "://" in target:
        return table_of(target), Upkeep(), None
    config = read_run_file(Path(target), [], None)
    return config.table.path, config.upkeep, config.source
