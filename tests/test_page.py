"""report.html, the morning page: what it shows, what it leaves out, and that nothing on it runs or asks for anything.

uv run pytest tests/test_page.py
uv run pytest -n 0 -m slow tests/test_page.py    # in a browser: needs Debian's chromium
"""

import dataclasses
import html
import html.parser
import json
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from conftest import ended, hear, wait_for

import loop
from harness import morning, page
from harness.files import is_locked
from harness.ledger import Row
from harness.live_page import LivePage
from harness.report import compute
from harness.store import Run, Store
from harness.verdict import explain, read_beliefs

CLOSING = "</style></title></pre></svg>]]>-->"
EVIL = f"<script>alert(1)</script>{CLOSING}<img src=x onerror=alert(1)> \0\x1b[31m\u202e & {{{{ 7*7 }}}}"
LOUD = '"><script>alert(2)</script>'
BRIGHTNESS = "(colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
STYLE = ("(style => ", ")(getComputedStyle(document.body))")  # around an expression
PARTS = ("description", "diff", "log", "sample", "audit", "wait", "mark")


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, attributes, scripts and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        is_script = bool(self.tags) and self.tags[-1] == "script"
        (self.scripts if is_script else self.words).append(data)


def add_runs(store: Store, scores: list[float], text: str = "", details: int = 30) -> None:
    """Rows with their run folders; every second one is kept; every text has its part's name and `text` in it."""
    said = {part: f"{part} {text}" for part in PARTS}
    for number, score in enumerate(scores, 1):
        folder = store.folder(store.new_folder())
        status = "keep" if number % 2 else "discard"
        if number <= details:
            lines = [f"step {step} | {step:.1f}% | loss {9 - step / 20} |" for step in range(1, 101)]
            head = f"batch 524,288 tokens = {text}"
            (folder / "run.log").write_text("\n".join([head, *lines, said["log"]]))
            (folder / "change.diff").write_text(f"-old {number}\n+new {said['diff']}\n")
        run = Run(
            number, f"{number:040x}"[::-1], "", 42, said["description"], "experiment", decision=status, score=score,
            summary={"sample": said["sample"]}, marks=(said["mark"],),
        )  # fmt: skip
        store.write_run(run)
        record = {loop.METRIC: score}
        (folder / "result.json").write_text(json.dumps(record))
        store.rows.append(Row(run.commit[:7], score, 44.0, status, said["description"]))
    (store.home / "audit.txt").write_text(said["audit"])
    store.note("waiting", 1, said["wait"])


def compose(store: Store, is_live: bool = False) -> str:
    findings = compute(store, store.rows, store.ledger, loop.DOMAIN)
    return morning.compose(store, findings, loop.DOMAIN, is_live, page.read_template())


def test_page_shows_what_agents_wrote_as_text_and_asks_for_nothing(store):
    add_runs(store, [1.0, 1.1, 0.9, 0.95], f"{EVIL}{LOUD}")
    text = compose(store)
    read = Reader(text)
    assert len(read.scripts) == 1
    assert not {"img", "iframe", "object", "embed", "base", "form", "a"} & set(read.tags)
    asked = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(value.startswith(("#", "data:")) for value in asked), asked
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert not set(text) & set("\0\x1b\u202e")
    shown = "".join(read.words)
    assert "[31m" not in shown
    assert "gain 0.100000 bpb (10.00%). 1 change was kept" in shown
    for part in PARTS:
        assert f"{part} <script>alert(1)</script>" in shown, part
    assert "49" not in text.split("7*7")[1][:20]
    policy = next(value for name, value in read.attributes if value and value.startswith("default-src 'none'"))
    assert page.digest(read.scripts[0]) in policy


def test_page_of_a_night_of_huge_texts_stays_small_and_says_what_it_cut(store):
    add_runs(store, [1.0 - n / 1000 for n in range(40)], ("<&\"'" * 200 + "\n") * 100, details=40)
    text = compose(store)
    assert len(text.encode()) < 3e6
    assert "more characters)" in text
    assert text.count("<details") == 41  # each row, and the marks


def test_page_reloads_itself_only_while_a_loop_runs(store):
    add_runs(store, [1.0])
    refresh = ("http-equiv", "refresh")
    assert refresh in Reader(compose(store, is_live=True)).attributes
    assert refresh not in Reader(compose(store)).attributes
    with morning.page_lock(store):
        assert is_locked(store.home / "page.lock")  # one writer at a time


def test_commit_that_is_gone_costs_the_page_only_its_diff(store):
    add_runs(store, [1.0, 1.1, 0.9])
    store.attempts = {1: store.repository.head()}  # the champion has no ref
    assert "Best val_bpb 0.900000" in compose(store)


