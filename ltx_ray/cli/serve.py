"""`ltx-ray report --serve`: the report and its clips over HTTP, on this machine alone, from any store."""

from __future__ import annotations

import contextlib
import re
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ltx_ray.dataset import layout
from ltx_ray.storage.store import Store

#: What is served, and as what. Everything else of the output is nobody's business in a browser.
_PAGE = layout.REPORT
_FILES = re.compile(rf"(?:{layout.CLIPS}|{layout.PREVIEWS}|{layout.THUMBS})/[0-9a-f]{{2}}/[0-9a-f]{{32}}\.(mp4|webp)")
_TYPES = {"mp4": "video/mp4", "webp": "image/webp"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_HOST = "127.0.0.1"
_PIECE = 1 << 20


@contextmanager
def report_server(store: Store, port: int) -> Iterator[ThreadingHTTPServer]:
    """A server of the report of `store` on `port` of this machine, or any port for 0; the caller runs it.

    Raises ValueError for a port that cannot be had.
    """

    class Handler(_Handler):
        output = store

    try:
        server = _Server((_HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--serve: {port}, cannot be opened ({error}); legal: another port, or 0 for any") from None
    with server:
        yield server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # That of HTTPServer asks for this machine's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    output: Store

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        # A page of another site may have its name point here.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_HOST, "localhost"):
            return self._refuse(HTTPStatus.FORBIDDEN)
        path = unquote(urlsplit(self.path).path).lstrip("/") or _PAGE
        match = _FILES.fullmatch(path)
        if match is None and path != _PAGE:
            return self._refuse(HTTPStatus.NOT_FOUND)
        kind = _TYPES[match[1]] if match else "text/html; charset=utf-8"
        with contextlib.suppress(ConnectionError):  # the browser has seen enough
            try:
                size = self.output.size(path)
                if size is None:
                    return self._refuse(HTTPStatus.NOT_FOUND)
                self._send(path, kind, size, body)
            except FileNotFoundError:
                self._refuse(HTTPStatus.NOT_FOUND)
            except ConnectionError:
                raise
            except OSError:
                self.close_connection = True  # The store does not answer; the browser says that the rest is missing.

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, path: str, kind: str, size: int, body: bool) -> None:
        begin, end = _span(self.headers.get("Range", ""), size)
        if begin >= end and size:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with self.output.fs.open_input_file(self.output.path(path)) as file:
            whole = (begin, end) == (0, size)
            self.send_response(HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("X-Content-Type-Options", "nosniff")
            if not whole:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            file.seek(begin)
            while body and begin < end:
                piece = file.read(min(_PIECE, end - begin))
                if not piece:
                    break
                self.wfile.write(piece)
                begin += len(piece)


def _span(header: str, size: int) -> tuple[int, int]:
    """The bytes that a Range header asks for, as (begin, end); all of them for one that is none, or has several."""
    match = _RANGE.fullmatch(header)
    if match is None or match[0] == "bytes=-":
        return 0, size
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
