"""CSV and tars of a training path on real Ray: what comes out, what is refused, what is done once; trained as a mix."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import listing, storage
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.ingest import convert
from conjoin.pipeline.progress import Progress, silent
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train

pytestmark = pytest.mark.usefixtures("ray_session")
NUM = 1300  # more than two of the reader's blocks


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def converted(path: Path | str, directory: Path | str, progress: Callable[[Progress], None] = silent) -> list[str]:
    _, files = listing.training_files(str(path))
    made = convert(files, str(directory), progress)
    return [made[file].uri for file in files]


def samples(num: int) -> list[tuple[str, bytes]]:
    members = []
    for n in range(num):
        members += [(f"{n:05d}.jpg", b"\xff%d" % n), (f"{n:05d}.json", json.dumps({"title": f"t{n}", "n": n}).encode())]
        members += [(f"{n:05d}.txt", b"text %d" % n)] if n % 3 else []
    return members


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
def test_a_tar_becomes_one_file_in_its_order(tmp_path: Path, name: str) -> None:
    (made,) = converted(write_tar(tmp_path / name, samples(NUM)), tmp_path / "data")
    rows = pq.read_table(made)
    assert Path(made).name == "set.parquet"
    assert rows["__key__"].to_pylist() == [f"set/{n:05d}" for n in range(NUM)]
    assert rows["jpg"].to_pylist() == [b"\xff%d" % n for n in range(NUM)]
    assert rows["txt"].to_pylist() == [f"text {n}" if n % 3 else None for n in range(NUM)]
    assert rows["title"].to_pylist() == [f"t{n}" for n in range(NUM)]
    assert rows["n"].to_pylist() == list(range(NUM))
    assert not [file for file in Path(made).parent.iterdir() if file.name != "set.parquet"]


def test_row_groups_hold_a_few_thousand_rows(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("id", "text"), *((n, f"text {n}") for n in range(9000))])
    (made,) = converted(tmp_path / "rows.csv", tmp_path / "data")
    groups = pq.read_metadata(made)
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [4096, 4096, 808]
    assert pq.read_table(made)["id"].to_pylist() == [str(n) for n in range(9000)]


def test_cells_of_a_csv_are_text_and_empty_ones_null(tmp_path: Path) -> None:
    text = '\ufeffid,title,price\n007,"two\nlines, ""quoted""",\n8,NA,3\n9,"",x\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as out:
        out.write("id,title\n1,caf\u00e9\n")
    first, second = converted(f"{tmp_path}/*.csv*", tmp_path / "data")
    assert pq.read_table(first).to_pydict() == {
        "id": ["007", "8", "9"],
        "title": ['two\nlines, "quoted"', "NA", ""],
        "price": [None, "3", "x"],
    }
    assert pq.read_table(second).to_pylist() == [{"id": "1", "title": "caf\u00e9"}]


def test_a_finished_file_is_kept_and_a_missing_one_made_again(tmp_path: Path) -> None:
    for name in ("0", "1", "2"):
        write_tar(tmp_path / f"{name}.tar", samples(4))
    before = converted(f"{tmp_path}/{{0..2}}.tar", tmp_path / "data")
    stats = [Path(made).stat().st_mtime_ns for made in before]
    Path(before[1]).unlink()
    Path(before[1]).with_name(".1.parquet.left").write_bytes(b"half")
    seen: list[Progress] = []
    assert converted(f"{tmp_path}/{{0..2}}.tar", tmp_path / "data", seen.append) == before
    assert [(event.step, event.done, event.total) for event in seen] == [("convert", 2, 3), ("convert", 3, 3)]
    again = [Path(made).stat().st_mtime_ns for made in before]
    assert (again[0], again[2]) == (stats[0], stats[2])
    assert again[1] > stats[1]
    write_tar(tmp_path / "2.tar", samples(5))
    changed = converted(f"{tmp_path}/{{0..2}}.tar", tmp_path / "data")
    assert changed[:2] == before[:2]
    assert changed[2] != before[2]


def torn(path: Path, share: float) -> None:
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * share) // 512 * 512])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"1"), ("a.jpg", b"2")], r"two members of the tar are named a\.jpg"),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")], "members of sample a are apart.*sorted by name"),
        ([("../a.jpg", b"1")], r"holds '\.\./a', a path out of it"),
        ([("noext", b"1")], "holds no sample"),
    ],
    ids=["twice", "apart", "escape", "none"],
)
def test_a_tar_that_is_no_data_set_is_named(tmp_path: Path, members: list[tuple[str, bytes]], words: str) -> None:
    with pytest.raises(SourceError, match=rf"{words}.*") as caught:
        converted(write_tar(tmp_path / "bad.tar", members), tmp_path / "data")
    assert caught.value.where == f"{tmp_path}/bad.tar"
    assert not list((tmp_path / "data").rglob("*.parquet*"))


