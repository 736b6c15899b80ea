"""Where a URI leads: a local path or a bucket, and how S3 is reached by fsspec and by Lance.

Assumes: credentials and endpoint come from the standard AWS environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION) or the machine's role, never from the run file; storage.py is what others import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def endpoint() -> str | None:
    """The S3 endpoint of the environment; None means AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI and the path in it, absolute on a local disk."""
    import fsspec

    if not is_s3(uri):
        return fsspec.filesystem("file"), str(Path(uri.removeprefix("file://")).absolute())
    import s3fs

    # Endpoint and keys are arguments so that fsspec's instance cache keeps two endpoints, and renewed keys, apart.
    fs = s3fs.S3FileSystem(
        endpoint_url=endpoint(),
        key=os.environ.get("AWS_ACCESS_KEY_ID"),
        secret=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        token=os.environ.get("AWS_SESSION_TOKEN"),
        default_cache_type="none",
        listings_expiry_time=0,
        use_listings_cache=False,
        config_kwargs={"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}},
    )
    fs.retries = 1
    return fs, uri.split("://", 1)[1]


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
