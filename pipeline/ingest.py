"""CSV and WebDataset tars of a training path as Parquet: read by Ray's readers, each file once, finished ones kept.

Assumes: one input is one Parquet file, `<directory>/<digest of path, size, etag and this reader>/<name>.parquet`, its
rows in the input's order, written by rename: a killed conversion repeats unfinished files only. Columns of a CSV are
text, empty cells null. A tar has `__key__`, `<tar's name>/<sample's key>`, a column per member's extension (text where
the extension says so, otherwise bytes), and one per scalar or list of texts at the top of a `json` member: its field's
name, or `json.<name>` where an extension has that. What a sample lacks is null.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from conjoin.pipeline import storage, workers
from conjoin.pipeline.errors import ConjoinError, SourceError
from conjoin.pipeline.listing import kind_of
from conjoin.pipeline.members import Members
from conjoin.pipeline.progress import Progress, ShowProgress
from conjoin.pipeline.storage import FileStat

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    from pyarrow import csv

_READER = 1  # another number when the same input gives other columns
_ROW_GROUP_ROWS = 4096
_ROW_GROUP_BYTES = 64 << 20
_CSV_BLOCK_BYTES = 16 << 20  # the longest row
_TAR_END = 1024  # bytes of zeros


@dataclass(frozen=True, slots=True)
class _Rows:
    schema: pa.Schema
    tables: Iterator[pa.Table]


def convert(files: Sequence[FileStat], directory: str, progress: ShowProgress) -> dict[FileStat, FileStat]:
    """The Parquet file of each input; those that are not there yet are made, several at a time. Starts Ray if needed.

    Raises SourceError naming the file that cannot be read, and why.
    """
    wanted = {file: _target(directory, file) for file in files}
    there = _there(directory)
    missing = {file: target for file, target in wanted.items() if _path(target) not in there}
    if missing:
        workers.start()
        _convert_all(missing, len(wanted), progress)
        there = _there(directory)
    return {file: there[_path(target)] for file, target in wanted.items()}


def _target(directory: str, file: FileStat) -> str:
    facts = repr((file.uri, file.size_bytes, file.etag, _READER))
    digest = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    return storage.join(directory, digest, f"{_stem(file.uri)}.parquet")


def _stem(uri: str) -> str:
    return re.sub(r"(\.csv|\.tar)?(\.gz)?$|\.tgz$", "", posixpath.basename(uri), flags=re.IGNORECASE)


def _there(directory: str) -> dict[str, FileStat]:
    return {_path(file.uri): file for file in storage.list_stats(directory)}


def _path(uri: str) -> str:
    return storage.filesystem(uri)[1]


def _convert_all(missing: Mapping[FileStat, str], total: int, progress: ShowProgress) -> None:
    import ray

    # the task only writes; Ray's reader takes the CPU
    task = ray.remote(num_cpus=0)(convert_file)
    waiting = list(missing.items())
    running: set[ray.ObjectRef[None]] = set()
    progress(Progress("convert", total - len(missing), total, "files"))
    while waiting or running:
        while waiting and len(running) < workers.num_cpus():
            running.add(task.remote(*waiting.pop(0)))
        ready, _ = ray.wait(list(running), num_returns=1)
        running.difference_update(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ConjoinError) else error from None
        progress(Progress("convert", total - len(waiting) - len(running), total, "files"))


def convert_file(file: FileStat, target: str) -> None:
    """One input to one Parquet file. Raises SourceError if it cannot be read."""
    read = _csv_rows if kind_of(file.uri) == "CSV" else _tar_rows
    with workers.data_settings(), storage.writing(target) as local:
        _write(read(file), local)


def _write(rows: _Rows, local: str) -> None:
    import pyarrow.parquet as pq

    # pictures do not repeat: no dictionaries
    with pq.ParquetWriter(local, rows.schema, compression="zstd", use_dictionary=False) as writer:
        for table in rows.tables:
            average = max(1, table.nbytes // table.num_rows)
            size = max(1, min(_ROW_GROUP_ROWS, _ROW_GROUP_BYTES // average))
            writer.write_table(table, row_group_size=size)


def _materialized(file: FileStat, read: Callable[..., ray.data.Dataset]) -> ray.data.Dataset:
    """The whole file in Ray's object store, which spills to disk: it is gone through twice. In the file's order."""
    import pyarrow.fs
    import ray

    fs, path = storage.filesystem(file.uri)
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    try:
        return read([path], filesystem=arrow, override_num_blocks=1).materialize()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _tar_rows(file: FileStat) -> _Rows:
    from functools import partial

    import ray.data

    _check_end(file)
    try:
        # Ray's decoder makes arrays of pictures; `decoder=False` would too
        data = _materialized(file, partial(ray.data.read_webdataset, decoder=None))
    except Exception as error:
        _refuse_tar(file, error)
    members = Members(file.uri, _stem(file.uri))

    def frames() -> Iterator[Mapping[str, Sequence[object]]]:
        for frame in data.iter_batches(batch_size=None, batch_format="pandas"):
            yield {str(name): frame[name].tolist() for name in frame.columns}

    for frame in frames():
        members.add(frame)
    return _Rows(members.schema(), (members.table(frame) for frame in frames()))


def _check_end(file: FileStat) -> None:
    """A tar that was cut between two members looks whole to a reader that goes through it."""
    if not file.uri.lower().endswith(".tar"):
        return
    fs, path = storage.filesystem(file.uri)
    start = max(0, file.size_bytes - _TAR_END)
    end = storage.retry(lambda: fs.cat_file(path, start=start), verb="read", where=file.uri)
    if len(end) < _TAR_END or any(end):
        raise SourceError("the tar is torn: its end is missing", where=file.uri, next="Write it again, or leave it out")


def _refuse_tar(file: FileStat, error: Exception) -> NoReturn:
    _raise_of_storage(file, error)
    said = storage.first_line(error)
    if "duplicate file name" in said:
        what, advice = f"two members of the tar are named {said.partition(':')[0]}", "Write it again with one of them"
    elif "are not contiguous" in said:
        key = (re.findall(r"for key '(.*?)'", said) or ["?"])[0]
        what, advice = f"the members of sample {key} are apart in the tar", "Write it again sorted by name"
    else:
        what, advice = f"the tar is torn or none: {said}", "Write it again, or leave it out"
    raise SourceError(what, where=file.uri, next=advice) from None


def _raise_of_storage(file: FileStat, error: Exception) -> None:
    """A disk's and a bucket's errors have a number; those of Arrow and tarfile have none."""
    if isinstance(error, OSError) and error.errno is not None and (found := storage.explain(error, "read", file.uri)):
        raise found from None


def _csv_rows(file: FileStat) -> _Rows:
    from functools import partial

    import pyarrow as pa
    import ray.data
    from pyarrow import csv

    schema = pa.schema([(name, pa.string()) for name in _csv_names(file)])
    cells = csv.ConvertOptions(
        column_types=schema, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    read_options, parse_options = _csv_options()
    read = partial(
        ray.data.read_csv,
        partitioning=None,
        read_options=read_options,
        parse_options=parse_options,
        convert_options=cells,
    )
    try:
        data = _materialized(file, read)
    except Exception as error:
        _raise_of_storage(file, error)
        _refuse_csv(file, _csv_trouble(file, cells) or storage.first_line(error))
    batches = data.iter_batches(batch_size=None, batch_format="pyarrow")
    return _Rows(schema, (table.select(schema.names).cast(schema) for table in batches if table.num_rows))


def _csv_options() -> tuple[csv.ReadOptions, csv.ParseOptions]:
    from pyarrow import csv

    return csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES), csv.ParseOptions(newlines_in_values=True)


def _csv_names(file: FileStat) -> list[str]:
    """The header."""
    import pyarrow as pa
    from pyarrow import csv

    fs, path = storage.filesystem(file.uri)

    def read() -> list[str]:
        with fs.open(path, compression="infer") as opened:
            return list(csv.open_csv(opened, *_csv_options()).schema.names)

    try:
        names = storage.retry(read, verb="read", where=file.uri)
    except pa.ArrowInvalid as error:
        _refuse_csv(file, storage.first_line(error))
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
        _refuse_csv(file, f"its columns seem to be separated by {other!r}, not by commas")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        _refuse_csv(file, f"{names.count(repeated[0])} columns are named {repeated[0]!r}")
    return names


def _csv_trouble(file: FileStat, cells: csv.ConvertOptions) -> str:
    """What Arrow says of the file; Ray's error leaves it out."""
    import pyarrow as pa
    from pyarrow import csv

    fs, path = storage.filesystem(file.uri)
    try:
        with fs.open(path, compression="infer") as opened:
            for _ in csv.open_csv(opened, *_csv_options(), convert_options=cells):
                pass
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        return storage.first_line(error)
    return ""


def _refuse_csv(file: FileStat, why: str) -> NoReturn:
    advice = "Write it again as UTF-8 with commas and one header line, or leave it out"
    raise SourceError(f"the CSV cannot be read: {why}", where=file.uri, next=advice) from None
