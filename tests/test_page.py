"""harness/page.py: progress.png and report.html: what they show, what they leave out, and that nothing runs there.

uv run pytest tests/test_page.py
"""

import dataclasses
import html.parser
import os
import sys
from pathlib import Path

import pytest
from conftest import wait_for
from matplotlib.text import Text
from reading_fixtures import (
    BASELINE,
    DOMAIN,
    SLOWER,
    WIDER,
    StandInTag,
    live_status,
    made,
    small_ledger,
)

from harness import page
from harness.ledger import Ledger, Run, parse_tsv
from harness.page import PageWriter, choose_runs, compose, draw_progress, write_page

CLOSING = "</style></title></pre></svg>]]>-->"
EVIL = f"<script>alert(1)</script>{CLOSING}<img src=x onerror=alert(1)> \0\x1b[31m\u202e & {{{{ 7*7 }}}} $x_1$"


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words += data


def night_of(tag_folder: Path, text: str = "", live: dict | None = None) -> StandInTag:
    """The small night and an audit of it, with run folders; every text of an agent or a run ends in `text`."""
    runs = [dataclasses.replace(run, description=f"{run.description} {text}") for run in small_ledger().runs]
    runs[0] = dataclasses.replace(runs[0], summary={"sample": f"sample {text}", "depth": f"4 {text}"})
    runs[4] = dataclasses.replace(runs[4], reason=f"{runs[4].reason}, reason {text}", node=f"node {text}")
    for number, (role, commit) in enumerate((("baseline", BASELINE), ("champion", WIDER)), 7):
        facts = {"purpose": "audit", "group": f"audit 1/{role}", "test_score": 1.6, "problem": f"problem {text}"}
        runs.append(made(number, commit, 1.7, "measured", f"{role} {text}", **facts))
    tag = StandInTag(tag_folder, Ledger(DOMAIN, runs), live or {})
    for run in runs:
        points = [f"step {step} | {step:.1f}% | loss {9 - step / 20} | " for step in range(1, 101)]
        (tag.folder(run.number) / "run.log").write_text("\n".join([*points, f"log {text}"]))
        (tag.folder(run.number) / "change.diff").write_text(f" same\n-old\n+new {text}\n")
    return tag


# ---- report.html ----------------------------------------------------------------------------------------------------


def test_page_tells_everything_of_a_tag(tmp_path):
    tag = night_of(tmp_path)
    write_page(tag.ledger, tmp_path / "report.html", tag)
    read = Reader((tmp_path / "report.html").read_text())
    for words in (
        "Best val_bpb 1.680000 (bbbbbbb), 0.050000 better than the baseline",
        "1 change is in the branch, 1 of them significant",
        "dollars $0.25 ($0.25 a call",
        "pace: ",
        "baseline, run 0001, val_bpb 1.720000",
        "NameError: name 'WARM' is not defined",
        "champion, run 0008 was not scored in a clean process",
        "learning: not comparable",
        "device: a CPU, profile pocket",
        "uv run loop.py",
        "loss 4.0 | \nlog",
    ):
        assert words in read.words, words
    assert read.tags.count("details") == len(tag.ledger.runs)
    assert read.tags.count("svg") == 2  # progress and the curves of baseline and champion
    assert "ins" in read.tags and "del" in read.tags


def test_page_shows_what_agents_wrote_as_text_and_asks_for_nothing(tmp_path):
    tag = night_of(tmp_path, EVIL)
    text = compose(tag.ledger, tag)
    read = Reader(text)
    assert not {"img", "iframe", "object", "embed", "base", "form", "a", "script"} & set(read.tags)
    asked = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(value.startswith(("#", "data:")) for value in asked), asked
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert not set(text) & set("\0\x1b\u202e")
    assert any(value and value.startswith("default-src 'none'") for _, value in read.attributes)
    for words in ("raise width to 384 ", "sample ", "reason ", "problem ", "new ", "log ", "depth 4 ", "node "):
        assert f"{words}<script>alert(1)</script>" in read.words, words
    assert "49" not in text.split("7*7")[1][:20]


