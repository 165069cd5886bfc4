"""`loop.py report`, `status` and `audit`: what a person reads.

uv run pytest tests/test_report.py
"""

import copy
import dataclasses
import html
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Desk, ended, errors
from matplotlib.path import Path as MatplotlibPath
from matplotlib.transforms import Affine2D

import loop
from harness.ledger import Row
from harness.picture import cut, draw, find_bests, plot
from harness.report import Audited, _pace, audit_text, compute, find_doubts

HEADER = loop.DOMAIN.columns
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A finished run: baseline, two kept, one discarded, one crashed. The tests only read it."""
    desk = Desk(tmp_path_factory.mktemp("night"))
    agent = desk.agent(
        """
        n = count()
        knob("DEPTH", {1: 5, 2: 4.5, 3: 5.01, 4: 6}[n])
        if n == 4:
            open("train.py", "a").write("raise ValueError('boom')\\n")
        say(f"idea {n}")
        """
    )
    desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "4")
    yield desk
    desk.end()


def report_of(desk, text: str, code=0):
    path = desk.outside / "ledger.tsv"
    path.write_text(text)
    return desk.loop("report", str(path), code=code)


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_tells_what_was_kept_and_what_it_gained(night):
    lines = night.loop("report").stdout.splitlines()
    rows = night.rows()
    assert lines[0] == "5 rows: 3 keep (60%), 1 discard (20%), 1 crash (20%)"
    assert re.fullmatch(r"[\d.]+ runs an hour, 0\.\d\d devices busy on average", lines[1])
    assert lines[2] == f"best 1.069900 ({rows[3][0]}), baseline 1.080000, gain 0.010100 bpb (0.94%)"
    assert lines[3] == "2 changes were kept, 1 of them resolved."
    table = [line.split(maxsplit=3) for line in lines[6:9]]
    assert [words[0] for words in table] == [rows[0][0], rows[1][0], rows[3][0]]
    assert table[1][1:] == ["1.070000", "0.010000", "resolved     idea 1"]
    assert table[2][1:] == ["1.069900", "0.000100", "within noise idea 3"]
    assert lines[5].split() == ["kept", "val_bpb", "gain", "description"]  # no run says its steps
    assert lines[10] == "noise of one run: 0.000400 bpb (assumed; --confirm measures it here)"
    assert "4 agent calls: dollars unknown; tokens unknown" in lines
    assert "Others used 0% of the processors in the median run, and over 10% in none of 4 runs." in lines
    assert not [line for line in lines if line.startswith(("mark:", "given away"))]
    assert (night.path / "progress.png").read_bytes().startswith(PNG)
    assert night.git("status", "--porcelain") == ""


def test_report_of_a_tag_that_has_no_ledger_shows_no_other_tags(night):
    done = night.loop("report", "--tag", "nosuch", code=1)
    assert done.stdout == "" and "autoresearch/nosuch/results.tsv: 'ls " in errors(done)[0]


@pytest.mark.slow
def test_report_and_status_work_from_another_worktree_and_branch(night):
    from_the_desk = night.loop("report").stdout
    other = night.outside / "other"
    night.git("worktree", "add", "-q", "-b", "another", str(other), "main")
    try:
        for command in (["report", "--tag", "t"], ["status", "--tag", "t"]):
            process = subprocess.Popen(
                [sys.executable, str(other / "loop.py"), *command],
                cwd=other,
                env=night.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            out = ended(process).stdout
            if command[0] == "report":
                places = re.compile(r"(?m)^(picture|page): .*\n")
                assert places.sub("", out) == places.sub("", from_the_desk)
                assert (other / "progress.png").read_bytes().startswith(PNG)
                assert (other / "report.html").exists()
            else:
                assert out == night.loop("status").stdout
    finally:
        night.git("worktree", "remove", "--force", str(other))


def test_report_marks_rows_that_their_records_do_not_bear_out_and_marks_of_kept_runs(night, tmp_path):
    desk = copy.copy(night)
    desk.path = tmp_path / "copy"
    shutil.copytree(night.path, desk.path, symlinks=True)
    home = desk.home()
    rows = desk.rows()
    lines = (home / "results.tsv").read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace("1.070000", "0.123000")  # kept, and its record says something else
    lines[3] = lines[3].replace(rows[2][0], "abcdef0")  # no run of it is known
    (home / "results.tsv").write_text("".join(lines))
    mark = "others used 30% of the machine: this score is weak"
    others = [f"another {number}" for number in range(4)]
    for number, found in ((4, [mark]), (1, others)):
        path = home / "runs" / f"{number:04d}" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"marks": found}))
    *_, first, second, third, fourth, fifth, more, _, _ = desk.loop("report").stdout.splitlines()
    assert more == "and 2 more: report.html lists them"
    assert [fourth, fifth] == [f"mark: run 0001: {words}" for words in others[:2]]
    assert html.unescape((desk.path / "report.html").read_text()).count("run 0001: another ") == 4
    marks = [first, second, third]
    assert marks == [
        f"mark: row {rows[1][0]} says 0.123000, the record of its run says 1.070000",
        "mark: row abcdef0 says 1.075000, and no run of it left a record",
        "mark: run 0004: others used 30% of the machine: this score is weak",
    ]


@pytest.mark.slow
def test_report_assumes_the_noise_of_its_profile_and_measures_it_where_commits_ran_twice(desk):
    desk.replace("loop.py", 'assumed_sigma={"climbmix": 0.0004,', 'assumed_sigma={"fake": 0.02,')
    desk.commit("a noisy profile")
    desk.loop("--agent-cmd", desk.agent('knob("DEPTH", 5)'), "--tag", "t", "--max-experiments", "1")
    out = desk.loop("report").stdout
    assert re.search(r"1\.070000  0\.010000  within noise ", out)
    assert "noise of one run: 0.020000 bpb (assumed, as measured for fake; --confirm measures it here)" in out

    text = HEADER + "a\t1.000\t1\tkeep\tx\na\t1.002\t1\tkeep\tx\nb\t0.980\t1\tkeep\ty\nb\t0.990\t1\tkeep\ty\n"
    out = report_of(desk, text).stdout
    assert "noise of one run: 0.005099 bpb (from commits that were run more than once)" in out
    assert re.search(r"(?m)^b +0\.990000 +0\.011000  within noise +y$", out)  # its first score chose it


@pytest.mark.slow
def test_report_of_hand_written_or_damaged_ledgers_tells_what_it_left_out(desk):
    text = "a1b2c3d 0.99 44.0 keep spaces\n# tried things\nb1b2c3d\t0.98\t44.0\tKEEP\tcapitals\ne1b2c3d\t0.97\n"
    process = report_of(desk, text)
    assert process.stdout.startswith("2 rows: 2 keep (100%), 0 discard (0%), 0 crash (0%)\nbest 0.980000 (b1b2c3d)")
    assert re.search(r"^warning: 2 lines of .* are no rows and were left out$", process.stderr, re.MULTILINE)

    path = desk.outside / "ledger.tsv"
    path.write_bytes(b"a\t1.0\t1\tkeep\t\xff\xfe torn\x00\nb\t0.9")
    assert desk.loop("report", str(path)).stdout.startswith("1 rows: 1 keep")

    for empty in ("", HEADER, HEADER + "a\t0\t0\tcrash\tx\n"):
        process = report_of(desk, empty, code=1)
        assert re.fullmatch(r"error: .* holds no scored row yet: '.*' tells what is running\n", process.stderr)
        assert process.stdout == ""
    for missing in (["--tag", "t"], [str(desk.outside)], ["no/such/file"]):
        process = desk.loop("report", *missing, code=1)
        assert process.stderr.startswith("error: no ledger at ")
        assert len(process.stderr.splitlines()) == 1
    assert not desk.home().exists()


@pytest.mark.slow
@pytest.mark.parametrize("domain", [loop.DOMAIN, dataclasses.replace(loop.DOMAIN, lower_is_better=False)])
def test_picture_is_drawn_of_any_rows_in_either_direction(tmp_path, domain):
    cases = [
        "a\t1.0\t1\tkeep\tonly one\n",
        "a\t1.0\t1\tdiscard\tnone kept\nb\t0\t0\tcrash\tx\n",
        "a\t0\t0\tkeep\tzero\nb\t0\t0\tkeep\tzero\n",
        "a\t-1.0\t0\tkeep\tnegative\nb\t-2.0\t0\tkeep\tbetter\n",
        "a\t1.0\t1\tkeep\tx\nb\t1e30\t1\tdiscard\tfar\nc\t0.9\t1\tkeep\t" + "long " * 99 + "\n",
        "".join(f"{n}\t1.0\t1\tkeep\tthe same point {n}\n" for n in range(40)),
        "a\t1.0\t1\tkeep\t日本語 \x07 $\\frac{$\n",
    ]
    pictures = set()
    for number, text in enumerate(cases):
        path = tmp_path / f"{number}.png"
        plot(loop.ledger.parse_ledger(text)[0], path, domain, 0.0004)
        assert path.read_bytes().startswith(PNG)
        pictures.add(path.read_bytes())
    assert len(pictures) == len(cases)


@pytest.mark.parametrize("better", [-1, +1])
def test_picture_shows_the_best_as_believed_and_leaves_far_failures_out(better):
    domain = dataclasses.replace(loop.DOMAIN, lower_is_better=better < 0)
    rows = [Row("a", 5.0, 1.0, "keep", "baseline"), Row("b", 5 + better * 0.4, 1.0, "keep", "lucky")]
    rows += [Row("b", 5 + better * 0.2, 1.0, "keep", "lucky (again)"), Row("c", 5 - better * 3, 1.0, "discard", "far")]
    rows += [Row("d", 5 - better * 0.01, 1.0, "discard", "near"), Row("e", 0.0, 0.0, "crash", "boom")]
    believed = 5 + better * 0.2
    bests = find_bests(rows, domain)
    assert [(best.at, best.description) for best in bests] == [(1, "baseline"), (2, "lucky")]
    assert [best.score for best in bests] == [5.0, believed] and bests[1].gain == pytest.approx(0.2)
    assert [best.at for best in find_bests([rows[5], *rows[3:5]], domain)] == [2]  # nothing was kept
    back = find_bests([*rows, Row("a", 5.0, 1.0, "keep", "baseline (again)")], domain)
    assert [best.at for best in back] == [1, 2, 7] and back[-1].score == 5.0

    axes = draw(rows, domain, 0.1, (14, 7), "black").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["discarded"].get_xdata()) == [5]
    assert list(axes.get_xticks()) == [1, 2, 3, 4, 5, 6]
    assert list(draw(rows[:1], domain, 0.1, (14, 7), "black").axes[0].get_xticks()) == [1]
    worst = axes.get_ylim()[1 if better < 0 else 0]
    (cross,) = lines["crashed"].get_ydata()
    edge, place = (axes.transData.transform((0, score))[1] for score in (worst, cross))
    assert 8 < abs(edge - place) < 20  # no cross is cut
    assert better * (cross - worst) > 0
    assert better * (5 - worst) > 0.1  # room for what is worse
    band = axes.collections[0].get_paths()[0].get_extents()
    assert [band.y0, band.y1] == pytest.approx([min(5, believed) - 0.1, max(5, believed) + 0.1])
    assert "(1 of the discarded are outside the frame)" in axes.get_xlabel()
    assert axes.get_title() == f"6 runs, 1 change kept: 5.0000 to {believed:.4f}"
    assert cut("abcdef", 5) == "abcd…" and cut("abcde", 5) == "abcde"


@pytest.mark.slow
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_labels_of_many_keeps_stay_inside_the_frame_and_clear_of_one_another(lower_is_better):
    """83 kept of 2,500, most of them in the first tenth; the largest gains are labelled."""
    domain = dataclasses.replace(loop.DOMAIN, lower_is_better=lower_is_better)
    rows = []
    best = 1.0
    for n in range(2500):
        is_kept = (n < 250 and n % 4 == 0) or n % 125 == 0
        if is_kept and n:
            best -= (1 if lower_is_better else -1) * (0.01 if n in (40, 60, 160) else 0.0001) / (1 + n / 100)
        rows.append(Row(f"{n:07x}", best, 1.0, "keep" if is_kept else "discard", f"change {n}: " + "word " * (n % 11)))
    figure = draw(rows, domain, 0.0004, (14, 7), "black")
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    outlines = []
    for text in axes.texts:
        box = text.get_window_extent(renderer)
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, text.get_text()
        outlines.append(outline(text, renderer))
    assert not [pair for pair in itertools.combinations(outlines, 2) if pair[0].intersects_path(pair[1])]
    line = next(line for line in axes.lines if line.get_label() == "best")
    xs, ys = line.get_data()
    corners = [(xs[0], ys[0])]
    for x, before, after in zip(xs[1:], ys, ys[1:], strict=False):
        corners += [(x, before), (x, after)]
    path = MatplotlibPath(axes.transData.transform(corners))
    assert not [outline for outline in outlines if outline.intersects_path(path, filled=False)]
    labels = " ".join(text.get_text() for text in axes.texts)
    assert all(f"change {n}:" in labels for n in (0, 40, 60, 160))
    assert len(axes.texts) > 15


def outline(text, renderer) -> MatplotlibPath:
    """The slanted rectangle that a label covers, in pixels."""
    angle = text.get_rotation()
    anchor = text.get_transform().transform(text.get_position())
    text.set_rotation(0)
    box = text.get_window_extent(renderer)
    text.set_rotation(angle)
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1), (box.x0, box.y0)]
    turned = Affine2D().rotate_deg_around(*anchor, angle)
    return MatplotlibPath(turned.transform(corners))


@pytest.mark.slow
def test_report_of_15000_rows_takes_seconds(desk):
    rows = []
    best = 1.0
    for n in range(15000):
        status = "keep" if n % 20 == 0 else "crash" if n % 20 == 1 else "discard"
        if status == "keep":
            best -= 1e-5
        score = {"keep": best, "crash": 0.0, "discard": best + 1e-4 * (n % 7)}[status]
        rows.append(Row(f"{n:07x}", score, 44.0, status, f"change {n}"))
    begin = time.monotonic()
    out = report_of(desk, HEADER + "".join(map(str, rows))).stdout
    assert out.startswith("15000 rows: 750 keep (5%), 13500 discard (90%), 750 crash (5%)\n")
    assert time.monotonic() - begin < 30  # a few seconds where nothing else runs
    page = (desk.path / "report.html").read_text()
    assert len(page) < 3e6
    shown = page.count('class="run row ')
    counts = re.search(r"([\d,]+) of 15,000 rows are left out \((.*) keep, (.*) discard, (.*) crash\)", page)
    left_out, *parts = (int(count.replace(",", "")) for count in counts.groups())
    assert left_out == sum(parts) == 15000 - shown
    assert shown > 500


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_shows_branch_best_pace_and_the_last_rows(night):
    out = night.loop("status").stdout
    assert out.startswith("autoresearch/t: no loop is running\nBest val_bpb 1.069900")
    assert "rows: 3 keep, 1 discard, 1 crash." in out
    assert "runs an hour, " in out
    assert [line.split("\t")[4] for line in out.splitlines() if "\t" in line] == [row[4] for row in night.rows()]
    crash = night.rows()[-1][0]
    verdict = night.loop("status", "--wait").stdout.splitlines()
    assert verdict[0].startswith(f"{crash}\t0.000000\t0.0\tcrash\tValueError: boom")
    assert verdict[-2] == "'tail -n 50 runs/0005/run.log' tells why"


def test_champion_that_came_back_is_a_kept_change_of_its_own():
    rows = [Row("a", 1.0, 1.0, "keep", "baseline"), Row("b", 0.9, 1.0, "keep", "lucky")]
    rows += [Row("b", 1.2, 1.0, "keep", "lucky (again)"), Row("a", 1.0, 1.0, "keep", "baseline (again)")]
    kept = compute(None, rows, Path("results.tsv"), loop.DOMAIN).kept
    assert [(change.commit, round(change.gain, 6)) for change in kept] == [("a", 0.0), ("b", -0.2), ("a", 0.2)]


def test_pace_leaves_out_the_time_between_sessions():
    timeline = [
        (0, "session", 0), (5, "training", 0), (60, "measured", 50), (100, "stopped", 0),  # it ended
        (5000, "session", 0), (5010, "training", 0), (5050, "measured", 30), (5060, "training", 0),  # it was killed
        (9000, "session", 0), (9010, "training", 0), (9040, "measured", 20),
    ]  # fmt: skip
    events = [{"at": 1e9 + at, "event": event, "seconds": seconds} for at, event, seconds in timeline]
    # 3 runs and 100 s in 100 + 60 + 40 s
    assert _pace(events) == "54.0 runs an hour, 0.50 devices busy on average"


def test_status_before_any_run_says_so_and_makes_nothing(desk):
    out = desk.loop("status", "--tag", "t").stdout
    assert out == "autoresearch/t: no loop is running\nNo run yet: the baseline comes first.\n"
    assert not desk.home().exists()


# ---- audit -----------------------------------------------------------------------------------------------------------

NOISE = 1e-12  # bpb for each step of the seed, in `noisy`


@pytest.fixture
def noisy(desk) -> Desk:
    """Baseline and one kept change, in a domain where the seed moves the score."""
    desk.set_knob(NOISE=NOISE)
    desk.commit("noise")
    desk.loop("--agent-cmd", desk.agent('knob("DEPTH", 6)'), "--tag", "t", "--max-experiments", "1")
    return desk


def test_audit_runs_baseline_and_champion_on_fresh_seeds_on_both_splits_and_in_a_clean_process(noisy):
    before = (noisy.home() / "results.tsv").read_text()
    past = len(noisy.events())
    process = noisy.loop("audit", "--replicates", "2")
    lines = process.stdout.splitlines()[1:]
    baseline, clean_baseline, believed_baseline, champion, clean_champion, believed_champion, gain = lines
    rows = noisy.rows()
    for believed, row in ((believed_baseline, rows[0]), (believed_champion, rows[1])):
        assert believed.split() == ["believed", "in", "the", "ledger", row[1]]
    assert baseline.split()[:2] == ["baseline", rows[0][0]]
    assert champion.split()[:2] == ["champion", rows[1][0]]
    for own, clean in ((baseline, clean_baseline), (champion, clean_champion)):
        validation, test = (float(found) for found in re.findall(r"(\d\.\d{6}) ±", own))
        assert test - validation == pytest.approx(0.01, abs=2e-6)
        assert clean.startswith("  in a clean process ")
        assert re.findall(r"\d\.\d{6}", own) == re.findall(r"\d\.\d{6}", clean)
    assert float(gain.split()[1]) == pytest.approx(0.02, abs=2e-6)  # the same seeds for both: their noise cancels

    seeds = re.findall(r"audit of the \w+ \w+, seed (\d+)", process.stderr)
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 2
    assert "42" not in seeds
    deviation = float(re.search(r"± (\d\.\d{6})", baseline)[1])
    assert deviation == pytest.approx(NOISE * statistics.stdev([int(seed) for seed in seeds[0::2]]), abs=1e-6)

    assert (noisy.home() / "results.tsv").read_text() == before  # an audit is no experiment
    assert noisy.git("rev-parse", "HEAD")[:7] == rows[1][0]
    assert [event["event"] for event in noisy.events()[past:]] == ["session", *["training", "measured"] * 4, "stopped"]
    records = {path.parent.name: path.read_text() for path in (noisy.home() / "runs").glob("*/result.json")}
    assert [name for name in sorted(records) if "test_bpb" in records[name]] == ["0003", "0004", "0005", "0006"]
    assert "mark:" not in noisy.loop("report").stdout  # an audit's scores are not held against the rows
    page = html.unescape((noisy.path / "report.html").read_text())
    assert process.stdout.strip() in page


def test_audit_that_is_stopped_tells_the_seeds_that_were_done(desk):
    stop = f"""import pathlib; n = len(list(prepare.CACHE.glob("run*"))); (prepare.CACHE / f"run{{n}}").touch()
