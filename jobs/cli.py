"""The command line: parse, call, print. Data goes to stdout, progress to stderr; exit 0 done, 1 failed, 2 usage.

Assumes: everything heavy is imported inside a command, so that `conjoin --help` is instant.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from conjoin.jobs import queries, upkeep
from conjoin.jobs.operations import commands
from conjoin.jobs.queries import Csv, Json, Out, one_style, query
from conjoin.jobs.upkeep import export_changes

if TYPE_CHECKING:
    from conjoin.jobs.config import RunFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Joint embeddings from paired data, kept fresh in a LanceDB table and queried with SQL.",
    epilog="Start with `conjoin demo`, or with your own Parquet: `conjoin init DATA`, `conjoin check`, "
    "`conjoin train`, `conjoin run`, `conjoin search WORDS`.",
)

File = Annotated[Path, typer.Argument(help="the run file", show_default=True)]
Table = Annotated[str, typer.Argument(help="the run file, or a table's path (.lance)", metavar="[FILE]")]
Set = Annotated[list[str], typer.Option("--set", help="override a field: --set train.epochs=3", metavar="FIELD=VALUE")]
Date = Annotated[str | None, typer.Option("--date", help="the logical date, ${DATE} in the run file; default: today")]
Form = Literal["sentence-transformers", "transformers"]
DEFAULT = Path(queries.DEFAULT)


def main() -> None:
    """Entry point: our errors become one sentence on stderr and an exit code."""
    from conjoin.pipeline.errors import ConfigError, ConjoinError, Interrupted

    try:
        app()
    except ConfigError as error:
        sys.exit(_complain(error, 2))
    except (Interrupted, KeyboardInterrupt) as error:
        sys.exit(_complain(error, 130))
    except ConjoinError as error:
        if os.environ.get("CONJOIN_TRACEBACK"):
            raise
        sys.exit(_complain(error, 1))
    except BrokenPipeError:
        sys.exit(0)


def _complain(error: BaseException, code: int) -> int:
    text = str(error) or "stopped; the same command resumes"
    print(f"conjoin: {text}", file=sys.stderr)
    return code


def _read(file: Path, overrides: list[str], date: str | None) -> RunFile:
    from conjoin.jobs.config import read_run_file
    from conjoin.pipeline.errors import ConfigError

    pairs: list[tuple[str, object]] = []
    for item in overrides:
        field, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected FIELD=VALUE", next="For example --set train.epochs=3")
        pairs.append((field, value))
    try:
        day = dt.date.fromisoformat(date) if date else None
    except ValueError:
        raise ConfigError(f"--date {date}: expected YYYY-MM-DD") from None
    return read_run_file(file, pairs, day)


def _target_and(words: list[str], what: str) -> tuple[str, str]:
    """[FILE] TEXT: the last word is the text, one before it the run file or table."""
    if len(words) > 2:
        raise typer.BadParameter(f"expected [FILE] and {what}, got {len(words)} arguments; quote {what}")
    if not words or (len(words) == 1 and words[0].endswith((".lance", ".yaml", ".yml"))):
        raise typer.BadParameter(f"{what} is missing")
    return (words[0] if len(words) == 2 else str(DEFAULT)), words[-1]


def _logical_date(date: str | None) -> dt.date:
    return dt.date.fromisoformat(date) if date else dt.date.today()  # noqa: DTZ011


@app.command()
def init(
    data: Annotated[str | None, typer.Argument(help="Parquet: a file, a glob, a directory, s3://")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the run file")] = DEFAULT,
    name: Annotated[str | None, typer.Option(help="the table's name in SQL; default: from the data's name")] = None,
    force: Annotated[bool, typer.Option(help="overwrite an existing run file")] = False,
) -> None:
    """Write a commented run file with the columns of DATA guessed."""
    from conjoin.jobs.init import write_run_file

    for line in write_run_file(data, out, name, force):
        print(line, file=sys.stderr)
    print(out)


@app.command()
def check(file: File = DEFAULT, set_: Set = [], date: Date = None, as_json: Json = False) -> None:  # noqa: B006
    """Say what the run file means: rows, columns, modalities, encoder, where things go, access."""
    from conjoin.jobs.check import understand
    from conjoin.jobs.render import facts

    found = understand(_read(file, set_, date))
    print(json.dumps(found, indent=1) if as_json else facts(found))


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a directory (local or s3://), package:NAME or a hub name")],
    directory: Annotated[str, typer.Argument(help="the encoder's folder to write; must not hold anything yet")],
    as_json: Json = False,
) -> None:
    """Make an encoder of another library's checkpoint that gives the same vectors: CLIP, SigLIP, CLAP, MiniLM ...

    Reads transformers' CLIP, SigLIP, fixed-resolution SigLIP2 and CLAP, open_clip's ViTs (open_clip_config.json) and
    text models of sentence-transformers (modules.json). Name the folder as `encoder:` in a run file afterwards.
    """
    from conjoin.pipeline.embedder import read_spec
    from conjoin.pipeline.exchange import import_encoder

    fingerprint = import_encoder(source, directory)
    spec = read_spec(directory)[0]
    found = {"encoder": directory, "fingerprint": fingerprint, "dim": spec.dim, "modalities": sorted(spec.towers)}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{' and '.join(sorted(spec.towers))} into {spec.dim} dimensions, {fingerprint}", file=sys.stderr)
    print(directory)


@app.command()
def train(file: File = DEFAULT, set_: Set = [], date: Date = None, as_json: Json = False) -> None:  # noqa: B006
    """Train a joint encoder from the run file's recipe; the same command resumes after a crash."""
    from conjoin.jobs.progress import Screen
    from conjoin.jobs.tasks import train as task

    with Screen() as screen:
        report = task(_read(file, set_, date), progress=screen.show)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
        return
    for line in report.lines():
        print(line, file=sys.stderr)
    print(report.encoder)


