"""Local files and the retry rule; S3 itself is in tests/integration/test_source_s3.py."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from conjoin.pipeline import storage
from conjoin.pipeline.errors import StorageError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.0)


def test_bytes_come_back_and_nothing_lies_beside(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "a.bin")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.bin"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.write_bytes(str(tmp_path / "a"), b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"disk is full.*Free space") as caught:
        storage.write_bytes(str(tmp_path / "a"), b"after")
    assert not caught.value.retryable
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"before"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no such file \[.*gone"):
        storage.read_bytes(str(tmp_path / "gone"))


def test_only_one_creator_wins(tmp_path: Path) -> None:
    uri = str(tmp_path / "x" / "lease.json")
    assert storage.create_bytes(uri, b"mine")
    assert not storage.create_bytes(uri, b"theirs")
    assert not storage.create_bytes(uri, b"mine")
    assert storage.read_bytes(uri) == b"mine"


def test_a_create_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = storage._create_whole
    calls: list[Path] = []

    def lossy(target: Path, data: bytes) -> None:
        whole(target, data)
        calls.append(target)
        raise OSError(errno.ECONNRESET, "connection reset")

    monkeypatch.setattr(storage, "_create_whole", lossy)
    assert storage.create_bytes(str(tmp_path / "lease"), b"mine")
    assert len(calls) == 1


def test_retry_repeats_retryable_errors_only() -> None:
    calls: list[str] = []

    def flaky() -> int:
        calls.append("flaky")
        if len(calls) < 3:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return 7

    def wrong() -> int:
        calls.append("wrong")
        raise PermissionError(errno.EACCES, "no")

    assert storage.retry(flaky, verb="read", where="/x") == 7
    assert calls == ["flaky"] * 3
    with pytest.raises(StorageError, match="permission denied"):
        storage.retry(wrong, verb="read", where="/x")
    assert calls.count("wrong") == 1


def test_retry_gives_up_with_a_retryable_error() -> None:
    calls: list[int] = []

    def down() -> None:
        calls.append(1)
        raise TimeoutError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(StorageError) as caught:
        storage.retry(down, verb="read", where="/x")
    assert len(calls) == storage.ATTEMPTS
    assert caught.value.retryable
    assert pickle.loads(pickle.dumps(caught.value)).retryable


def test_retry_lets_other_errors_through() -> None:
    with pytest.raises(ZeroDivisionError):
        storage.retry(lambda: 1 // 0, verb="read", where="s3://bucket/x")


_LIST = "LanceError(IO): Generic S3 error: Error performing list request: Error performing GET http://h/b in 6ms"


@pytest.mark.parametrize(
    ("error", "uri", "what"),
    [
        (
            OSError("LanceError(IO): No space left on device (os error 28), /w/writer.rs:190:9"),
            "/d/t",
            "the disk is full",
        ),
        (OSError("LanceError(IO): File too large (os error 27)"), "/d/t", "a file would be larger than allowed"),
        (ValueError("Unable to walk dir: Not a directory (os error 20), /w/s.rs:1:2"), "/d/t", "this path is a file"),
        (ValueError("Permission denied (os error 13)"), "/d/t", "permission denied"),
        (OSError("LanceError(IO): torn page, /w/x.rs:15:42"), "/d/t", "cannot open: LanceError(IO): torn page"),
        (
            ValueError(f"{_LIST} - status code: 403 Forbidden: <?xml?>\n<Error><Code>Wrong</Code>"),
            "s3://b/t",
            "(Wrong)",
        ),
        (ValueError(f"{_LIST} - status code: 404: <Code>NoSuchBucket</Code>"), "s3://b/t", "no bucket named b"),
        (OSError(f"{_LIST} - HTTP error: error sending request, /w/o.rs:1:2"), "s3://b/t", "no answer from"),
    ],
)
def test_what_lance_says_in_words_is_understood(error: Exception, uri: str, what: str) -> None:
    explained = storage.explain(error, "open", uri)
    assert explained is not None
    assert what in explained.what
    assert explained.where == uri
    assert ".rs" not in str(explained)
    assert "\n" not in str(explained)


def test_other_value_errors_are_not_of_storage() -> None:
    assert storage.explain(ValueError("Dataset was not found"), "open", "/d/t") is None
    assert storage.explain(ValueError("Dataset was not found"), "open", "s3://b/t") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "not valid JSON"), (b"[]", "not a JSON object"), (b'{"format": 99}', "newer conjoin")],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StorageError, match=words):
        storage.read_json(str(tmp_path / "a.json"))


def test_json_bears_its_format(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "a.json"), {"b": 1})
    assert storage.read_json(str(tmp_path / "a.json")) == {"format": storage.FORMAT, "b": 1}


def test_listings_are_sorted_and_etags_follow_content(tmp_path: Path) -> None:
    for name in ("b/2", "a", "b/1"):
        storage.write_bytes(str(tmp_path / name), b"x")
    before = storage.list_stats(str(tmp_path))
    assert [found.uri.removeprefix(f"{tmp_path}/") for found in before] == ["a", "b/1", "b/2"]
    storage.write_bytes(str(tmp_path / "b/1"), b"y")
    after = storage.list_stats(str(tmp_path))
    assert [old.etag == new.etag for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [found.uri for found in storage.match_stats(str(tmp_path / "b" / "*"))] == storage.list_files(
        str(tmp_path / "b")
    )
    assert storage.list_files(str(tmp_path / "nothing")) == []


def test_copy_and_remove_a_tree(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "from/one"), b"1")
    storage.write_bytes(str(tmp_path / "from/below/two"), b"2")
    storage.copy_tree(str(tmp_path / "from"), str(tmp_path / "to"))
    assert (tmp_path / "to/below/two").read_bytes() == b"2"
    storage.remove(str(tmp_path / "to"))
    storage.remove(str(tmp_path / "to"))
    assert not storage.exists(str(tmp_path / "to"))
    assert storage.is_directory(str(tmp_path / "from"))


def test_the_endpoint_reaches_lance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    options = storage.lance_options("s3://bucket/x")
    assert options["aws_endpoint"] == "http://127.0.0.1:1"
    assert options["allow_http"] == "true"
    assert storage.lance_options("/local") == {}


def test_what_a_library_writes_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new/file.bin"
    with storage.writing(str(target)) as local:
        Path(local).write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    with pytest.raises(ValueError, match="stop"), storage.writing(str(target)) as local:  # noqa: PT012
        Path(local).write_bytes(b"half")
        raise ValueError("stop")
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"whole"]
