"""Which files a source or training path means: a file, a glob, a directory, or a list of these, local or in a bucket.

Assumes: names that begin with "." or "_" are bookkeeping of whoever wrote the directory, not data.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from conjoin.pipeline import storage
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.storage import FileStat

Kind = Literal["Parquet", "CSV", "tar"]
SUFFIXES = (".parquet", ".parq", ".pq")
# What only a training path may be; pipeline/ingest.py makes Parquet of it.
_CONVERTED: dict[str, Kind] = {".csv": "CSV", ".csv.gz": "CSV", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar"}
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_GLOB = re.compile(r"[*?\[]")
_ANCESTORS = 3
# What lies in a table directory -> (its kind, how to get plain Parquet out of it).
_LAKES = {
    "_delta_log": ("Delta Lake", "deltalake.DeltaTable(path).to_pyarrow_dataset(), then pyarrow.dataset.write_dataset"),
    ".hoodie": ("Hudi", "spark.read.format('hudi').load(path).write.parquet(target)"),
    "metadata/*.metadata.json": ("Iceberg", "pyiceberg: table.scan().to_arrow(), then pyarrow.parquet.write_table"),
    "_versions": ("Lance", "lance.dataset(path).to_table(), then pyarrow.parquet.write_table"),
}
_INSIDE = re.compile(r"(^|/)(_delta_log|\.hoodie|_versions)/|(^|/)(metadata)/[^/]*\.metadata\.json$")


def parquet_files(path: str | Sequence[str]) -> list[FileStat]:
    """Every file of a source path once, in the order given, sorted within a directory or glob.

    Raises SourceError for a missing file, a pattern or directory without Parquet, and directories of table formats
    whose Parquet files are not all live rows (Delta Lake, Iceberg, Hudi, Lance).
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(paths):
        raise SourceError("source.path is empty", next="Give a Parquet file, a glob, a directory, or a list of these")
    found = [file for item in paths for file in _expand(item, (SUFFIXES,))]
    for file in found:
        if kind_of(file.uri) != "Parquet":
            advice = 'Convert it, or name it in train.path: "{path: FILE}" trains on it'
            raise SourceError(
                f"source.path takes Parquet, and this is {kind_of(file.uri)}", where=file.uri, next=advice
            )
    return list({file.uri: file for file in found}.values())


def kind_of(path: str) -> Kind:
    """By the end of the name; what has another end is taken for Parquet."""
    return next((kind for end, kind in _CONVERTED.items() if path.lower().endswith(end)), "Parquet")


def training_files(path: str) -> tuple[Kind, list[FileStat]]:
    """Every file of one training path once, and what they are; of a directory without Parquet its CSV or tar files.

    `{000..331}` and `{a,b}` stand for several names. Raises SourceError as parquet_files does, and for two kinds.
    """
    if not path:
        raise SourceError(
            "train.path is empty", next="Give a file, a glob, {000..331}, a directory, or a list of these"
        )
    found = [file for name in expand_braces(path) for file in _expand(name, (SUFFIXES, tuple(_CONVERTED)))]
    if not found:
        raise SourceError("no file matches", where=path, next="{000..331} counts upwards")
    kinds = sorted({kind_of(file.uri) for file in found})
    if len(kinds) > 1:
        what = f"the path holds {' and '.join(kinds)} files"
        raise SourceError(what, where=path, next="Name each kind in an entry of its own, for example with a glob")
    return kinds[0], list({file.uri: file for file in found}.values())


def expand_braces(path: str) -> list[str]:
    """Every name that `{000..331}` and `{a,b}` stand for, in order; leading zeros say how wide numbers are."""
    found = _BRACES.search(path)
    if not found:
        return [path]
    first, last, names = found.groups()
    choices = names.split(",") if names else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    start, end = path[: found.start()], path[found.end() :]
    return [f"{start}{choice}{rest}" for choice in choices for rest in expand_braces(end)]