@app.command()
def evaluate(
    file: File = DEFAULT,
    split: Annotated[str | None, typer.Option(help="validation or test of the source, embedded now")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition on the published table: rows to evaluate")] = None,
    classify: Annotated[str | None, typer.Option(help="zero-shot: the column of classes")] = None,
    template: Annotated[list[str], typer.Option(help="prompt for a class, {} is its name; repeatable")] = ["a {}"],  # noqa: B006
    queries: Annotated[
        int, typer.Option(min=0, help="at most so many queries in each direction, drawn at random; 0: all")
    ] = 20_000,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="fit relevance() on the rows, by default the validation split; kept beside the encoder"
        ),
    ] = False,
    set_: Set = [],  # noqa: B006
    date: Date = None,
    as_json: Json = False,
) -> None:
    """Retrieval both ways (hit@1/5/10, median rank, MRR, with intervals) and zero-shot accuracy."""
    from conjoin.jobs.progress import Screen
    from conjoin.jobs.render import evaluation
    from conjoin.jobs.tasks import calibrate as fit
    from conjoin.jobs.tasks import evaluate as task
    from conjoin.pipeline.evaluate import Classes

    if calibrate and classify:
        raise typer.BadParameter("--calibrate goes without --classify")

    classes = Classes(classify, tuple(template)) if classify else None
    with Screen() as screen:
        config = _read(file, set_, date)
        if calibrate:
            found = fit(config, split, where, progress=screen.show)
        else:
            found = task(config, split, where, classify=classes, queries=queries, progress=screen.show)
    print(json.dumps(found.to_json(), indent=1) if as_json else evaluation(found))


