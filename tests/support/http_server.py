"""A local HTTP server for the stand-ins of services: how it answers, and how it begins and ends."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answers(BaseHTTPRequestHandler):
    """Answers requests; a stand-in adds the methods that decide with what."""

    protocol_version = "HTTP/1.1"

    def answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        """Send an answer; with `cut`, one whose connection ends in the middle of `content`."""
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class LocalServer:
    """Serves on a free port of 127.0.0.1 until it is closed."""

    def __init__(self, handler: type[Answers]):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
