"""`ltx-ray report --serve` and `--presign`: what is served, to whom, and links that need no credentials."""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.request
from contextlib import contextmanager

import pytest

from ltx_ray.cli.app import main
from ltx_ray.cli.serve import report_server
from ltx_ray.dataset import report
from ltx_ray.dataset.layout import thumb_path
from ltx_ray.dataset.report import write_report
from ltx_ray.storage.store import Store
from tests.support.damaged_dataset import ITEMS, boxes, build, clip_of


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path) -> Store:
    store = Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("bucket"))
    build(store)
    store.write_bytes(thumb_path(ITEMS[0]), b"a picture")
    return store


@contextmanager
def served(store: Store):
    with report_server(store, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def test_it_serves_the_page_its_clips_and_their_pictures(store):
    write_report(store.uri)
    with served(store) as port:
        status, headers, body = ask(port, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert body == store.read_bytes("report.html")
        status, headers, body = ask(port, f"/{clip_of(0)}")
        assert (status, headers["Content-Type"], body) == (200, "video/mp4", boxes(ITEMS[0]))
        assert ask(port, f"/{thumb_path(ITEMS[0])}")[2] == b"a picture"
        status, headers, body = ask(port, f"/{clip_of(0)}", method="HEAD")
        assert (status, int(headers["Content-Length"]), body) == (200, len(boxes(ITEMS[0])), b"")


@pytest.mark.parametrize(
    "asked, begin, end",
    [("bytes=0-9", 0, 10), ("bytes=5-", 5, None), ("bytes=-7", -7, None), ("bytes=3-999999", 3, None)],
)
def test_a_player_may_ask_for_a_part(store, asked, begin, end):
    with served(store) as port:
        status, headers, body = ask(port, f"/{clip_of(0)}", Range=asked)
        data = boxes(ITEMS[0])
        assert (status, body) == (206, data[begin:end])
        first = begin % len(data)
        assert headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(data)}"


def test_a_part_behind_the_end_is_refused_and_another_unit_is_passed_over(store):
    with served(store) as port:
        assert ask(port, f"/{clip_of(0)}", Range="bytes=99999-")[0] == 416
        assert ask(port, f"/{clip_of(0)}", Range="lines=1-2")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/run.json", "/dataset.json", "/index/", "/clips/../run.json", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
     "/clips/0a/nothing.mp4", f"/clips/ff/{'f' * 32}.mp4", "/state/lease.json"],
)  # fmt: skip
def test_nothing_else_is_served(store, path):
    store.write_bytes("run.json", b"{}")
    with served(store) as port:
        assert ask(port, path)[0] == 404


def test_a_page_elsewhere_cannot_ask_by_another_name(store):
    with served(store) as port:
        assert ask(port, f"/{clip_of(0)}", Host="evil.example:80")[0] == 403
        assert ask(port, f"/{clip_of(0)}", Host=f"localhost:{port}")[0] == 200


def refused(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *arguments])
    err = capfd.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in err
    return err


def test_what_is_refused(tmp_path, capfd):
    out = build(Store(str(tmp_path / "out"))).uri
    assert "is a local folder" in refused(capfd, out, "--presign", "1")
    assert "--presign: 200, legal: hours" in refused(capfd, out, "--presign", "200")
    assert "--serve: 99999, cannot be opened" in refused(capfd, out, "--serve", "99999")
    with served(Store(out)) as port:
        assert f"--serve: {port}, cannot be opened" in refused(capfd, out, "--serve", str(port))
    assert "legal: without it" in refused(capfd, out, "--serve", "0", "--against", out)
    assert "no dataset" in refused(capfd, out, "--against", str(tmp_path / "nothing"))


@pytest.mark.slow
def test_signed_links_of_cards_need_no_credentials(bucket, capfd):
    store = build(Store(bucket))
    with pytest.raises(SystemExit) as caught:
        main(["report", bucket, "--presign", "2"])
    assert caught.value.code == 0
    link = re.search(r"for 2 hours: (\S+)", capfd.readouterr().out)[1]
    page = urllib.request.urlopen(link).read().decode()
    links = [found.replace("&amp;", "&") for found in re.findall(r'<h3><a href="([^"]+)"', page)]
    assert {urllib.request.urlopen(link).read() for link in links} == set(map(boxes, ITEMS))
    assert all("X-Amz-Expires=7200" in link for link in links)
    origin = links[0].split(f"/{bucket.removeprefix('s3://')}")[0]
    assert f"media-src 'self' file: {origin};" in page
    assert store.exists("report.html")
    with pytest.raises(SystemExit):
        main(["report", bucket, "--presign", "1"])
    assert "for 1 hour: http" in capfd.readouterr().out


@pytest.mark.slow
def test_signed_links_of_a_list_are_whole_when_they_are_put_together(bucket):
    store = build(Store(bucket))
    store.write_bytes(thumb_path(ITEMS[0]), b"a picture")
    write_report(bucket, cards=0, signed_seconds=600)
    page = store.read_bytes("report.html").decode()
    listed = json.loads(re.search(r'id="listed">(.*?)</script>', page, re.S)[1])
    signed = listed["signed"]
    for n, item in enumerate(listed["item"]):
        clip = f"{signed['base']}clips/{item[:2]}/{item}.mp4{signed['query']}{signed['clips'][n]}"
        assert urllib.request.urlopen(clip).read() == boxes(item)
        assert len(signed["clips"][n]) < 100 < len(signed["query"])
    n = listed["item"].index(ITEMS[0])
    thumb = f"{signed['base']}{thumb_path(ITEMS[0])}{signed['query']}{signed['thumbs'][n]}"
    assert urllib.request.urlopen(thumb).read() == b"a picture"
    assert re.search(r"img-src 'self' file: data: http://127\.0\.0\.1:\d+;", page)


def test_a_list_with_signed_links_is_shorter(monkeypatch, tmp_path):
    asked: list[int] = []

    def stop(store, max_listed):
        asked.append(max_listed)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "read_report_data", stop)
    monkeypatch.setattr(report, "sign_links", lambda store, paths, seconds: None)
    with pytest.raises(KeyboardInterrupt):
        write_report(str(tmp_path), signed_seconds=60)
    assert asked == [report.MAX_SIGNED]