def test_page_of_a_ledger_file_or_of_nothing_has_no_empty_parts():
    ledger, _ = parse_tsv("a 1.0 1 keep base <b>\nb 0.9 1 keep y\nc 0 0 crash z\n", DOMAIN, "pocket")
    text = compose(ledger)
    assert "base &lt;b&gt;" in text and "Training loss" not in text and "The last audit" not in text
    assert "No run yet" in compose(Ledger(DOMAIN))


def test_page_reloads_itself_only_while_a_loop_runs(tmp_path):
    refresh = ("http-equiv", "refresh")
    tag = night_of(tmp_path, live=live_status())
    assert refresh in Reader(compose(tag.ledger, tag)).attributes
    tag.live, tag.is_locked = {}, True  # it is ending
    assert refresh not in Reader(compose(tag.ledger, tag)).attributes
    tag.live, tag.is_locked = live_status(), False  # it was killed
    assert refresh not in Reader(compose(tag.ledger, tag)).attributes


def test_page_survives_what_a_run_may_leave_in_its_folder(tmp_path):
    tag = night_of(tmp_path)
    os.unlink(tag.folder(3) / "change.diff")
    os.mkfifo(tag.folder(3) / "change.diff")
    os.unlink(tag.folder(1) / "run.log")
    (tag.folder(1) / "run.log").symlink_to("/etc/passwd")
    (tag.folder(4) / "run.log").write_bytes(b"\xff\xfe\x00" * 100)
    assert "root:" not in compose(tag.ledger, tag)


def long_night(runs: int) -> Ledger:
    """A gain every tenth run, each smaller than the one before; then a repeat; every 25th run crashes."""
    night: list[Run] = []
    champion, best = "", 2.0
    for number in range(1, runs + 1):
        commit = f"{number * 2654435761 % 2**160:040x}"
        if number == 1 or number % 10 == 0:
            best -= 0.3 / number
            base, champion = champion, commit
            night.append(made(number, commit, best, "keep", f"idea {number} ☃ $x_1$", base=base))
        elif number % 10 == 1:
            night.append(made(number, champion, best + 0.001, "keep", "again", purpose="replicate"))
        elif number % 25 == 2:
            night.append(made(number, commit, None, "crash", "boom", base=champion, reason="boom"))
        else:
            score = best + 0.01 + number * 7919 % 100 / 500
            night.append(made(number, commit, score, "discard", f"idea {number}", base=champion))
    return Ledger(DOMAIN, night)


def test_page_of_a_long_night_shows_the_newest_the_kept_and_the_near_misses(monkeypatch):
    for name, most in (("NEWEST", 3), ("NEAR_MISSES", 2), ("MOST_KEPT", 2)):
        monkeypatch.setattr(page, name, most)
    ledger = long_night(50)
    misses = [run for run in ledger.runs[:-3] if run.status == "discard"]
    misses.sort(key=lambda run: run.score)
    wanted = {1, 10, 20, 48, 49, 50, *(run.number for run in misses[:2])}  # 10 and 20 are the largest gains
    assert [run.number for run in choose_runs(ledger, ledger.changes())] == sorted(wanted, reverse=True)
    read = Reader(compose(ledger))
    assert "The newest 3; of older ones what was kept and the nearest misses. 42 are left out" in read.words
    assert "The 3 smallest gains are left out" in read.words
    assert read.tags.count("details") == 8


# ---- progress.png ---------------------------------------------------------------------------------------------------


def drawn_numbers(figure) -> dict[str, object]:
    """The kept changes' numbers in the picture -> where, in pixels."""
    axes = figure.axes[0]
    figure.canvas.draw()
    numbers = [text for text in axes.texts if text.get_text().isdigit()]
    return {text.get_text(): Text.get_window_extent(text) for text in numbers}  # without its line to the point


