"""The report of a large dataset in a browser: it opens quickly, scrolls smoothly, filters, and runs no prompt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image

from ltx_ray.cli.serve import report_server
from ltx_ray.dataset.report import write_report
from ltx_ray.storage.store import Store
from tests.support import report_data as data
from tests.support.browser import CHROMIUM, Browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
ROWS = 100_000
#: The row whose clip there is, and one that has none.
PLAYED, MISSING = 70007, 70008
#: Marks in the page's window that a prompt would leave if it were run.
HOSTILE = [
    "</script><script>window.ran = 1</script>", "<img src=x onerror='window.ran = 2'>", "<!--<script>window.ran = 3",
    "\u2028window.ran = 4;\u2029", '"); window.ran = 5; ("', "{{clips}} </textarea></title><svg onload='window.ran=6'>",
]  # fmt: skip


def rows() -> list[dict]:
    made = []
    for n in range(ROWS):
        item_id = f"{n:08x}" * 4
        prompt = HOSTILE[n] if n < len(HOSTILE) else f"A lighthouse number {n} at dusk, waves break below. " * 4
        flags = ["silent", "<b>flag</b>"] if n < len(HOSTILE) else ["frozen"] if n % 1000 == 0 else []
        size = (96, 128) if n % 1000 == 500 else (64, 64)
        made.append(
            data.index_row(n, *size, item_id=item_id, clip=f"clips/{item_id[:2]}/{item_id}.mp4", prompt=prompt,
                           flags=flags, text_seconds=float(n), loudness_lufs=-20.04 if n == PLAYED else None)
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    made = rows()
    data.write_parts(folder, "index", made, size=10_000)
    data.write_run(folder, rows=ROWS, rendered=ROWS)
    data.write_events(folder, data.run_events(4000))
    for row in made[:8]:
        path = folder / "thumbs" / row["item_id"][:2] / f"{row['item_id']}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (720, 270), (200, 100, 50)).save(path, "WEBP")
    data.write_mp4(folder / made[PLAYED]["clip"], 64, 64, 9)
    data.write_parts(folder, "failed", [data.failed_row(n, message=f"rank {n} died") for n in range(5000)], size=1000)
    write_report(str(folder))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(browser, out) -> Browser:
    browser.console.clear()
    browser.open(out / "report.html")
    return browser


HEIGHT = "document.querySelector('.list').offsetHeight"
SHOWN = """[...document.querySelectorAll('.line')].sort((a, b) => a.offsetTop - b.offsetTop)
    .map(line => line.querySelector('h3').textContent)"""
#: Scrolls by a part of the page, and gives the number of rows that the page then has.
SCROLL = """(async () => {
    scrollTo({ top: document.documentElement.scrollHeight * %f, behavior: 'instant' });
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    return document.querySelectorAll('.line').length;
})()"""


def choose(page: Browser, name: str, value: str) -> tuple[str, list[str]]:
    """Set a control; gives what the page says of it, and the ids of the rows at the top."""
    control = "input" if name == "words" else f"[name={name}]"
    kind = "input" if name == "words" else "change"
    page.evaluate(f"""(() => {{
        const control = document.querySelector('.controls {control}');
        control.value = {value!r};
        control.dispatchEvent(new Event('{kind}'));
        scrollTo({{ top: 0, behavior: 'instant' }});
    }})()""")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("document.querySelector('output').textContent"), page.evaluate(SHOWN)


def test_it_opens_quickly_and_holds_few_rows(page):
    assert 0 < page.cpu_seconds() < 2, "a page that is opened has a process of its own"
    assert page.evaluate("document.querySelectorAll('.line').length") < 100
    assert page.evaluate("document.querySelector('.list').offsetHeight") == ROWS * 144
    assert page.evaluate("document.querySelectorAll('#timeline svg').length") > 0


def test_scrolling_makes_no_long_task_and_few_elements(page):
    rows, seconds = [], []
    for step in range(51):
        before = page.cpu_seconds()
        rows.append(page.evaluate(SCROLL % (step / 50)))
        seconds.append(page.cpu_seconds() - before)
    assert 5 < max(rows) <= 500 and 0 < max(seconds) < 0.2
    assert page.evaluate(SHOWN)[-1] == f"clip-{ROWS - 1}"


def test_it_filters_and_sorts(page):
    words, shown = choose(page, "words", "NUMBER 70007 lighthouse")
    assert (words, shown) == (f"1 of {ROWS} shown", ["clip-70007"])
    words, shown = choose(page, "words", "")
    assert words == "" and shown[0] == "clip-0000"
    words, shown = choose(page, "flag", "=frozen")
    assert words == f"99 of {ROWS} shown" and shown[:2] == ["clip-1000", "clip-2000"]
    words, shown = choose(page, "sort", "work")
    assert shown[:2] == ["clip-99000", "clip-98000"]
    words, shown = choose(page, "flag", "")
    assert words == "" and shown[0] == f"clip-{ROWS - 1}"
    _, shown = choose(page, "sort", "done")
    assert shown[0] == f"clip-{ROWS - 1}"
    choose(page, "sort", "size")
    assert page.evaluate(SHOWN)[:2] == ["clip-0500", "clip-1500"]
    words, shown = choose(page, "size", "96x128")
    assert words == f"100 of {ROWS} shown" and shown[0] == "clip-0500"
    assert choose(page, "flag", "=frozen")[0] == f"0 of {ROWS} shown"
    choose(page, "flag", "")
    assert choose(page, "size", "")[0] == ""
    assert choose(page, "words", "no such word") == (f"0 of {ROWS} shown", [])


def test_it_shows_what_was_measured_and_sorts_by_it(page):
    """Clips of which it is not known come last."""
    assert choose(page, "sort", "+motion")[1][:2] == ["clip-0000", "clip-0004"]
    assert choose(page, "sort", "-motion")[1][:2] == ["clip-0003", "clip-0007"]
    for way in "+-":
        assert choose(page, "sort", f"{way}loudness_lufs")[1][:2] == [f"clip-{PLAYED}", "clip-0000"]
    measures = page.evaluate("[...document.querySelectorAll('.measures')].map(line => line.textContent)")
    assert {"loudness -20.0 LUFS · motion 0.250", "motion 0.100"} <= set(measures)
    options = page.evaluate("[...document.querySelectorAll('[name=sort] optgroup option')].map(o => [o.value, o.text])")
    assert options == [
        ["+loudness_lufs", "loudness, least first"], ["-loudness_lufs", "loudness, most first"],
        ["+motion", "motion, least first"], ["-motion", "motion, most first"],
    ]  # fmt: skip
    choose(page, "status", "-")
    assert page.evaluate("document.querySelectorAll('.measures').length") == 0, "they have failed"


def test_it_filters_by_status(page):
    words, shown = choose(page, "status", "-")
    assert words == "" and shown[:2] == ["bad-000", "bad-001"]
    assert page.evaluate("document.querySelectorAll('.line a, .line img').length") == 0, "they have no clip"
    assert page.evaluate("document.querySelector('.line .badge.bad').textContent") == "stage 2: infrastructure"
    assert page.evaluate("document.querySelector('.line .why').textContent") == "rank 0 died"
    assert choose(page, "words", "rank 4711 died") == ("1 of 5000 shown", ["bad-4711"])
    choose(page, "words", "")
    assert choose(page, "status", "-0")[1][0] == "bad-000"
    assert choose(page, "sort", "id")[0] == ""
    words, shown = choose(page, "status", "")
    assert words == "" and shown[0] == "bad-000" and page.evaluate(HEIGHT) == (ROWS + 5000) * 144
    choose(page, "status", "+")
    assert page.evaluate(SHOWN)[0] == "clip-0000" and page.evaluate(HEIGHT) == ROWS * 144


def test_it_filters_by_time(page):
    """A clip was finished every three seconds."""
    words, shown = choose(page, "time", "3600")
    assert words == f"1201 of {ROWS} shown" and shown[:3] == [
        "clip-99000",
        f"clip-{ROWS - 1201}",
        f"clip-{ROWS - 1200}",
    ]


def test_cards_are_filtered_by_status_and_time(browser, tmp_path):
    data.write_parts(tmp_path, "index", [data.index_row(n, id=f"clip-{n}", clip=None) for n in (0, 1, 5000)])
    data.write_parts(
        tmp_path, "failed", [data.failed_row(0), data.failed_row(1, stage="plan", item_id=None, error_class="row")]
    )
    write_report(str(tmp_path))
    browser.open(tmp_path / "report.html")
    cards = """[...document.querySelectorAll('.clips > article')].filter(card => card.offsetHeight)
        .map(card => card.dataset.id)"""
    assert browser.evaluate(cards) == ["clip-0", "clip-1", "clip-5000"]
    chosen = {}
    for value in ("-", "-0", "-1", "", "+"):
        choose(browser, "status", value)
        chosen[value] = browser.evaluate(cards)
    assert chosen["-"] == ["bad-000", "bad-001"] and sorted([*chosen["-0"], *chosen["-1"]]) == chosen["-"]
    assert chosen[""] == [*chosen["+"], *chosen["-"]] and len(chosen["-0"]) == 1
    assert choose(browser, "time", "3600")[0] == "1 of 3 shown" and browser.evaluate(cards) == ["clip-5000"]


#: Says what the player does, half a minute later at most, and closes it.
PLAYER = """(async () => {
    const player = document.querySelector('dialog.player'), video = player.querySelector('video');
    const note = () => player.querySelector('p').textContent;
    for (let n = 0; n < 300 && !video.currentTime && !note(); n++) await new Promise(done => setTimeout(done, 100));
    const title = player.querySelector('h3').textContent;
    const found = [player.open, title, video.videoWidth, video.currentTime > 0, note()];
    player.close();
    await new Promise(done => setTimeout(done, 100));
    return [...found, video.hasAttribute('src'), /(report.html|\\/)$/.test(location.pathname)];
})()"""


def played(page: Browser, number: int) -> list:
    choose(page, "words", f"NUMBER {number} lighthouse")
    page.click(".line .thumb")
    return page.evaluate(PLAYER)


def test_a_click_plays_the_clip_from_the_disk(page):
    assert played(page, PLAYED) == [True, f"clip-{PLAYED}", 64, True, "", False, True]
    title, width, plays, note = played(page, MISSING)[1:5]
    assert (title, width, plays) == (f"clip-{MISSING}", 0, False) and "cannot be played here" in note


def test_a_click_plays_the_clip_from_the_server(browser, out):
    with report_server(Store(str(out)), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open_url(f"http://127.0.0.1:{server.server_port}/")
        assert played(browser, PLAYED) == [True, f"clip-{PLAYED}", 64, True, "", False, True]
        server.shutdown()


def test_a_click_with_ctrl_opens_the_file(page):
    choose(page, "words", f"NUMBER {PLAYED} lighthouse")
    assert not page.evaluate("""(() => {
        const event = new MouseEvent('click', { bubbles: true, cancelable: true, ctrlKey: true });
        document.addEventListener('click', stop => stop.preventDefault(), { once: true });
        document.querySelector('.line .thumb').dispatchEvent(event);
        return !!document.querySelector('dialog.player');
    })()""")


def test_failures_are_one_group_with_a_command(page):
    assert page.evaluate("document.querySelectorAll('details.cause').length") == 1
    assert "5,000" in page.evaluate("document.querySelector('details.cause summary').textContent")
    assert "ltx-ray render" in page.evaluate("document.querySelector('details.cause code').textContent")


def test_no_prompt_is_run(page):
    choose(page, "flag", "*")
    prompts = page.evaluate("[...document.querySelectorAll('.line .prompt')].map(line => line.textContent)")
    assert set(HOSTILE) <= set(prompts), "they are shown as they are"
    assert page.evaluate("typeof window.ran") == "undefined"
    assert page.evaluate("document.querySelectorAll('.line svg, .line script, .line b').length") == 0
    assert not [line for line in page.console if "exception" in line.lower() or "Content Security" in line]


def test_pictures_and_clips_are_beside_the_page(page, out):
    wait = "new Promise(done => setTimeout(done, 500))"
    page.evaluate(wait)
    pictures = page.evaluate(
        "[...document.querySelectorAll('.line img')].map(i => [i.getAttribute('src'), i.naturalWidth])"
    )
    shown = {source: width for source, width in pictures if width}
    assert len(shown) >= 6 and set(shown.values()) == {720}
    assert all((out / source).is_file() for source in shown)
    links = page.evaluate("[...document.querySelectorAll('.line h3 a')].map(a => a.getAttribute('href'))")
    assert f"clips/00/{'0' * 32}.mp4" in links


def test_the_page_may_load_from_nowhere_else(page):
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("Content Security Policy" in line for line in page.console)
