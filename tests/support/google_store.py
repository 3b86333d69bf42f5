"""A server with as much of Google's object store as conditional writing, listing and reading by ranges need."""

from __future__ import annotations

import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.http_server import Answers, LocalServer

_TIME = "2026-01-01T00:00:00.000Z"
_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class GoogleStore:
    """Serves one bucket at `address` (host:port), and tokens at `/token`.

    `objects` are (generation, bytes) by key. `tokens` are those that requests carried, None for anonymous ones. The
    next reads meet `faults`: the status of an answer, or "cut" for one that ends in the middle.
    """

    def __init__(self, bucket: str):
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.faults: list[int | str] = []
        store, lock, generations = self, threading.Lock(), iter(range(1, 10**6))

        class Handler(Answers):
            def do_POST(self) -> None:
                assert self.path == "/token"
                self.rfile.read(int(self.headers["content-length"]))
                answer = {"access_token": "TOKEN", "expires_in": 3600, "token_type": "Bearer"}
                self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def do_PUT(self) -> None:
                data, key = self.rfile.read(int(self.headers["content-length"])), self._key()
                with lock:
                    present = store.objects.get(key, (0, b""))[0]
                    expected = self.headers.get("x-goog-if-generation-match")
                    if expected is not None and int(expected) != present:
                        return self.answer(412)
                    store.objects[key] = (next(generations), data)
                    self.answer(200, headers=self._version(key))

            def do_GET(self) -> None:
                key = self._key()
                if not key:
                    return self._list(parse_qs(urlsplit(self.path).query))
                with lock:
                    fault = store.faults.pop(0) if store.faults else None
                if isinstance(fault, int) or key not in store.objects:
                    return self.answer(fault if isinstance(fault, int) else 404)
                version, content = self._version(key), store.objects[key][1]
                if self.headers.get("if-match", version["ETag"]) != version["ETag"]:
                    return self.answer(412)
                if (asked := self.headers.get("range")) is None:
                    return self.answer(200, content, version, cut=fault == "cut")
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                part = content[first : last + 1]
                if not part:
                    return self.answer(416)
                version["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                self.answer(206, part, version, cut=fault == "cut")

            do_HEAD = do_GET

            def do_DELETE(self) -> None:
                self.answer(204 if store.objects.pop(self._key(), None) else 404)

            def _key(self) -> str:
                authorization = self.headers.get("authorization")
                store.tokens.add(authorization and authorization.removeprefix("Bearer "))
                found, _, key = unquote(urlsplit(self.path).path).strip("/").partition("/")
                assert found == bucket
                return key

            def _version(self, key: str) -> dict[str, str]:
                generation = store.objects[key][0]
                return {"ETag": f'"{generation}"', "x-goog-generation": f"{generation}", "Last-Modified": _DATE}

            def _list(self, query: dict[str, list[str]]) -> None:
                (prefix,) = query.get("prefix", [""])
                contents = "".join(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified><ETag>1</ETag>"
                    f"<Size>{len(data)}</Size></Contents>"
                    for key, (_, data) in sorted(store.objects.items())
                    if key.startswith(prefix)
                )
                self.answer(200, f"<ListBucketResult>{contents}</ListBucketResult>".encode())

        self._server = LocalServer(Handler)
        self.address = f"127.0.0.1:{self._server.port}"

    def close(self) -> None:
        self._server.close()
