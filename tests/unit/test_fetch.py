"""Files and addresses to bytes, against a real server on loopback: retries, limits, connections, clear refusals."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conjoin.encoders.spec import ImageTransform, TowerSpec
from conjoin.pipeline import fetch, storage
from conjoin.pipeline.decode import decode
from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.fetch import Fetcher


@dataclass
class Site:
    """What the server saw: requests by path, connections, the most requests at once."""

    uri: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """/ok, /<status>, /busy-twice, /short (fewer bytes than promised), /slow, /loop, /moved, /huge."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            found.connections += 1

        def do_GET(self) -> None:
            name = self.path.strip("/")
            with found.lock:
                found.seen[name] += 1
                found.now += 1
                found.most = max(found.most, found.now)
            try:
                self.answer(name)
            finally:
                found.now -= 1

        def answer(self, name: str) -> None:
            status, body, promised = 200, b"picture", 7
            if name.isdigit():
                status = int(name)
            elif name == "busy-twice" and found.seen[name] <= 2:
                status = 503
            elif name in ("loop", "moved"):
                status = 302
            elif name == "short":
                promised, self.close_connection = 100, True
            elif name == "huge":
                promised, self.close_connection = fetch.MAX_BYTES + 1, True
            elif name.startswith("slow"):
                time.sleep(0.05)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/loop" if name == "loop" else "/ok")
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is what some tests are about."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    found.uri = f"http://127.0.0.1:{server.server_port}"
    yield found
    fetch._pool(None).clear()
    server.shutdown()
    server.server_close()
    thread.join()


def test_bytes_come_over_one_connection(site: Site) -> None:
    fetcher = Fetcher()
    assert [fetcher.fetch(f"{site.uri}/ok") for _ in range(5)] == [b"picture"] * 5
    assert site.connections == 1


def test_a_busy_server_is_asked_again(site: Site) -> None:
    assert Fetcher().fetch(f"{site.uri}/busy-twice") == b"picture"
    assert site.seen["busy-twice"] == 3


def test_a_redirect_is_followed(site: Site) -> None:
    assert Fetcher().fetch(f"{site.uri}/moved") == b"picture"


@pytest.mark.parametrize(
    ("path", "words", "requests"),
    [
        ("404", "nothing there (HTTP 404)", 1),
        ("410", "nothing there (HTTP 410)", 1),
        ("403", "access denied (HTTP 403)", 1),
        ("400", "cannot fetch: HTTP 400", 1),
        ("503", "cannot fetch: HTTP 503", storage.ATTEMPTS),
        ("short", "cannot fetch: ", storage.ATTEMPTS),
        ("huge", "larger than 256 MB", 1),
        ("loop", "cannot fetch: too many redirects", 6),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_said_with_its_address(site: Site, path: str, words: str, requests: int) -> None:
    with pytest.raises(StorageError) as caught:
        Fetcher().fetch(f"{site.uri}/{path}")
    assert words in str(caught.value)
    assert f"[{site.uri}/{path}]" in str(caught.value)
    assert site.seen[path] == requests


def test_a_host_that_is_down_is_given_up(site: Site) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{probe.getsockname()[1]}"
    fetcher = Fetcher()
    reasons = []
    for number in range(fetch.GIVE_UP_AFTER + 2):
        with pytest.raises(StorageError) as caught:
            fetcher.fetch(f"{down}/{number}")
        reasons.append(caught.value.what)
    assert all("refused" in reason for reason in reasons[: fetch.GIVE_UP_AFTER])
    assert set(reasons[fetch.GIVE_UP_AFTER :]) == {"not tried: 8 requests in a row failed"}
    assert fetcher.fetch(f"{site.uri}/ok") == b"picture"


def test_missing_pictures_do_not_count_as_a_host_that_is_down(site: Site) -> None:
    fetcher = Fetcher()
    for _ in range(fetch.GIVE_UP_AFTER + 1):
        with pytest.raises(StorageError, match="nothing there"):
            fetcher.fetch(f"{site.uri}/404")
    assert fetcher.fetch(f"{site.uri}/ok") == b"picture"


def test_many_threads_share_few_connections(site: Site) -> None:
    fetcher = Fetcher()
    with ThreadPoolExecutor(fetch.CONCURRENCY) as pool:
        found = list(pool.map(fetcher.fetch, [f"{site.uri}/slow{n}" for n in range(64)]))
    assert found == [b"picture"] * 64
    assert site.connections <= fetch.CONCURRENCY


def test_decoding_asks_for_no_more_than_the_limit_at_once(site: Site) -> None:
    tower = TowerSpec("image", "cnn", {}, 8, ImageTransform(size_px=16))
    found = decode(tower, [f"{site.uri}/slow{n}" for n in range(64)] + [f"{site.uri}/404"])
    assert 2 <= site.most <= fetch.CONCURRENCY
    assert [bad.stage for bad in found.bad] == ["decode"] * 64 + ["fetch"]
    assert found.bad[64].reason == f"nothing there (HTTP 404) [{site.uri}/404]"


def test_files_by_path_and_by_address(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"x")
    assert Fetcher().fetch(str(tmp_path / "a b.jpg")) == b"x"
    assert Fetcher().fetch(f"file://{tmp_path}/a%20b.jpg") == b"x"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("/nowhere/x.jpg", "no such file"),
        ("/", "a directory, not a file"),
        ("/dev/zero", "not a file"),
        ("a\0b", "not a valid file name"),
        ("s3://bucket/", "a bucket, not an object in it"),
        ("data:image/png;base64,AAAA", "cannot fetch data: addresses"),
        ("ftp://host/x.jpg", "cannot fetch ftp: addresses"),
        ("http://[half/x.jpg", "not a valid address"),
        ("http:///x.jpg", "not a valid address"),
    ],
)
def test_what_is_no_file_or_address(uri: str, words: str) -> None:
    with pytest.raises(StorageError, match=words):
        Fetcher().fetch(uri)


def test_a_pipe_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match=r"not a file .*pipe"):
        Fetcher().fetch(str(tmp_path / "pipe"))


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(fetch.MAX_BYTES + 1)
    with pytest.raises(StorageError, match="larger than 256 MB"):
        Fetcher().fetch(str(tmp_path / "sparse"))