def base_directory(path: str | Sequence[str]) -> str:
    """Where relative URIs start: the directory of the (first) source path, absolute."""
    first = path if isinstance(path, str) else path[0]
    fixed = re.split(f"{_GLOB.pattern}|{_BRACES.pattern}", first, maxsplit=1)[0]
    is_file = fixed != first or first.endswith(SUFFIXES) or kind_of(first) != "Parquet"
    base = posixpath.dirname(fixed) if is_file else fixed.rstrip("/")
    return base if storage.is_s3(base) else storage.filesystem(base or ".")[1]


def _expand(path: str, wanted: tuple[tuple[str, ...], ...]) -> list[FileStat]:
    """wanted: ends of names; of a directory, files with the first that there are."""
    if _GLOB.search(path):
        _refuse_table_format(base_directory(path))
        matched = [file for file in storage.match_stats(path) if not _is_hidden(posixpath.basename(file.uri))]
        if not matched:
            raise SourceError("no file matches", where=path, next="Check the pattern, and its quoting in YAML")
        return matched
    listed = storage.list_stats(path)
    if len(listed) == 1 and _is_same(listed[0].uri, path):
        _refuse_table_format(posixpath.dirname(listed[0].uri))
        return listed
    if not listed:
        _refuse_nothing(path)
    inside = next((match for file in listed if (match := _INSIDE.search(_below(file.uri, path)))), None)
    if inside:
        raise _refusal(inside[2] or "metadata/*.metadata.json", path)
    _refuse_table_format(posixpath.dirname(path.rstrip("/")))
    ends = (([file for file in listed if _is_data(_below(file.uri, path), suffixes)]) for suffixes in wanted)
    data = next(filter(None, ends), None)
    if not data:
        kinds = Counter(posixpath.splitext(file.uri)[1] or "no suffix" for file in listed).most_common(3)
        what = ", ".join(f"{count} x {suffix}" for suffix, count in kinds)
        advice = "Convert it, for example: duckdb -c \"COPY (FROM 'data.csv') TO 'data.parquet'\""
        if any(kind_of(file.uri) != "Parquet" for file in listed):
            advice += "; or name it in train.path, which takes CSV and WebDataset tars"
        raise SourceError(f"the directory holds no Parquet file ({what})", where=path, next=advice)
    return data


def _refuse_nothing(path: str) -> None:
    if storage.is_directory(path):
        raise SourceError("the directory is empty", where=path)
    raise SourceError("no such file or directory", where=path, next="Correct source.path in the run file")


def _refuse_table_format(directory: str) -> None:
    """Look for a table format's marks in the directory and above it (its data files may lie in partitions)."""
    for _ in range(_ANCESTORS):
        if directory in ("", "/", "s3:", "s3:/", "s3a:", "s3a:/"):
            return
        for mark in _LAKES:
            at = storage.join(directory, mark)
            if storage.match_stats(at) if _GLOB.search(mark) else storage.is_directory(at):
                raise _refusal(mark, directory)
        directory = posixpath.dirname(directory)


def _refusal(mark: str, directory: str) -> SourceError:
    kind, export = _LAKES[mark]
    what = f"this is a {kind} table: its Parquet files also hold rows that were deleted or replaced"
    if kind == "Lance":
        what = "this is a Lance table, not Parquet"
    return SourceError(what, where=directory, next=f"Export its current version to plain Parquet first: {export}")


def _is_same(uri: str, path: str) -> bool:
    return uri == path or (not storage.is_s3(path) and uri == storage.filesystem(path)[1])


def _below(uri: str, path: str) -> str:
    """The part of a listed file's URI below the listed directory."""
    root = storage.filesystem(path)[1].rstrip("/")
    return storage.filesystem(uri)[1].removeprefix(root).lstrip("/")


def _is_data(relative: str, suffixes: tuple[str, ...]) -> bool:
    return relative.endswith(suffixes) and not any(_is_hidden(part) for part in relative.split("/"))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))