def test_page_without_curves_samples_audit_or_runs_says_what_is_unknown(store):
    store.rows.append(Row("a", 1.0, 1.0, "keep", "baseline"))
    text = compose(store)
    assert "unknown" in text
    assert "uv run loop.py audit" in text
    assert "<h2>Loss curves" not in text
    assert "<h2>What the models wrote" not in text
    domain = dataclasses.replace(loop.DOMAIN, curve_pattern="", batch_pattern="", sample="", lower_is_better=False)
    findings = compute(None, store.rows, store.ledger, domain)
    assert "<script>" not in morning.compose(None, findings, domain, False, page.read_template())


def test_rows_of_a_commit_stand_beside_their_own_runs(store):
    """A row is a run that was decided, and no audit's. Its change is the one that decides, as in its verdict."""
    commit = "a" * 40
    runs = [("baseline", "keep", 1.0), ("audit", "audit", 2.0), ("repeat", "", 3.0), ("repeat", "keep", 1.1)]
    runs += [("experiment", "crash", 0.0), ("experiment", "discard", 1.3)]
    for number, (purpose, decision, score) in enumerate(runs, 1):
        store.folder(store.new_folder())
        name = commit if number < 5 else "b" * 40
        base = commit if purpose == "experiment" else ""
        facts = {"decision": decision, "score": score, "busy_others": 0.0}
        store.write_run(Run(number, name, base, number, "x", purpose, **facts))
        if decision in ("keep", "discard", "crash"):
            store.rows.append(Row(name[:7], score, 1.0, decision, "x"))
    entries = morning.find_entries(store, store.rows)
    assert [entry.run.number for entry in entries] == [1, 4, 5, 6]
    assert morning.first_run(entries, "bbbbbbb").number == 6
    beliefs = read_beliefs(store)
    told = [morning.row_values(entry, {}, beliefs, 0) for entry in entries]
    assert [row["change"] for row in told] == ["", "", "", "+0.250000"]  # the base is 1.05, of two runs
    assert told[2]["score"] == ""
    assert any(line.startswith("change that decides +0.250000, ") for line in explain(store, entries[3].run))
    store.write_run(dataclasses.replace(entries[3].run, busy_others=0.4))
    told = morning.machine_values(store, morning.find_entries(store, store.rows))
    assert [bar["is_much"] for bar in told["busy"]] == [False, False, False, True]
    assert "in 1 of 4 runs" in told["machine"]


@pytest.mark.parametrize("better", [-1, +1])
def test_page_of_a_long_night_shows_the_newest_the_nearest_misses_and_the_largest_gains(monkeypatch, better):
    for name, most in (("NEWEST_ROWS", 2), ("NEAR_MISSES", 1), ("MOST_KEPT", 2)):
        monkeypatch.setattr(morning, name, most)
    domain = dataclasses.replace(loop.DOMAIN, lower_is_better=better < 0)
    gains = [0.0, -0.3, 0.1, -0.1, 0.5, -0.2, 0.5001, -0.4, -0.6]  # on the baseline; of those below 0 nothing is kept
    rows = []
    for number, gain in enumerate(gains):
        rows.append(Row(f"{number:07x}", 5 + better * gain, 1.0, "discard" if gain < 0 else "keep", f"idea {number}"))
    findings = compute(None, rows, Path("results.tsv"), domain)
    entries = morning.find_entries(None, rows)
    chosen = morning.choose_entries(entries, findings, domain)
    assert [entry.index for entry in chosen] == [8, 7, 4, 3, 2, 0]
    assert "of what was kept the 2 largest gains" in morning.rows_values(None, entries, chosen, domain)["rows_left_out"]
    told = morning.kept_values(findings, domain)
    assert [cells[2:4] for cells in told["kept"]] == [["", ""], ["0.100000", "resolved"], ["0.400000", "resolved"]]
    assert told["kept_left_out"].startswith("1 smaller gains are left out")
    monkeypatch.setattr(morning, "MOST_KEPT", 9)
    assert morning.kept_values(findings, domain)["kept"][-1][2:4] == ["0.000100", "within noise"]


