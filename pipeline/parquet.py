"""One Parquet file of a source: opened, its footer kept, what is wrong with it said by name.

Assumes: a file with the same size and etag has the same footer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from conjoin.pipeline import storage
from conjoin.pipeline.errors import SourceError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_FOOTER_THREADS = 16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Footer:
    """Columns of a file, and rows of each of its row groups."""

    schema: pa.Schema
    row_groups: tuple[int, ...]


def read_footers(stats: Sequence[storage.FileStat]) -> dict[storage.FileStat, Footer]:
    """Of many files, several at a time. Raises SourceError for what is no Parquet."""
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return dict(zip(stats, pool.map(_footer, stats), strict=True))


@lru_cache(maxsize=20_000)
def _footer(stat: storage.FileStat) -> Footer:
    def read() -> Footer:
        with open_file(stat.uri) as file:
            groups = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            return Footer(file.schema_arrow, tuple(groups))

    return reading(read, stat.uri)


def open_file(path: str) -> pq.ParquetFile:
    """Open a file of the source; call it within `reading`."""
    import pyarrow.parquet as pq

    fs, inner = storage.filesystem(path)
    return pq.ParquetFile(inner, filesystem=fs, pre_buffer=storage.is_s3(path))


def reading(read: Callable[[], _T], path: str) -> _T:
    """Run a read of one Parquet file; a file that is gone or is no Parquet is the source's fault."""
    import pyarrow as pa

    def checked() -> _T:
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            # Arrow reports torn pages as an OSError without errno; those of a disk or a bucket have one.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            advice = "Write the file again, or leave it out of source.path"
            what = f"not a readable Parquet file: {storage.first_line(error)}"
            raise SourceError(what, where=path, next=advice) from error

    try:
        return storage.retry(checked, verb="read", where=path)
    except StorageError as error:
        if error.what == "no such file":
            raise SourceError("a file of the source is gone", where=path, next="Was it replaced? Run again") from error
        raise
