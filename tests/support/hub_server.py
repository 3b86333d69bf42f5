"""A server with as much of the Hugging Face Hub as huggingface_hub needs to list and read a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.http_server import Answers, LocalServer

REPO, COMMIT, OTHER_COMMIT = "org/repo", "c0ffee" * 6 + "c0ff", "5eed" * 10
#: From how many bytes a file is kept in the store for large ones, to which the Hub refers.
LARGE = 1000
#: Entries of one page of a listing.
_PAGE = 10


class HubServer:
    """Serves `folder` as the repository REPO at `url`, in COMMIT, of which `main` and `v/1` are other names.

    `requests` are those that came, as (method, path). Their kind is the first word of the path after the repository:
    api, tree, resolve, or store for large files. Of requests of a kind, the next ones meet `faults[kind]`, each the
    status of an answer, "cut" for an answer that ends in the middle, "expired" for addresses in the store that are not
    valid any more, or "whole" for one that overlooks the range.
    """

    def __init__(self, folder: Path):
        self.folder, self.requests = folder, []
        self.faults: dict[str, list[int | str]] = {}
        #: Repositories that only `token` may read, and the tokens that came with requests by kind.
        self.token, self.tokens = None, {"api": set(), "tree": set(), "resolve": set(), "store": set()}
        #: Digests that the Hub shows instead of those of its files.
        self.digests: dict[str, str] = {}
        self._signatures, self._valid = itertools.count(), -1
        hub, lock = self, threading.Lock()

        class Handler(Answers):
            def serve(self) -> None:
                url = urlsplit(self.path)
                path, query = unquote(url.path).strip("/"), parse_qs(url.query)
                kind = self._kind(path)
                authorization = self.headers.get("authorization")
                with lock:
                    hub.requests.append((self.command, path))
                    hub.tokens[kind].add(authorization and authorization.removeprefix("Bearer "))
                    fault = next(iter(hub.faults.get(kind, [])), None)
                    if fault is not None:
                        hub.faults[kind].pop(0)
                    if fault == "expired":
                        hub._valid = next(hub._signatures)
                if isinstance(fault, int):
                    return self.answer(fault)
                if kind != "store" and hub.token is not None and authorization != f"Bearer {hub.token}":
                    return self.answer(401, headers={"X-Error-Code": "GatedRepo"})
                getattr(self, f"_{kind}")(path, query, fault)

            do_GET = do_HEAD = serve

            @staticmethod
            def _kind(path: str) -> str:
                if path.startswith("api/"):
                    return "tree" if "/tree/" in path else "api"
                return "store" if path.startswith("store/") else "resolve"

            def _missing(self, what: str) -> None:
                self.answer(404, headers={"X-Error-Code": f"{what}NotFound"})

            def _api(self, path: str, query: dict[str, list[str]], fault: object) -> None:
                found = re.fullmatch(rf"api/models/{REPO}(?:/revision/(.*))?", path)
                if found is None:
                    return self._missing("Repo")
                if found[1] not in (None, "main", "v/1", COMMIT):
                    return self._missing("Revision")
                siblings = [] if query.get("expand") == ["sha"] else [{"rfilename": "x"}] * 1000
                self._json({"id": REPO, "sha": COMMIT, "siblings": siblings})

            def _tree(self, path: str, query: dict[str, list[str]], fault: object) -> None:
                below = path.removeprefix(f"api/models/{REPO}/tree/{COMMIT}").strip("/")
                folder = hub.folder / below
                if not folder.is_dir():
                    return self._missing("Entry")
                assert query["recursive"] == ["true"], query
                entries = [hub._entry(file) for file in sorted(folder.rglob("*"))]
                start = int(query.get("cursor", ["0"])[0])
                more = start + _PAGE < len(entries)
                link = f'<{hub.url}/{path}?recursive=true&cursor={start + _PAGE}>; rel="next"'
                self._json(entries[start : start + _PAGE], {"Link": link} if more else {})

            def _resolve(self, path: str, query: dict[str, list[str]], fault: object) -> None:
                name = path.removeprefix(f"{REPO}/resolve/{COMMIT}/")
                file = hub.folder / name
                if name == path or not file.is_file():
                    return self._missing("Entry")
                content, digest = file.read_bytes(), hub._digest(file)
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}
                if len(content) < LARGE:
                    return self.answer(200, content, headers)  # as a small file comes: whole
                with lock:
                    place = f"/store/{name}?signature={next(hub._signatures)}"
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
                self.answer(302, headers={**headers, **linked, "Location": hub.store_url + place})

            def _store(self, path: str, query: dict[str, list[str]], fault: object) -> None:
                if int(query["signature"][0]) <= hub._valid:
                    return self.answer(403)
                content = (hub.folder / path.removeprefix("store/")).read_bytes()
                first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
                part = content if fault == "whole" else content[first : last + 1]
                self.answer(200 if fault == "whole" else 206, part, cut=fault == "cut")

            def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
                self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

        self._server = LocalServer(Handler)
        port = self._server.port
        # Two names of this machine, so that the store is another host than the Hub.
        self.url, self.store_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def counts(self) -> Counter[str]:
        """How many requests came, by what they asked for."""
        patterns = {
            "listings": f"api/models/{REPO}/tree/",
            "commits": "api/models/",
            "ranges": "store/",
            "look-ups": f"{REPO}/resolve/",
        }
        found = (
            next((what for what, start in patterns.items() if path.startswith(start)), "") for _, path in self.requests
        )
        return Counter(filter(None, found))

    def _digest(self, file: Path) -> str:
        name, content = str(file.relative_to(self.folder)), file.read_bytes()
        kind = hashlib.sha256 if len(content) >= LARGE else hashlib.sha1
        return self.digests.get(name, kind(content).hexdigest())

    def _entry(self, file: Path) -> dict[str, object]:
        name, digest = str(file.relative_to(self.folder)), "0" * 40
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": digest, "size": 0}
        size = file.stat().st_size
        if size < LARGE:
            return {"type": "file", "path": name, "oid": self._digest(file), "size": size}
        lfs = {"oid": self._digest(file), "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "oid": digest, "size": size, "lfs": lfs}

    def close(self) -> None:
        self._server.close()