if n == 4: pathlib.Path({str(desk.path / "STOP")!r}).touch()"""  # the third run of the audit
    desk.replace("train.py", "prepare.start_clock()", f"prepare.start_clock()\n{stop}")
    desk.commit("a person stops the audit")
    desk.loop("--agent-cmd", desk.agent('knob("DEPTH", 6)'), "--tag", "t", "--max-experiments", "1")
    done = desk.loop("audit", "--replicates", "3")
    assert "stopped after 1 of 3 seeds" in done.stderr
    assert "(1 fresh seed each)" in done.stdout and done.stdout.splitlines()[-1].startswith("gain ")


def test_audit_says_loudly_where_the_clean_process_scores_something_else_or_refuses(desk):
    counted = 'n = len(list(CACHE.glob("audit*"))); (CACHE / f"audit{n}").touch()'
    answer = """print('{"val_bpb": %s, "test_bpb": 1.5}' % ("1.5", "NaN")[n]) if n < 2 else sys.exit("error: no")"""
    desk.replace("prepare.py", "print(pathlib.Path(sys.argv[2]).read_text())", f"{counted}; {answer}")
    desk.commit("the exported network scores something else")
    desk.loop("--agent-cmd", "true", "--tag", "t", "--max-experiments", "0")
    done = desk.loop("audit", "--replicates", "3", code=1)
    own = r"error: baseline \w+ scored (\S+) and (\S+) in its own process, 1\.500000 and 1\.500000 in a clean one: "
    refused = r"error: baseline \w+: the clean process refused its network \((.*)\): do not believe its score"
    first, second, third = errors(done)
    assert re.fullmatch(own + "believe neither", first).groups() == ("1.080000", "1.090000")
    assert re.fullmatch(refused, second)[1] == "the score command printed no scores"
    assert re.fullmatch(refused, third)[1] == "error: no (exit code 1)"
    assert re.search(r"\n  in a clean process +1\.500000 +1\.500000\n", done.stdout)
    assert "  not in a clean process    error: no (exit code 1) (1 of 3)\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing was kept: the baseline is the champion"


def test_audit_calls_a_network_that_was_not_exported_so_and_ends_with_one_line_at_a_crash(desk):
    desk.replace("prepare.py", '"result.pt2", "export_problem": None', 'None, "export_problem": "no graph: a loop"')
    crash = "if (prepare.CACHE / 'crash').exists(): raise ValueError('boom')"
    desk.replace("train.py", "prepare.start_clock()", f"prepare.start_clock()\n{crash}")
    desk.commit("no export")
    desk.loop("--agent-cmd", "true", "--tag", "t", "--max-experiments", "0")
    done = desk.loop("audit", "--replicates", "2")
    assert "  not in a clean process    no graph: a loop (2 of 2)\n" in done.stdout
    assert "\n  in a clean process" not in done.stdout

    (desk.cache / "crash").touch()
    done = desk.loop("audit", "--replicates", "2", code=1)
    assert re.search(r"(?m)^error: the audit of the baseline \w+, seed \d+ crashed: ValueError: boom", done.stderr)
    assert done.stdout == ""
    assert desk.orphans() == []


def audited(**changes) -> Audited:
    facts = {"name": "baseline 1234567", "score": 1.0, "test_score": 2.0, "clean_score": 1.0, "clean_test_score": 2.0}
    return Audited(**(facts | {"problem": "", "was_refused": False, "believed": None, "device": "cpu"} | changes))


@pytest.mark.parametrize(
    ("changes", "doubts"),
    [
        ({}, 0),
        ({"clean_score": 1.0 + 0.9e-5}, 0),
        ({"clean_score": 1.0 + 1.2e-5}, 1),
        ({"clean_test_score": 2.0 - 3e-5}, 1),
        ({"score": math.nan}, 1),
        ({"test_score": math.nan}, 1),
        ({"clean_score": 1.001, "device": "cuda"}, 0),
        ({"clean_score": 1.003, "device": "cuda"}, 1),
        ({"clean_score": None, "clean_test_score": None, "problem": "no graph"}, 0),
    ],
)
def test_audit_doubts_a_run_whose_two_scores_differ_by_more_than_rounding(changes, doubts):
    runs = [audited(), audited(**changes), audited(name="champion 7654321")]
    found = find_doubts(runs)
    assert len(found) == doubts
    own = f"{changes.get('score', 1.0):.6f} and {changes.get('test_score', 2.0):.6f} in its own process"
    assert all(f"baseline 1234567 scored {own}" in doubt for doubt in found)
    text = audit_text(runs, loop.DOMAIN)
    assert ("not in a clean process    no graph (1 of 2)" in text) == (changes.get("problem") == "no graph")


def test_gain_of_an_audit_is_that_of_the_clean_process_where_every_run_has_its_scores():
    champion = {"name": "champion 7654321", "score": 0.1, "test_score": 0.1, "believed": 0.2}
    clean = {"clean_score": 0.9, "clean_test_score": 1.8}
    lines = audit_text([audited(), audited(**champion, **clean)], loop.DOMAIN).splitlines()
    assert lines[-2].split() == ["believed", "in", "the", "ledger", "0.200000"]
    assert lines[-1].split() == ["gain", "0.100000", "0.200000"]
    not_clean = {"clean_score": None, "clean_test_score": None, "problem": "no graph"}
    baseline = audited(clean_score=0.95, clean_test_score=1.95)
    lines = audit_text([baseline, audited(**champion, **not_clean)], loop.DOMAIN).splitlines()
    assert lines[-1].split() == ["gain", "0.900000", "1.900000"]


@pytest.mark.slow
def test_audit_that_cannot_be_is_one_error_line(night, desk):
    for count in ("0", "-1"):
        done = night.loop("audit", "--replicates", count, code=2)
        assert done.stderr == f"error: --replicates {count}: audit needs at least 1\n"
        assert done.stdout == ""
    process = desk.loop("audit", "--tag", "t", code=1)
    assert process.stderr == "error: there are no rows to audit: 'uv run loop.py --agent random' starts a run\n"


@pytest.mark.slow
def test_report_and_audit_print_steps_and_tokens_a_second_where_runs_say_them(desk):
    desk.replace("train.py", "time.sleep(SECONDS)", 'time.sleep(0.02); print("batch 2,048 tokens = 8 rows")')
    with open(desk.path / "train.py", "a") as file:
        file.write("print(f'num_steps: {100 * DEPTH}')\n")
    desk.replace("prepare.py", '"busy_others": 0.0', '"busy_others": 0.4')
    desk.commit("a run that counts its steps")
    agent = desk.agent('knob("DEPTH", 5)')
    desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "1")
    runs = [json.loads((desk.home() / f"runs/000{number}/run.json").read_text()) for number in (1, 2)]
    speeds = [f"{steps * 2048 / run['training_seconds']:,.0f}" for steps, run in zip((400, 500), runs, strict=True)]
    lines = desk.loop("report").stdout.splitlines()
    assert lines[5].split() == ["kept", "val_bpb", "gain", "steps", "tokens/s", "description"]
    assert lines[6].split()[2:4] == ["400", speeds[0]] and lines[7].split()[4:6] == ["500", speeds[1]]
    busy = "Others used 40% of the processors in the median run, and over 10% in 2 of 2 runs: those scores are weak."
    assert busy in lines
    done = desk.loop("audit", "--replicates", "1")
    assert done.stderr.count("others used 40% of the machine: this score is weak") == 2
    audit = done.stdout.splitlines()
    assert " steps " in audit[0] and " tokens/s " in audit[0]
    assert [audit[line].split()[4] for line in (1, 4)] == ["400", "500"]
    foreign = report_of(desk, (desk.home() / "results.tsv").read_text()).stdout
    assert "steps" not in foreign and foreign.splitlines()[4].split() == [*lines[5].split()[:3], "description"]