@app.command()
def export(
    to: Annotated[str, typer.Option("--to", help="the folder to write, local or s3://; must not hold anything yet")],
    what: Annotated[
        str | None,
        typer.Argument(metavar="[ENCODER]", help="an encoder's folder; with --since a run file, or a table's path"),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            "--as", help="the library to write for; default: transformers, sentence-transformers for text alone"
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="changes since then: a tag, version or run that was published; 0: everything")
    ] = None,
    until: Annotated[str, typer.Option(help="with --since: up to this tag, version or run")] = "live",
    as_json: Json = False,
) -> None:
    """Write an encoder for another library, with a model card; it is loaded again and compared before it counts.

    As sentence-transformers goes the text tower with its head, as transformers a pair that is a CLIP, SigLIP or CLAP
    model; linear heads are folded in. What cannot be written exactly is refused with the reason.
    With --since: the table's upserts and deletes between two published versions, vectors too, as Parquet for whoever
    serves search elsewhere; manifest.json comes last.
    """
    if since is not None:
        delta = export_changes(what or str(DEFAULT), to, since, until)
        print(json.dumps(delta.to_json(), indent=1) if as_json else to)
        print(f"{delta.upserts:,} upserts, {delta.deletes:,} deletes", file=sys.stderr)
        return
    if what is None:
        raise typer.BadParameter("name an encoder's folder, or --since a version")
    from conjoin.pipeline.exchange import export_encoder

    loads_as = export_encoder(what, to, form)
    if as_json:
        print(json.dumps({"directory": to, "loads_as": loads_as}, indent=1))
        return
    print(f"load it with {loads_as}; README.md says how", file=sys.stderr)
    print(to)


@app.command()
def plan(
    file: File = DEFAULT,
    set_: Set = [],  # noqa: B006
    date: Date = None,
    full: Annotated[bool, typer.Option("--full", help="what making the whole table anew would do")] = False,
    as_json: Json = False,
) -> None:
    """Say what `run` would do now: rows new, changed and gone, what is embedded, time and cost. Changes nothing.

    Exits with 1 if the plan is above the run file's `limits`.
    """
    from conjoin.jobs.nightly import plan as task

    found = task(_read(file, set_, date), full=full)
    print(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.lines()))
    if found.over:
        raise typer.Exit(1)


@app.command()
def run(
    file: File = DEFAULT,
    set_: Set = [],  # noqa: B006
    date: Date = None,
    full: Annotated[bool, typer.Option("--full", help="embed every row again, whatever is published")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="a canary: only the first N rows, into a scratch table of their own")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring the table up to date with the source and publish it: the night. The same command resumes.

    Exit 1 also if only publish.hook failed; the version is live then.
    """
    from conjoin.jobs.nightly import run as night
    from conjoin.jobs.progress import Screen
    from conjoin.jobs.render import night_report

    config = _read(file, set_, date)
    with Screen() as screen:
        report = night(config, _logical_date(date), full=full, limit=limit, progress=screen.show)
    print(json.dumps(report.to_json(), indent=1) if as_json else night_report(report))
    if report.hook is not None and report.hook.failed:
        print(f"conjoin: {report.hook.problem}", file=sys.stderr)
        raise typer.Exit(1)


app.command()(query)


@app.command()
def search(
    words: Annotated[list[str] | None, typer.Argument(metavar="[FILE] [WORDS]", help="what to look for")] = None,
    image: Annotated[str | None, typer.Option(help="look for what is like this picture")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over the table's columns")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, help="how many")] = 10,
    out: Out = None,
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Find the records nearest to words or to a picture."""
    from conjoin.jobs.config import table_of
    from conjoin.jobs.render import readable, write_rows
    from conjoin.pipeline.query import open_table

    given, style = words or [], one_style(as_json, as_csv, out)
    if image is not None and len(given) > 1:
        raise typer.BadParameter("search for words or for an --image, not both")
    target, text = _target_and(given, "what to look for") if image is None else ((given or [str(DEFAULT)])[0], None)
    result = open_table(table_of(target)).search(text, image=image, where=where, k=k).to_arrow()
    write_rows(readable(result) if style == "table" and out is None else result, out=out, style=style)


app.add_typer(commands)
app.add_typer(upkeep.commands)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for everything the demo writes")] = Path("demo"),
    data: Annotated[Path | None, typer.Option(help="emoji.parquet; default: the repository's")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="no pretrained towers at all")] = False,
    as_json: Json = False,
) -> None:
    """Train, embed, publish and query 6,639 emoji in front of you; prints the path of a page with the answers."""
    from conjoin.jobs.demo import run_demo
    from conjoin.jobs.progress import Screen

    with Screen() as screen:
        page, found = run_demo(out, data, from_scratch=from_scratch, progress=screen.show)
    if as_json:
        print(json.dumps(found, indent=1))
    print(page)
