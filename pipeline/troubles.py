"""What went wrong on a disk or in a bucket, in our words: errors of many libraries as StorageError.

Assumes: storage.py repeats and raises; here nothing is done but told.
"""

from __future__ import annotations

import errno
import re

from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.places import endpoint, is_s3

_BUSY_CODES = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "Throttling",
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
# Lance and Arrow put the error of the system, or S3's answer, into words only.
_ERRNO = re.compile(r"\((?:os error |errno: )(\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
_S3_STATUS = re.compile(r"status code: (\d{3})")
_S3_CODE = re.compile(r"<Code>(\w+)</Code>")
_UNSENT = "error sending request"
_TRANSIENT = {errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.ESTALE, errno.EREMOTEIO}
_CREDENTIALS = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or the machine's role) and the bucket's policy"
_OLD_KEYS = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
_RENEW = "Renew them (or name a role or a credential_process, which renew themselves); the same command goes on"


def explain(error: Exception, verb: str, where: str) -> StorageError | None:
    """The StorageError that says what went wrong, `.retryable` set; None if it is not an error of storage."""
    if isinstance(error, StorageError):
        return error
    if is_s3(where):
        from aiohttp import ClientError as Broken  # an answer cut off in the middle, which botocore does not wrap
        from botocore.exceptions import BotoCoreError, ClientError

        known = isinstance(error, OSError | TimeoutError | BotoCoreError | ClientError | Broken)
        return _explain_s3(error, verb, where) if known or _is_in_words(error) else None
    return _explain_local(error, verb, where) if isinstance(error, OSError) or _is_in_words(error) else None


def _is_in_words(error: Exception) -> bool:
    """Whether it is an error of the system or of S3 that a library reports as text (Lance: as ValueError)."""
    return any(mark.search(str(error)) for mark in (_ERRNO, _S3_STATUS)) or _UNSENT in str(error)


def _explain_local(error: Exception, verb: str, where: str) -> StorageError:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _ERRNO.search(str(error))):
        number = int(found[1] or found[2])
    if number == errno.ENOENT:
        return StorageError("no such file", where=where)
    if number in (errno.EACCES, errno.EPERM):
        return StorageError(f"cannot {verb}: permission denied", where=where)
    if number in _FULL:
        return StorageError(f"cannot {verb}: the disk is full", where=where, next="Free space and repeat the command")
    if number == errno.EFBIG:
        advice = "Raise the limit (`ulimit -f`), or use another disk"
        return StorageError(f"cannot {verb}: a file would be larger than allowed", where=where, next=advice)
    if number in (errno.ENOTDIR, errno.EEXIST):
        what = f"cannot {verb}: a directory of this path is a file"
        return StorageError(what, where=where, next="Move the file away, or correct the path")
    return _retryable(StorageError(f"cannot {verb}: {first_line(error)}", where=where), number in _TRANSIENT)


def first_line(error: Exception) -> str:
    """What a library says, without the place in its source that found it."""
    return re.sub(r",? \S+\.rs:\d+:\d+$", "", (str(error).splitlines() or [type(error).__name__])[0])


def _explain_s3(error: Exception, verb: str, where: str) -> StorageError:
    import aiohttp
    from botocore import exceptions as boto

    bucket = where.split("://", 1)[1].split("/", 1)[0]
    cause = error if isinstance(error, boto.ClientError) else error.__cause__
    response = cause.response if isinstance(cause, boto.ClientError) else {}
    code = str(response.get("Error", {}).get("Code", "")) or _first(_S3_CODE, error)
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or _first(_S3_STATUS, error) or 0)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StorageError(f"cannot {verb}: no credentials for S3", where=where, next=_CREDENTIALS)
    if code == "NoSuchBucket":
        return StorageError(f"no bucket named {bucket}", where=where, next="Create it, or correct the name")
    if isinstance(error, FileNotFoundError):
        return StorageError("no such file", where=where)
    if code == "400":  # of a HEAD: S3 says no more, and asks for it with keys that have run out
        what = f"cannot {verb}: S3 refuses the request (400), as it does when the keys of S3 have expired"
        return StorageError(what, where=where, next=_RENEW)
    if code in _OLD_KEYS or any(word in str(error) for word in _OLD_KEYS):
        return StorageError(f"cannot {verb}: the keys of S3 have expired", where=where, next=_RENEW)
    if isinstance(error, PermissionError) or status in (401, 403):
        why = f"{code or status or 403}"
        return StorageError(f"cannot {verb}: S3 denied access ({why})", where=where, next=_CREDENTIALS)
    broken = (boto.ConnectionError, boto.HTTPClientError, aiohttp.ClientError, TimeoutError)
    if isinstance(error, broken) or _UNSENT in str(error):
        why = "" if _UNSENT in str(error) else f": {error}"
        what = f"cannot {verb}: no answer from {endpoint() or 'S3'}{why}"
        advice = "Check AWS_ENDPOINT_URL, the network and that the server runs"
        return _retryable(StorageError(what, where=where, next=advice), True)
    busy = code in _BUSY_CODES or status >= 500 or status == 429
    transient = busy or (isinstance(error, OSError) and error.errno in _TRANSIENT)
    return _retryable(StorageError(f"cannot {verb}: {first_line(error)}", where=where), transient)


def _first(pattern: re.Pattern[str], error: Exception) -> str:
    found = pattern.search(str(error))
    return found[1] if found else ""


def _retryable(error: StorageError, retryable: bool) -> StorageError:
    error.retryable = retryable
    return error