@pytest.mark.parametrize("name", ["bad.tar", "bad.tar.gz"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_torn_tar_is_named(tmp_path: Path, name: str, share: float) -> None:
    """In the middle, at a member's border where a reader sees nothing wrong, and an empty file."""
    path = write_tar(tmp_path / name, [(f"{n}.bin", bytes(np.random.default_rng(n).bytes(1024))) for n in range(20)])
    torn(path, share)
    with pytest.raises(SourceError, match=r"tar is torn.*bad\.tar"):
        converted(path, tmp_path / "data")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"id,title\n1,a\n2,b,c\n", "Expected 2 columns, got 3"),
        (b"id,title\n1,caf\xe9\n", "invalid UTF8"),
        (b"id;title\n1;a\n", "separated by ';'"),
        (b"id,id\n1,a\n", "2 columns are named 'id'"),
        (b"", "Empty CSV file"),
    ],
    ids=["ragged", "latin", "semicolons", "repeated", "empty"],
)
def test_a_csv_that_cannot_be_read_says_why(tmp_path: Path, body: bytes, words: str) -> None:
    (tmp_path / "bad.csv").write_bytes(body)
    with pytest.raises(SourceError, match=rf"the CSV cannot be read.*{words}.*bad\.csv.*commas"):
        converted(tmp_path / "bad.csv", tmp_path / "data")


SCRIPT = """
import sys
from conjoin.pipeline import listing
from conjoin.pipeline.ingest import convert
from conjoin.pipeline.progress import silent
for path in sys.argv[2:]:
    files = listing.training_files(path)[1]
    for made in convert(files, sys.argv[1], silent).values():
        print(made.uri)
"""


@pytest.mark.slow
def test_from_a_bucket_into_a_bucket(tmp_path: Path, s3: str) -> None:
    """In a process of its own: this one's Ray may have been started without the bucket's credentials."""
    fs, _ = storage.filesystem(s3)
    fs.put(str(write_tar(tmp_path / "set.tar", samples(10))), f"{s3}/sets/set.tar")
    fs.pipe_file(f"{s3}/rows.csv", b"id,title\n1,a\n")
    command = [sys.executable, "-c", SCRIPT, f"{s3}/out/data", f"{s3}/sets/", f"{s3}/rows.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tar, rows = done.stdout.split()
    assert tar.startswith(f"{s3}/out/data/")
    with fs.open(tar) as file:
        assert pq.read_table(file)["title"].to_pylist() == [f"t{n}" for n in range(10)]
    with fs.open(rows) as file:
        assert pq.read_table(file).to_pylist() == [{"id": "1", "title": "a"}]
    assert converted(f"{s3}/sets/", f"{s3}/out/data") == [tar]


COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "bar", "cross")


@pytest.fixture
def mixed(draw_shape: Callable[..., bytes], tmp_path: Path) -> list[Mapping[str, object] | str]:
    """60 shapes as Parquet, 60 as CSV with files beside it, 60 in two tars, each with columns of its own."""
    rng = np.random.default_rng(0)
    named = [(COLOURS[n % 3], SHAPES[n // 3 % 4]) for n in range(60)]
    pictures = [draw_shape(*pair, rng) for pair in named]
    texts = [[f"a {colour} {shape}", f"{shape}, {colour}"] for colour, shape in named]
    ids = [f"s{n}" for n in range(60)]
    table = pa.table({"id": ids, "image": pictures, "caption": texts, "style": ids})
    pq.write_table(table, tmp_path / "shapes.parquet", row_group_size=25)
    with (tmp_path / "list.csv").open("w", newline="") as out:
        csv.writer(out).writerow(("file", "colour", "shape"))
        csv.writer(out).writerows((f"pictures/{n}.png", *pair) for n, pair in enumerate(named))
    (tmp_path / "pictures").mkdir()
    for n, picture in enumerate(pictures):
        (tmp_path / f"pictures/{n}.png").write_bytes(picture)
    for shard in range(2):
        members = []
        for n in range(shard * 30, shard * 30 + 30):
            fields = {"colour": named[n][0], "shape": named[n][1]}
            members += [(f"{n:03d}.png", pictures[n]), (f"{n:03d}.json", json.dumps(fields).encode())]
        write_tar(tmp_path / f"sets/{shard:02d}.tar", members)
    own = {"text": "a {colour} {shape}", "group": None}
    return [
        f"{tmp_path}/shapes.parquet",
        {"path": f"{tmp_path}/list.csv", "weight": 2, "id": "file", "image": "file", **own},
        {"path": f"{tmp_path}/sets/{{00..01}}.tar", "weight": 0.5, "image": "png", **own},
    ]


def test_three_steps_on_a_mix_of_parquet_csv_and_tars(mixed: list[Mapping[str, object] | str], tmp_path: Path) -> None:
    """Pictures of every part arrive: relative paths of the CSV, members of the tars; half of the tars' rows count."""
    columns = {"id": "id", "image": "image", "text": "caption", "group": "style"}
    split = {"validation": 0.1, "test": 0}
    source = SourceConfig.model_validate({"path": str(tmp_path / "nowhere"), **columns, "split": split})
    towers = {"image": {"tune": "head", "size_px": 16}, "text": {"max_tokens": 8}}
    shape = {"towers": towers, "dim": 8, "global_batch_size": 75, "epochs": 1, "checkpoint_every_s": 0}
    recipe = TrainConfig.model_validate({"path": mixed, "output": str(tmp_path / "out"), **shape})
    steps: list[str] = []
    report = train("mix", source, recipe, progress=lambda event: steps.append(event.step))
    assert list(dict.fromkeys(steps)) == ["convert", "select", "hash image", "features image", "ahead", "train"]
    assert report.steps == 3
    assert 140 < report.rows < 175
    lines = [json.loads(line) for line in (Path(report.folder) / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert len(list((tmp_path / "out/data").rglob("*.parquet"))) == 3
    assert train("mix", source, recipe) == report
    (made,) = (tmp_path / "out/data").rglob("01.parquet")
    made.unlink()
    assert train("mix", source, recipe) == report
