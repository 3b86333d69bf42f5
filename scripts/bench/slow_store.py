"""A folder served as a bucket of S3 that answers late: for reading and listing, as a start of a run does.

It does so little for a request that the latency, and not this server, is what is measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bench"
#: Keys in one answer to a listing, as in Amazon's store.
_PAGE = 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    seconds = 0.0
    #: Names of files that are listed and that there are not.
    virtual: tuple[str, int] = ("", 0)
    requests = 0

    def do_GET(self) -> None:
        _Handler.requests += 1
        time.sleep(self.seconds)
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").strip("/")
        if "list-type" in query:
            return self._answer(200, self._listing(query), {"Content-Type": "application/xml"})
        path = self.folder / key
        if not key or not path.is_file():
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        size, (first, last) = path.stat().st_size, (0, path.stat().st_size - 1)
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", "")):
            first = int(found[1]) if found[1] else size - int(found[2])
            last = min(int(found[2]), last) if found[1] and found[2] else last
        headers = {"ETag": f'"{size}"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._answer(200, b"", headers | {"Content-Length": str(size)})
        if last - first + 1 < size:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with path.open("rb") as file:
            file.seek(first)
            self._answer(206 if "Content-Range" in headers else 200, file.read(last - first + 1), headers)

    do_HEAD = do_GET

    def _listing(self, query: dict[str, str]) -> bytes:
        prefix, start = query.get("prefix", ""), int(query.get("continuation-token", "0"))
        keys = self._keys(prefix)
        if delimiter := query.get("delimiter"):
            keys = [key for key in keys if delimiter not in key.removeprefix(prefix)]
        page = keys[start : start + _PAGE]
        more = start + _PAGE < len(keys)
        found = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-11-30T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag>"
            f"<Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{start + _PAGE}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>{_PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{found}{token}</ListBucketResult>"
        ).encode()

    def _keys(self, prefix: str) -> Sequence[str]:
        pattern, count = self.virtual
        if count and prefix == pattern.partition("{")[0]:
            return _Numbered(pattern, count)
        below = self.folder / prefix
        return sorted(str(path.relative_to(self.folder)) for path in below.rglob("*") if path.is_file())

    def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(code)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def log_message(self, *args: object) -> None:
        pass


class _Numbered(Sequence[str]):
    """Keys of a pattern with 32 hex digits, of which a page is made when it is asked for."""

    def __init__(self, pattern: str, count: int):
        self._pattern, self._count = pattern, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(self._count))]
        item = f"{at * 2654435761 % 2**32:08x}{at:024x}"
        return self._pattern.format(head=item[:2], item=item)


def _serve(folder: str, seconds: float, virtual: tuple[str, int], pipe: Connection) -> None:
    _Handler.folder, _Handler.seconds, _Handler.virtual = Path(folder), seconds, virtual
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    pipe.send(server.server_address[1])
    Thread(target=server.serve_forever, daemon=True).start()
    while pipe.recv() == "count":
        pipe.send(_Handler.requests)


@contextmanager
def slow_store(
    folder: str, latency: float, virtual: tuple[str, int] = ("", 0)
) -> Iterator[tuple[dict[str, str], Callable[[], int]]]:
    """Serve `folder`, each answer `latency` seconds late: variables of a client, and a counter of requests.

    virtual: a pattern of keys with {head} and {item}, and how many of them are listed besides.
    """
    context = get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_serve, args=(folder, latency, virtual, other), daemon=True)
    process.start()
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}

    def requests() -> int:
        mine.send("count")
        return int(mine.recv())

    try:
        yield {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{mine.recv()}"}, requests
    finally:
        mine.send("end")
        process.join(timeout=10)
        process.kill()
