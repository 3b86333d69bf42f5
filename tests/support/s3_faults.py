"""An HTTP proxy in front of an S3 endpoint that injects the faults of an object store by a seeded schedule."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: slow_down: 503 SlowDown, as S3 throttles. error: 500 InternalError. cut_request: the connection is closed in the
#: middle of the request, which never arrives. cut_response: the request is carried out, and the connection is closed in
#: the middle of its response. lost_response: the request is carried out, and the connection is closed before its
#: response. stall: nothing happens for `seconds`, then the connection is closed. denied: 403, which is permanent.
#: conflict: 409, as S3 answers a conditional write while another one is under way. unconditional: the conditions of a
#: request are overlooked. not_implemented: 501 for a request with conditions.
KINDS = (
    "slow_down", "error", "cut_request", "cut_response", "lost_response", "stall", "denied", "conflict",
    "unconditional", "not_implemented", "no_checksums",
)  # fmt: skip
_CODES = {
    "slow_down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "conflict": (409, "ConditionalRequestConflict"),
    "not_implemented": (501, "NotImplemented"),
    "no_checksums": (400, "InvalidArgument"),
}
_CONDITIONS = {"if-match", "if-none-match"}
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Faults:
    """Which requests meet a fault: those with a method of `methods` and a path and query that match `pattern`.

    The first `first` of them always do, the later ones with `probability`. The kind of fault is drawn from `kinds`. All
    draws follow from `seed`.
    """

    kinds: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    pattern: str = ""
    first: int = 0
    probability: float = 0.0
    seconds: float = 1.0
    seed: int = 0
    #: Number of requests by (method, kind of fault); the kind is "ok" for those let through.
    met: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        assert set(self.kinds) <= set(KINDS)
        self._random, self._lock, self._seen = random.Random(self.seed), threading.Lock(), 0

    def next(self, method: str, path: str) -> str:
        """The kind of fault that the next request meets, or "ok"."""
        with self._lock:
            kind = "ok"
            if self.kinds and method in self.methods and re.search(self.pattern, path):
                self._seen += 1
                if self._seen <= self.first or self._random.random() < self.probability:
                    kind = self._random.choice(self.kinds)
            self.met[method, kind] += 1
            return kind


class Proxy:
    """Serves `endpoint` at `url`. Its `faults` can be replaced at any time.

    `requests` are those that came so far, each as (method, path, headers).
    """

    def __init__(self, endpoint: str):
        self.faults, self.requests = Faults(), []
        target = urlsplit(endpoint)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                kind = proxy.faults.next(self.command, self.path)
                proxy.requests.append((self.command, self.path, dict(self.headers)))
                if kind == "cut_request":
                    return self._close()  # the body stays unread
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length) if length else self._chunks()
                if kind == "stall":
                    time.sleep(proxy.faults.seconds)
                    return self._close()
                conditional = any(name.lower() in _CONDITIONS for name in self.headers)
                summed = any(name.lower() == "x-amz-checksum-sha256" for name in self.headers)
                spared = {"not_implemented": not conditional, "no_checksums": not summed}
                if kind in _CODES and not spared.get(kind):
                    return self._refuse(*_CODES[kind])
                upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
                try:
                    dropped = _HOP_BY_HOP | (_CONDITIONS if kind == "unconditional" else set())
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                finally:
                    upstream.close()
                if kind == "lost_response":
                    return self._close()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                        self.send_header(name, value)
                sent = answer.getheader("content-length") if self.command == "HEAD" else str(len(content))
                if sent is not None:
                    self.send_header("Content-Length", sent)
                if kind == "cut_response" and not content:
                    return self._close()  # in the middle of the headers
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if kind == "cut_response" else content)
                if kind == "cut_response":
                    self._close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

            def _chunks(self) -> bytes:
                if "chunked" not in (self.headers.get("transfer-encoding") or ""):
                    return b""
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _refuse(self, code: int, name: str) -> None:
                why = "Unsupported header 'x-amz-checksum-sha256'" if name == "InvalidArgument" else "injected"
                content = f"<Error><Code>{name}</Code><Message>{why}</Message></Error>".encode()
                self.send_response_only(code)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content if self.command != "HEAD" else b"")

            def _close(self) -> None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients hang up after an injected fault

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @contextmanager
    def misbehaving(self, **faults: object) -> Iterator[Faults]:
        """Inject these faults inside the `with` block, and none after it."""
        self.faults = Faults(**faults)
        try:
            yield self.faults
        finally:
            self.faults = Faults()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
