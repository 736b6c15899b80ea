"""An S3 server that misbehaves: a proxy before a good one that fails a seeded share of requests, or refuses old keys.

Assumes: the server behind it checks no signatures (moto does not), so requests are passed on as they came.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# lost: done, but the answer never arrives; 500-done: done, and answered 500; torn: half of the answer's body arrives.
KINDS = ("500", "503", "cut", "lost", "500-done", "torn", "delay")
_DELAY_S = 0.3
_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message><RequestId>1</RequestId></Error>'
_OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Faults:
    """How the proxy behaves, and what it did.

    share: of requests that fail, by a seeded draw among `kinds`. good_tokens: where not empty, only requests that bear
    one of these session tokens are answered, others as S3 answers those of old ones. each: called with the number of
    every request before it is looked at.
    """

    share: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    good_tokens: set[str] = field(default_factory=set)
    each: Callable[[int], None] = lambda number: None
    met: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng, self._lock, self._requests = random.Random(self.seed), threading.Lock(), 0

    def arrive(self) -> None:
        with self._lock:
            self._requests += 1
            self.each(self._requests)

    def draw(self) -> str:
        """The fault of one request, "" for none."""
        with self._lock:
            kind = self._rng.choice(self.kinds) if self._rng.random() < self.share else ""
            self.met[kind or "good"] += 1
            return kind

    def count(self, kind: str) -> None:
        with self._lock:
            self.met[kind] += 1


@contextmanager
def faulty(endpoint: str, faults: Faults) -> Iterator[str]:
    """The address of a proxy before `endpoint` while the block runs."""
    target = urlsplit(endpoint)

    class Handler(_Handler):
        host, port = str(target.hostname), int(target.port or 80)
        behaviour = faults

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: str
    port: int
    behaviour: Faults

    def _serve(self) -> None:
        body = self._body()
        self.behaviour.arrive()
        if self._is_stale():
            self.behaviour.count("stale")
            self._answer(400, _ERROR.format("ExpiredToken", "The provided token has expired.").encode())
            return
        kind = self.behaviour.draw()
        if kind == "delay":
            time.sleep(_DELAY_S)
        if kind in ("500", "503"):
            code = "InternalError" if kind == "500" else "SlowDown"
            self._answer(int(kind), _ERROR.format(code, "Please reduce your request rate.").encode())
        elif kind == "cut":
            self._cut()
        else:
            self._pass_on(body, kind)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _is_stale(self) -> bool:
        good = self.behaviour.good_tokens
        return bool(good) and self.headers.get("X-Amz-Security-Token", "") not in good

    def _pass_on(self, body: bytes, kind: str) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS}
        upstream = HTTPConnection(self.host, self.port, timeout=60)
        try:
            upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = upstream.getresponse()
            data = answer.read()
        except (OSError, HTTPException):
            self._cut()
            return
        finally:
            upstream.close()
        if kind == "lost":
            self._cut()
        elif kind == "500-done":
            self._answer(500, _ERROR.format("InternalError", "We encountered an internal error.").encode())
        else:
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            shown = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OWN_HEADERS]
            self._send(
                answer.status, [*shown, ("Content-Length", length)], data[: len(data) // 2] if kind == "torn" else data
            )
            if kind == "torn":
                self._cut()

    def _answer(self, status: int, body: bytes) -> None:
        self._send(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
