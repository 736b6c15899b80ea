"""Files on a local disk or in a bucket, by one URI: list, read, write by rename, create if absent, retry.

Assumes: `retry` is the only place that repeats: botocore's and s3fs's own repeats are switched off (places.py), so that
a wrong endpoint is reported in seconds. What a URI means and what an error means is found here too, for whoever asks.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import posixpath
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar, cast

from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.places import endpoint, filesystem, is_s3, lance_options
from conjoin.pipeline.troubles import explain, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "ATTEMPTS",
    "FIRST_PAUSE_S",
    "FORMAT",
    "FileStat",
    "absolute",
    "copy_tree",
    "create_bytes",
    "create_json",
    "endpoint",
    "exists",
    "explain",
    "explaining",
    "filesystem",
    "first_line",
    "is_directory",
    "is_s3",
    "join",
    "lance_options",
    "list_ages",
    "list_files",
    "list_stats",
    "match_stats",
    "read_bytes",
    "read_json",
    "remove",
    "retry",
    "write_bytes",
    "write_json",
    "writing",
]

FORMAT = 1
ATTEMPTS = 4
FIRST_PAUSE_S = 0.25

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileStat:
    """One file as a listing shows it; `etag` changes whenever the content does."""

    uri: str
    size_bytes: int
    etag: str


def retry(action: Callable[[], _T], *, verb: str, where: str) -> _T:
    """Run `action`; repeat it with growing pauses while its StorageError is `.retryable`, ATTEMPTS times in all.

    verb: what is being done ("read", "write"), for the message. Errors of file systems, S3 and sockets are turned
    into StorageError by `explain`; every other error passes through at once.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as raised:
            error = explain(raised, verb, where)
            if error is None:
                raise
            if not error.retryable or attempt == ATTEMPTS - 1:
                if error is raised:
                    raise
                raise error from raised
        time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311
    raise AssertionError("unreachable")


@contextmanager
def explaining(verb: str, where: str) -> Iterator[None]:
    """OSErrors of what other libraries do on a disk, as StorageError; nothing is repeated."""
    try:
        yield
    except OSError as error:
        raise explain(error, verb, where) or error from error


def join(base: str, *parts: str) -> str:
    return posixpath.join(base.rstrip("/"), *parts)


def absolute(uri: str) -> str:
    """A local path made absolute, so that it means the same in every process; other URIs as they are."""
    return uri if "://" in uri and not uri.startswith("file://") else str(Path(uri.removeprefix("file://")).absolute())


def exists(uri: str) -> bool:
    """A file or a directory; a bucket that is missing holds nothing."""
    fs, path = filesystem(uri)
    return retry(lambda: bool(fs.exists(path)), verb="look for", where=uri)


def is_directory(uri: str) -> bool:
    fs, path = filesystem(uri)
    return retry(lambda: bool(fs.isdir(path)), verb="look for", where=uri)


