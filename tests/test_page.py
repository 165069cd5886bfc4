"""progress.png and report.html: what they show, what they leave out, and that nothing runs there."""

import dataclasses
import html.parser
import os
from pathlib import Path

import pytest
from conftest import wait_for
from reading_fixtures import BASELINE, DOMAIN, SLOWER, WIDER, live_status, made, small_ledger

from harness import page, report
from harness.ledger import Ledger, parse_tsv
from harness.page import PageWriter, compose, draw_progress
from harness.tag import Tag

CLOSING = "</style></title></pre></svg>]]>-->"
EVIL = f"<script>alert(1)</script>{CLOSING}<img src=x onerror=alert(1)> \0\x1b[31m\u202e & {{{{ 7*7 }}}} $x_1$"


class Reader(html.parser.HTMLParser):
    """The elements, attributes and text of a page."""

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


def fill(tag: Tag, text: str = "") -> None:
    """The small night and an audit of it, with run folders; every text of an agent or a run ends in `text`."""
    runs = [dataclasses.replace(run, description=f"{run.description} {text}") for run in small_ledger().runs]
    runs[0] = dataclasses.replace(runs[0], summary={"sample": f"sample {text}", "depth": f"4 {text}"})
    runs[4] = dataclasses.replace(runs[4], reason=f"{runs[4].reason}, reason {text}", node=f"node {text}")
    for number, (role, commit) in enumerate((("baseline", BASELINE), ("champion", WIDER)), 7):
        facts = {"purpose": "audit", "group": f"audit 1/{role}", "test_score": 1.6, "problem": f"problem {text}"}
        runs.append(made(number, commit, 1.7, "measured", f"{role} {text}", **facts))
    tag.append(*runs)
    for run in runs:
        points = [f"step {step} | {step:.1f}% | loss {9 - step / 20} | " for step in range(1, 101)]
        tag.folder(run.number).mkdir(parents=True)
        (tag.folder(run.number) / "run.log").write_text("\n".join([*points, f"log {text}"]))
        (tag.folder(run.number) / "change.diff").write_text(f" same\n-old\n+new {text}\n")


def test_page_tells_everything_of_a_tag_and_reloads_itself_only_while_a_loop_runs(tag):
    fill(tag)
    read = Reader(compose(tag.ledger, tag))
    for words in (
        "Best val_bpb 1.680000 (bbbbbbb), 0.050000 better than the baseline",
        "1 change is in the branch, 1 of them significant",
        "What the model wrote: baseline, run 0001, val_bpb 1.720000",
        "NameError: name 'WARM' is not defined",
        "champion, run 0008 was not scored in a clean process",
        "machine: a CPU, others used 2% of the processors",
        "loss 4.0 | \nlog",
    ):
        assert words in read.words, words
    assert read.tags.count("details") == len(tag.ledger.runs)
    assert read.tags.count("svg") == 2  # progress and the curves of baseline and champion
    assert "ins" in read.tags and "del" in read.tags
    reloads = 'http-equiv="refresh"'
    tag.write_live(live_status())
    assert reloads not in compose(tag.ledger, tag)  # that loop was killed
    with tag.locked():
        assert reloads in compose(tag.ledger, tag)
        tag.clear_live()
        assert reloads not in compose(tag.ledger, tag)  # it is ending


def test_page_shows_what_agents_wrote_as_text_asks_for_nothing_and_survives_what_runs_leave(tag):
    fill(tag, EVIL)
    os.unlink(tag.folder(3) / "change.diff")
    os.mkfifo(tag.folder(3) / "change.diff")
    os.unlink(tag.folder(2) / "run.log")
    (tag.folder(2) / "run.log").symlink_to("/etc/passwd")
    (tag.folder(4) / "run.log").write_bytes(b"\xff\xfe\x00" * 100)
    text = compose(tag.ledger, tag)
    assert "root:" not in text
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


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_picture_and_page_of_any_ledger_are_made_without_empty_parts(tmp_path, lower_is_better):
    domain = dataclasses.replace(DOMAIN, lower_is_better=lower_is_better, assumed_sigma={})
    crash = made(1, BASELINE, None, "crash", "boom", purpose="baseline")
    baseline = made(1, BASELINE, 0.0, "keep", "baseline", purpose="baseline")
    diverged = made(2, SLOWER, 1e9, "discard", "diverged <b>", base=BASELINE)
    by_hand, _ = parse_tsv("a 1.0 1 keep base <b>\nb 0.9 1 keep y\nc 0 0 crash z\n", domain, "pocket")
    for runs in ([], [crash], [baseline, diverged], by_hand.runs):
        draw_progress(Ledger(domain, runs), tmp_path / "progress.png")
        assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
        text = compose(Ledger(domain, runs))
        assert "Training loss" not in text and "The last audit" not in text
        assert ("&lt;b&gt;" in text) == (len(runs) > 1) and ("No run yet" in text) == (not runs or runs == [crash])


def test_page_of_a_long_night_shows_the_newest_and_the_kept(monkeypatch):
    """A gain every tenth run, each smaller than the one before."""
    monkeypatch.setattr(page, "NEWEST", 3)
    monkeypatch.setattr(report, "MOST_CHANGES", 2)
    runs = []
    champion = ""
    for number in range(1, 51):
        status = "keep" if number == 1 or number % 10 == 0 else "discard"
        score = 2 + 1 / number if status == "keep" else 4.0
        runs.append(made(number, f"{number:040x}", score, status, f"idea {number} ☃ $x_1$", base=champion))
        champion = runs[-1].commit if status == "keep" else champion
    night = Ledger(DOMAIN, runs)
    read = Reader(compose(night))
    assert "The newest 3; of older ones what was kept. 45 are left out" in read.words
    assert "the 3 smallest gains are left out" in read.words
    assert read.tags.count("details") == 5
    assert all(f"idea {number}" in read.words for number in (10, 20, 48, 49, 50)) and "idea 47" not in read.words


def test_page_is_rewritten_by_a_child_of_the_lowest_priority_one_at_a_time(tag, monkeypatch):
    monkeypatch.setattr(page, "PAGE_SECONDS", 0)
    writer = PageWriter(tag)
    assert writer.command[-3:] == ["report", "--tag", "t"] and Path(writer.command[-4]).name == "loop.py"
    report = "echo $(nice) >> begun; while [ -e hold ]; do sleep 0.01; done; echo no disk >&2; exit 1"
    writer.command[3:] = ["sh", "-c", f"cd {tag.home}; {report}"]  # in place of `loop.py report`
    begun = tag.home / "begun"
    (tag.home / "hold").touch()
    tag.append(made(1, SLOWER, 1.7, "discard", "a run"))
    writer.refresh()
    wait_for(lambda: begun.exists() and begun.read_text() == "19\n")
    tag.append(made(2, SLOWER, 1.7, "discard", "another while the first child writes"))
    writer.refresh()
    (tag.home / "hold").unlink()
    wait_for(lambda: (tag.home / "page.log").read_text() == "no disk\n")
    assert begun.read_text() == "19\n"
    wait_for(lambda: writer.refresh() or begun.read_text() == "19\n" * 2)
    writer.close()
    wait_for(lambda: begun.read_text() == "19\n" * 3)