@pytest.mark.slow
def test_page_is_rewritten_while_a_loop_runs_and_at_its_end_reloads_no_more(desk):
    """Here after every row. While it cannot be written the loop goes on, and says so once."""
    desk.set_constant("harness/live_page.py", "PAGE_SECONDS", "0  # at once")
    desk.set_constant("harness/live_page.py", "REST", "0  # none")
    desk.commit("a restless page")
    path = desk.path / "report.html"
    path.mkdir()
    agent = desk.agent(
        """
        n = count()
        knob("DEPTH", 4 + n)
        say(f"idea {n} <script>")
        while n > 1 and not (OUTSIDE / f"go{n}").exists():
            time.sleep(0.02)
        """
    )
    process = desk.popen("--agent-cmd", agent, "--tag", "t", "--max-experiments", "3")
    assert "Is a directory" in hear(process, "warning: report.html is not rewritten: ")
    path.rmdir()
    (desk.outside / "go2").touch()
    wait_for(lambda: path.exists() and "idea 1 &lt;script&gt;" in path.read_text())
    assert '<meta http-equiv="refresh"' in path.read_text()
    (desk.outside / "go3").touch()
    err = ended(process).stderr
    assert "warning" not in err
    assert desk.loop("status").stdout.startswith("autoresearch/t: no loop is running")  # the writer has no lock
    wait_for(lambda: "idea 3 &lt;script&gt;" in path.read_text() and 'http-equiv="refresh"' not in path.read_text())
    assert (desk.path / "progress.png").exists()
    assert desk.git("status", "--porcelain") == ""
    printed = desk.loop("audit", "--replicates", "1").stdout
    wait_for(lambda: printed.strip() in html.unescape(path.read_text()))


def test_page_is_rewritten_where_rows_came_a_minute_passed_and_no_run_is_disturbed(store, monkeypatch):
    live_page = LivePage(store)
    begun = []
    monkeypatch.setattr(live_page, "_begin", lambda is_live: begun.append(is_live))
    store.rows.append(Row("a", 1.0, 1.0, "keep", "baseline"))
    live_page.keep_fresh(is_quiet=True)
    assert begun == []  # it was begun just now
    live_page._began -= 61
    live_page.keep_fresh(is_quiet=False)
    assert begun == []
    live_page.keep_fresh(is_quiet=True)
    assert begun == [True]
    live_page._rows = 1
    live_page.keep_fresh(is_quiet=True)
    assert begun == [True]  # no row came


def test_small_texts_stay_whole_where_large_ones_are_cut():
    assert page.fair_limit([10, 20, 1000], 130) == 100
    assert page.fair_limit([10, 20], 130) == 130
    assert page.cut_to("one\ntwo\nthree", 8) == "one\ntwo\n… 1 more lines"
    assert page.cut_to("one\ntwo\nthree", 8, keep_end=True) == "… 2 more lines\nthree"
    assert page.cut_to("1\n2\n3\n4", 4, keep_end=True) == "… 2 more lines\n3\n4"
    assert page.cut_to("<" * 10, 30) == "… 1 more lines"


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no chromium: apt-get install chromium")
def test_page_in_a_browser_asks_for_nothing_and_fits_a_phone_and_the_dark(store, tmp_path):
    add_runs(store, [1.0, 1.1, 0.9, 0.95, 0.8, 0.85], f"{EVIL}{LOUD} {'long' * 90}")
    path = tmp_path / "report.html"
    path.write_text(compose(store))
    browser = Browser(tmp_path / "profile")
    try:
        for width, scheme in ((1200, "light"), (390, "light"), (390, "dark")):
            browser.show_as(width, scheme)
            browser.open(path)
            assert browser.look("document.documentElement.scrollWidth") <= width
            ink, paper = browser.look(f"[{BRIGHTNESS}(style.color), {BRIGHTNESS}(style.backgroundColor)]".join(STYLE))
            in_picture = browser.look(f"{BRIGHTNESS}(getComputedStyle(document.querySelector('svg text')).fill)")
            assert (ink > 500 > 200 > paper) if scheme == "dark" else (ink < 200 < 700 < paper)
            assert in_picture == ink
            browser.take_picture(tmp_path / f"{width}-{scheme}.png")
        assert browser.look("document.querySelectorAll('script').length") == 1
        assert browser.look("choice.options.length") == 5
        assert browser.look("document.querySelector('.chosen').getAttribute('points')") == ""
        browser.look("choice.selectedIndex = 1; choice.dispatchEvent(new Event('change'))")
        drawn = browser.look("[...parts].map(line => line.getBBox().width)")
        assert len(drawn) == 2
        assert min(drawn) > 100
        is_unfolded = "document.querySelector('details.run pre').checkVisibility()"
        assert not browser.look(is_unfolded)
        browser.look("document.querySelector('details.run summary').click()")
        wait_for(lambda: browser.look(is_unfolded))
        assert browser.complaints == []
        assert set(browser.requests) == {path.as_uri()}
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(path)
        assert browser.look("document.getElementById('chooser').offsetHeight") == 0
    finally:
        browser.close()
