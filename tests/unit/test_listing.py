"""Source paths: what they mean, and what is refused with advice."""

from __future__ import annotations

from pathlib import Path

import pytest

from conjoin.pipeline import listing
from conjoin.pipeline.errors import SourceError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.parquet",
        "a.parquet",
        "day=1/c.parquet",
        "_temporary/d.parquet",
        ".e.parquet",
        "_SUCCESS",
        "n.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def _names(tree: Path, path: str | list[str]) -> list[str]:
    return [file.uri.removeprefix(f"{tree}/") for file in listing.parquet_files(path)]


def test_a_directory_a_glob_a_file_and_a_list(tree: Path) -> None:
    assert _names(tree, str(tree)) == ["a.parquet", "b.parquet", "day=1/c.parquet"]
    assert _names(tree, f"{tree}/") == ["a.parquet", "b.parquet", "day=1/c.parquet"]
    assert _names(tree, f"{tree}/*.parquet") == ["a.parquet", "b.parquet"]
    assert _names(tree, f"{tree}/day=*/*.parquet") == ["day=1/c.parquet"]
    assert _names(tree, [f"{tree}/b.parquet", f"{tree}/*.parquet"]) == ["b.parquet", "a.parquet"]


def test_a_relative_path_becomes_absolute(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert _names(tree, "a.parquet") == ["a.parquet"]
    assert _names(tree, ".") == ["a.parquet", "b.parquet", "day=1/c.parquet"]
    assert listing.base_directory("a.parquet") == str(tree)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.parquet", "no such file or directory.*gone.parquet.*Correct source.path"),
        ("gone/", "no such file or directory"),
        ("*.orc", "no file matches.*orc"),
        ("empty", "the directory is empty"),
        ("texts", r"holds no Parquet file \(2 x .csv\).*duckdb.*name it in train\.path"),
        ("n.csv", r"source\.path takes Parquet, and this is CSV.*n\.csv.*Convert it, or name it in train\.path"),
        ("{a,b}.tar", "no such file"),
    ],
)
def test_nothing_to_read(tree: Path, path: str, words: str) -> None:
    (tree / "empty").mkdir()
    (tree / "texts").mkdir()
    (tree / "texts/a.csv").write_text("x")
    (tree / "texts/b.csv").write_text("x")
    with pytest.raises(SourceError, match=words):
        listing.parquet_files(f"{tree}/{path}")


@pytest.mark.parametrize("paths", [[], ""])
def test_an_empty_path(paths: str | list[str]) -> None:
    with pytest.raises(SourceError, match=r"source\.path is empty"):
        listing.parquet_files(paths)


@pytest.mark.parametrize(
    ("mark", "data", "kind"),
    [
        ("_delta_log/0.json", "a.parquet", "Delta"),
        ("_delta_log/0.json", "day=1/a.parquet", "Delta"),
        (".hoodie/hoodie.properties", "a.parquet", "Hudi"),
        ("metadata/v1.metadata.json", "data/a.parquet", "Iceberg"),
        ("_versions/1.manifest", "data/a.lance", "Lance"),
    ],
)
@pytest.mark.parametrize("how", ["directory", "parent", "glob", "file"])
def test_table_formats_are_refused_with_advice(tmp_path: Path, mark: str, data: str, kind: str, how: str) -> None:
    for name in (mark, data):
        (tmp_path / "lake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lake" / name).write_bytes(b"x")
    whole = tmp_path / "lake" / data
    path = {"directory": tmp_path / "lake", "parent": tmp_path, "glob": whole.parent / "*", "file": whole}[how]
    with pytest.raises(SourceError, match=rf"{kind}.*Export its current version to plain Parquet"):
        listing.parquet_files(str(path))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("x/{08..11}.tar", ["x/08.tar", "x/09.tar", "x/10.tar", "x/11.tar"]),
        ("{0..1}/{a,b}.csv", ["0/a.csv", "0/b.csv", "1/a.csv", "1/b.csv"]),
        ("{}.csv", ["{}.csv"]),
        ("{3..1}.tar", []),
    ],
)
def test_braces_stand_for_several_names(path: str, names: list[str]) -> None:
    assert listing.expand_braces(path) == names


def test_training_files_are_of_one_kind(tree: Path) -> None:
    def found(path: str) -> tuple[str, list[str]]:
        kind, files = listing.training_files(f"{tree}/{path}")
        return kind, [file.uri.removeprefix(f"{tree}/") for file in files]

    (tree / "sets").mkdir()
    for name in ("0.tar", "1.tar.gz", "2.TAR", "readme.txt"):
        (tree / "sets" / name).write_bytes(b"x")
    assert found("") == ("Parquet", ["a.parquet", "b.parquet", "day=1/c.parquet"])
    assert found("n.csv") == ("CSV", ["n.csv"])
    assert found("sets") == ("tar", ["sets/0.tar", "sets/1.tar.gz"])
    assert found("sets/{0..0}.tar") == ("tar", ["sets/0.tar"])
    assert found("sets/*.TAR") == ("tar", ["sets/2.TAR"])
    with pytest.raises(SourceError, match=r"holds CSV and Parquet files.*entry of its own"):
        found("[an].*")
    with pytest.raises(SourceError, match="no file matches"):
        found("{3..1}.tar")


def test_relative_uris_of_what_is_converted_start_at_its_directory(tree: Path) -> None:
    for path in ("n.csv", "*.csv", "{a,b}.csv", "x{0..9}.tar"):
        assert listing.base_directory(f"{tree}/{path}") == str(tree)
