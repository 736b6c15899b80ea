"""What a URI names, as bytes: a local file, an S3 object, an http(s) address; with retries and a limit per host.

Assumes: one Fetcher serves one batch of values from many threads, and is dropped with it.
"""

from __future__ import annotations

import stat
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from conjoin.pipeline import storage
from conjoin.pipeline.errors import StorageError

if TYPE_CHECKING:
    import urllib3

CONCURRENCY = 16
MAX_BYTES = 256 << 20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
# After so many failures in a row a host counts as down: the rest of the batch need not wait for its timeouts.
GIVE_UP_AFTER = 8
_SHOWN_CHARS = 80
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_GONE = {404, 410}
_DENIED = {401, 403, 407}
_T = TypeVar("_T")


class Fetcher:
    """Fetches URIs from any number of threads."""

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fetch(self, uri: str) -> bytes:
        """The bytes. Raises StorageError saying why there are none, after repeats where a repeat may help."""
        return self._asking(uri, lambda: _read(uri))

    def stamp(self, uri: str) -> str:
        """Size and etag (of a file its time, of a page its Last-Modified), without the bytes. Raises like fetch."""
        return self._asking(uri, lambda: _stamp(uri))

    def _asking(self, uri: str, ask: Callable[[], _T]) -> _T:
        host = _host(uri)
        if self._failures[host] >= GIVE_UP_AFTER:
            raise StorageError(f"not tried: {GIVE_UP_AFTER} requests in a row failed", where=host)
        try:
            answer = storage.retry(ask, verb="fetch", where=uri)
        except StorageError as error:
            with self._lock:
                self._failures[host] += error.retryable
            raise
        with self._lock:
            self._failures[host] = 0
        return answer


def _host(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise StorageError(f"not a valid address: {error}", where=uri) from None
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else "file"


def _scheme(uri: str) -> str:
    return uri.split("://", 1)[0].lower() if "://" in uri else "data" if uri.startswith("data:") else "file"


def _stamp(uri: str) -> str:
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        response = _request("HEAD", uri)
        response.release_conn()
        return "|".join(response.headers.get(name, "") for name in ("Content-Length", "ETag", "Last-Modified"))
    if scheme in ("s3", "s3a"):
        fs, path = storage.filesystem(uri)
        info = fs.info(path)
        return f"{info['size']}|{info.get('ETag', '')}"
    found = _path(uri).stat()
    return f"{found.st_size}|{found.st_mtime_ns:x}"


def _read(uri: str) -> bytes:
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        return _read_http(uri)
    if scheme in ("s3", "s3a"):
        fs, path = storage.filesystem(uri)
        if not path.partition("/")[2]:
            raise StorageError("a bucket, not an object in it", where=uri)
        return cast(bytes, fs.cat_file(path))
    if scheme == "file":
        return _read_file(uri)
    advice = "Addresses are files, s3://, http:// or https://"
    raise StorageError(f"cannot fetch {scheme}: addresses", where=uri[:_SHOWN_CHARS], next=advice)


def _path(uri: str) -> Path:
    if "\0" in uri:
        raise StorageError("not a valid file name", where=uri)
    return Path(unquote(urlsplit(uri).path) if uri.startswith("file://") else uri)


def _read_file(uri: str) -> bytes:
    path = _path(uri)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
        raise StorageError("not a file" if not path.is_dir() else "a directory, not a file", where=uri)
    _check_size(found.st_size, uri)
    return path.read_bytes()


def _read_http(uri: str) -> bytes:
    import urllib3

    response = _request("GET", uri)
    try:
        _check_size(int(response.headers.get("Content-Length") or 0), uri)
        data = response.read(MAX_BYTES + 1)
        _check_size(len(data), uri)
    except urllib3.exceptions.HTTPError as error:
        response.close()
        raise _failed(uri, error, retryable=True) from error
    except BaseException:
        response.close()
        raise
    response.release_conn()
    return data


def _request(method: str, uri: str) -> urllib3.BaseHTTPResponse:
    """The answer, its body unread. Raises StorageError for any status but 2xx."""
    import urllib3

    try:
        response = _pool(_proxy(uri)).request(method, uri, preload_content=False)
    except (urllib3.exceptions.LocationParseError, urllib3.exceptions.LocationValueError) as error:
        raise StorageError("not a valid address", where=uri) from error
    except urllib3.exceptions.MaxRetryError as error:
        is_loop = isinstance(error.reason, urllib3.exceptions.ResponseError)
        raise _failed(uri, error.reason or error, retryable=not is_loop) from error
    except urllib3.exceptions.HTTPError as error:
        raise _failed(uri, error, retryable=True) from error
    try:
        _check_status(response.status, uri)
    except StorageError:
        response.close()
        raise
    return response


def _failed(uri: str, error: BaseException, *, retryable: bool) -> StorageError:
    failed = StorageError(f"cannot fetch: {error}", where=uri)
    failed.retryable = retryable
    return failed


def _check_status(status: int, uri: str) -> None:
    if 200 <= status < 300:
        return
    if status in _GONE:
        raise StorageError(f"nothing there (HTTP {status})", where=uri)
    if status in _DENIED:
        raise StorageError(f"access denied (HTTP {status})", where=uri)
    raise _failed(uri, RuntimeError(f"HTTP {status}"), retryable=status in _BUSY)


def _check_size(size_bytes: int, uri: str) -> None:
    if size_bytes > MAX_BYTES:
        raise StorageError(f"larger than {MAX_BYTES >> 20} MB", where=uri)


def _proxy(uri: str) -> str | None:
    parts = urlsplit(uri)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


@cache
def _pool(proxy: str | None) -> urllib3.PoolManager:
    """Connections are kept open: a handshake per picture would cost more than the picture."""
    import urllib3

    options: dict[str, Any] = {
        "maxsize": CONCURRENCY,
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        "headers": {"User-Agent": "conjoin", "Accept": "*/*"},
    }
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