@pytest.mark.parametrize("runs", [5, 125, 1500])
def test_numbers_in_the_picture_cover_neither_a_run_nor_one_another(runs):
    ledger = long_night(runs)
    figure = page._draw(ledger, has_table=True)
    boxes = list(drawn_numbers(figure).values())
    changes = len(ledger.changes())
    assert len(boxes) >= min(changes, page.NUMBERED) - (4 if runs > 1000 else 0)  # a few of many find no room
    axes = figure.axes[0]
    points = []
    for line in axes.lines[:-1] if axes.lines else []:
        points += list(axes.transData.transform(line.get_xydata()))
    for place, box in enumerate(boxes):
        assert not any(box.contains(*point) for point in points)
        assert not any(box.overlaps(other) for other in boxes[:place])


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_picture_and_page_of_any_ledger_are_made(tmp_path, lower_is_better):
    domain = dataclasses.replace(DOMAIN, lower_is_better=lower_is_better, assumed_sigma={})
    diverged = made(2, SLOWER, 1e9, "discard", "diverged", base=BASELINE)
    crash = made(1, BASELINE, None, "crash", "boom", purpose="baseline")
    baseline = made(1, BASELINE, 0.0, "keep", "baseline", purpose="baseline")
    for runs in ([], [crash], [baseline, diverged]):
        draw_progress(Ledger(domain, runs), tmp_path / "progress.png")
        assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
        assert compose(Ledger(domain, runs))


# ---- While a loop runs ----------------------------------------------------------------------------------------------

FAKE_REPORT = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
number = len(list(here.glob("begun*")))
(here / f"begun{number}").write_text(f"{os.nice(0)} {os.getpid()}")
while (here / "hold").exists():
    time.sleep(0.01)
if (here / "fail").exists():
    sys.exit("error: the disk is full")
(here / f"ended{number}").touch()
"""


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A PageWriter whose `loop.py report` is a script that counts its calls; a pause of nothing."""
    monkeypatch.setattr(page, "PAGE_SECONDS", 0)
    monkeypatch.setattr(page, "REST", 0)
    tag = StandInTag(tmp_path, small_ledger())
    writer = PageWriter(tag)
    assert writer._command[-3:] == ["report", "--tag", "t"] and Path(writer._command[-4]).name == "loop.py"
    writer._command[3:] = [sys.executable, "-c", FAKE_REPORT, str(tmp_path)]
    return writer


def add_run(writer) -> None:
    ledger = writer._ledger
    ledger.add(made(len(ledger.runs) + 1, SLOWER, 1.7, "discard", "more", base=WIDER))


def test_page_is_rewritten_after_a_run_by_one_child_of_the_lowest_priority(writer, tmp_path):
    writer.refresh()
    assert writer._child is None  # no run came
    (tmp_path / "hold").touch()
    add_run(writer)
    writer.refresh()
    wait_for((tmp_path / "begun0").exists)
    add_run(writer)
    writer.refresh()  # one is going on
    (tmp_path / "hold").unlink()
    wait_for(lambda: writer._child.poll() == 0)
    assert (tmp_path / "begun0").read_text().startswith("19 ")
    writer.refresh()
    wait_for((tmp_path / "ended1").exists)
    assert not (tmp_path / "begun2").exists()


def test_page_that_cannot_be_written_is_told_once_and_ends_nothing(writer, tmp_path, capfd):
    (tmp_path / "fail").touch()
    for _ in range(3):
        add_run(writer)
        writer.refresh()
        wait_for(lambda: writer._child.poll() is not None)
    writer.refresh()
    assert capfd.readouterr().err == "warning: report.html is not rewritten: error: the disk is full\n"
    writer._command[0] = "no-such-command"
    add_run(writer)
    writer.refresh()
    writer.close()
