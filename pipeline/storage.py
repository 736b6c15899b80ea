"""Files on a local disk or in a bucket, by one URI: list, read, write by rename, create if absent.

Assumes: credentials and endpoint come from the standard AWS environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION) or the machine's role, never from the run file.
"""

from __future__ import annotations

import json
import os
import posixpath
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

from conjoin.pipeline.errors import StorageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMAT = 1


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI and the path in it."""
    import fsspec

    if is_s3(uri):
        import s3fs

        return s3fs.S3FileSystem(
            default_cache_type="none", listings_expiry_time=0, use_listings_cache=False
        ), uri.split("://", 1)[1]
    return fsspec.filesystem("file"), uri.removeprefix("file://")


def lance_options(uri: str) -> dict[str, str]:
    """storage_options for lance and lancedb; they do not read AWS_ENDPOINT_URL by themselves."""
    if not is_s3(uri):
        return {}
    names = {
        "aws_access_key_id": ("AWS_ACCESS_KEY_ID",),
        "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
        "aws_session_token": ("AWS_SESSION_TOKEN",),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "aws_endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    }
    found = {key: next((os.environ[n] for n in env if os.environ.get(n)), "") for key, env in names.items()}
    options = {key: value for key, value in found.items() if value}
    if options.get("aws_endpoint", "").startswith("http://"):
        options["allow_http"] = "true"
    return options


def join(base: str, *parts: str) -> str:
    return posixpath.join(base.rstrip("/"), *parts)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """Raises StorageError if it is missing or cannot be read."""
    fs, path = filesystem(uri)
    try:
        return cast(bytes, fs.cat_file(path))
    except FileNotFoundError as error:
        raise StorageError("no such file", where=uri) from error
    except OSError as error:
        raise StorageError(f"cannot read: {error}", where=uri) from error


def write_bytes(uri: str, data: bytes) -> None:
    """Whole or not at all: a bucket's PUT, or a neighbour file, fsync and rename."""
    fs, path = filesystem(uri)
    try:
        if is_s3(uri):
            fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        with beside.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write: {error}", where=uri, next="Check space and permissions") from error


def create_bytes(uri: str, data: bytes) -> bool:
    """Write only if nothing is there (a lease); False if somebody was first."""
    fs, path = filesystem(uri)
    try:
        if is_s3(uri):
            fs.pipe_file(path, data, mode="create")
            return True
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            out.write(data)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"cannot create: {error}", where=uri) from error


def write_json(uri: str, value: dict[str, object]) -> None:
    """Durable JSON carries its format, so that an older conjoin refuses a newer file by name."""
    write_bytes(uri, json.dumps({"format": FORMAT, **value}, indent=1, sort_keys=True).encode())


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
    fs, path = filesystem(uri)
    prefix = "s3://" if is_s3(uri) else ""
    return sorted(prefix + found for found in fs.find(path)) if fs.exists(path) else []


def remove(uri: str) -> None:
    """A file or a tree; nothing there is fine."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