def read_bytes(uri: str) -> bytes:
    """Raises StorageError if it is missing or cannot be read."""
    fs, path = filesystem(uri)
    return retry(lambda: cast(bytes, fs.cat_file(path)), verb="read", where=uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Whole or not at all: a bucket's PUT, or a neighbour file, fsync and rename."""
    fs, path = filesystem(uri)
    action = (lambda: fs.pipe_file(path, data)) if is_s3(uri) else (lambda: _write_by_rename(Path(path), data))
    retry(action, verb="write", where=uri)


def _write_by_rename(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def writing(uri: str) -> Iterator[str]:
    """A local path for a library to write to; on success it becomes `uri`, whole or not at all, else it is removed."""
    fs, path = filesystem(uri)
    with TemporaryDirectory(prefix="conjoin-") if is_s3(uri) else nullcontext(str(_made(Path(path).parent))) as folder:
        beside = Path(folder, f".{Path(path).name}.{uuid.uuid4().hex[:8]}")
        try:
            yield str(beside)
            if is_s3(uri):
                retry(lambda: fs.put_file(str(beside), path), verb="write", where=uri)
            else:
                beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def create_bytes(uri: str, data: bytes) -> bool:
    """Write only if nothing is there (a lease); False if somebody was first.

    A PUT whose answer was lost may have succeeded: what lies there already counts as ours if it equals `data`
    after a repeat, so `data` must be unique to its writer.
    """
    fs, path = filesystem(uri)
    tries = 0

    def create() -> bool:
        nonlocal tries
        tries += 1
        try:
            if is_s3(uri):
                fs.pipe_file(path, data, mode="create")
            else:
                _create_whole(Path(path), data)
        except FileExistsError:
            return tries > 1 and cast(bytes, fs.cat_file(path)) == data
        return True

    return retry(create, verb="create", where=uri)


def _create_whole(target: Path, data: bytes) -> None:
    """A hard link appears whole or not at all; opening with "x" would show an empty file first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(data)
        os.link(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_json(uri: str, value: dict[str, object]) -> None:
    """Durable JSON carries its format, so that an older conjoin refuses a newer file by name."""
    write_bytes(uri, json.dumps({"format": FORMAT, **value}, indent=1, sort_keys=True).encode())


def create_json(uri: str, value: dict[str, object]) -> bool:
    """`write_json` only if nothing is there; False if somebody was first."""
    return create_bytes(uri, json.dumps({"format": FORMAT, **value}, indent=1, sort_keys=True).encode())


def read_json(uri: str) -> dict[str, object]:
    """Raises StorageError if it is missing, torn, or written by a newer conjoin."""
    try:
        value = json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError("not valid JSON", where=uri) from error
    if not isinstance(value, dict):
        raise StorageError("not a JSON object", where=uri)
    if value.get("format", FORMAT) > FORMAT:
        raise StorageError(f"written by a newer conjoin (format {value['format']})", where=uri, next="Upgrade conjoin")
    return value


def list_files(uri: str) -> list[str]:
    """Every file below a directory, as sorted URIs; empty if there is none."""
    return [found.uri for found in list_stats(uri)]


def list_stats(uri: str) -> list[FileStat]:
    """Every file below a directory (or the file itself) with size and etag, sorted by URI; empty if there is none."""
    fs, path = filesystem(uri)
    found = retry(lambda: fs.find(path, detail=True) if fs.exists(path) else {}, verb="list", where=uri)
    return [_stat(uri, found[name]) for name in sorted(found)]


def list_ages(uri: str) -> list[tuple[FileStat, float]]:
    """Every file below a directory with the seconds since it was written, sorted by URI."""
    fs, path = filesystem(uri)
    found = retry(lambda: fs.find(path, detail=True) if fs.exists(path) else {}, verb="list", where=uri)
    return [(_stat(uri, found[name]), time.time() - _written(found[name])) for name in sorted(found)]


def _written(info: Mapping[str, object]) -> float:
    """Seconds since 1970."""
    when = info.get("LastModified", info.get("mtime", 0))
    return when.timestamp() if isinstance(when, dt.datetime) else float(str(when))


def match_stats(pattern: str) -> list[FileStat]:
    """Every file that a glob matches (`*`, `?`, `[...]`, `**` for any depth), sorted by URI."""
    fs, path = filesystem(pattern)
    found = retry(lambda: fs.glob(path, detail=True), verb="list", where=pattern)
    return [_stat(pattern, found[name]) for name in sorted(found) if found[name]["type"] == "file"]


def _stat(uri: str, info: dict[str, object]) -> FileStat:
    """A local file has no etag: its modification time and inode stand for one, since every writer renames."""
    if is_s3(uri):
        return FileStat(f"s3://{info['name']}", int(str(info["size"])), str(info["ETag"]).strip('"'))
    found = Path(str(info["name"])).stat()
    return FileStat(str(info["name"]), found.st_size, f"{found.st_mtime_ns:x}-{found.st_ino:x}")


def copy_tree(source: str, target: str) -> None:
    """Copy every file below `source` to the same place below `target`, in name order; one of the two is local.

    Nothing that was at `target` before is removed. Raises StorageError.
    """
    fs, root = filesystem(source)
    for uri in list_files(source):
        path = filesystem(uri)[1]
        to = join(target, path.removeprefix(root).lstrip("/"))
        if is_s3(target):
            remote, key = filesystem(to)
            retry(partial(remote.put_file, path, key), verb="write", where=to)
        else:
            retry(partial(_get_file, fs, path, Path(to)), verb="write", where=to)


def _get_file(fs: AbstractFileSystem, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fs.get_file(path, str(target))


def remove(uri: str) -> None:
    """A file or a tree; nothing there is fine."""
    fs, path = filesystem(uri)
    retry(lambda: fs.rm(path, recursive=True) if fs.exists(path) else None, verb="remove", where=uri)
