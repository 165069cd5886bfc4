"""`loop.py report`, `status` and `audit`: what a person reads.

    uv run pytest tests/test_report.py
"""

import re
import statistics

import pytest
from conftest import Desk

from ledger import Row
from report import pace

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


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
    assert re.fullmatch(r"[\d.]+ runs an hour, training or evaluating [\d.]+% of the time", lines[1])
    assert lines[2] == f"best 1.069900 ({rows[3][0]}), baseline 1.080000, gain 0.010100 bpb (0.94%)"
    table = [line.split(maxsplit=3) for line in lines[5:8]]
    assert [words[0] for words in table] == [rows[0][0], rows[1][0], rows[3][0]]
    assert table[1][1:] == ["1.070000", "0.010000", "resolved     idea 1"]
    assert table[2][1:] == ["1.069900", "0.000100", "within noise idea 3"]
    assert lines[9].startswith("noise of one run: 0.000400 bpb (assumed, as measured for climbmix; --replicates 3 ")


def test_report_assumes_the_noise_of_its_profile(desk):
    desk.set_constant("ledger.py", "ASSUMED_SIGMA", '{"climbmix": 0.0004, "fake": 0.02}')
    desk.commit("a noisy profile")
    desk.loop("--agent-cmd", desk.agent('knob("DEPTH", 5)'), "--tag", "t", "--max-experiments", "1")
    out = desk.loop("report").stdout
    assert re.search(r"1\.070000  0\.010000  within noise ", out)
    assert "noise of one run: 0.020000 bpb (assumed, as measured for fake;" in out


def test_report_draws_a_picture_that_git_ignores(night):
    night.loop("report")
    assert (night.path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert night.git("status", "--porcelain") == ""


def test_report_measures_the_noise_from_commits_that_ran_twice(desk):
    text = HEADER + "a\t1.000\t1\tkeep\tx\na\t1.002\t1\tkeep\tx\nb\t0.990\t1\tdiscard\ty\nb\t0.990\t1\tkeep\ty\n"
    out = report_of(desk, text).stdout
    assert "noise of one run: 0.001000 bpb (from commits that were run more than once)" in out
    assert re.search(r"(?m)^b +0\.990000 +0\.011000  resolved +y$", out)  # means, not the first runs


HAND_WRITTEN = """
commit val_bpb memory_gb status description
a1b2c3d 0.99 44.0 keep spaces instead of tabs
# tried a few things here
b1b2c3d\t0.98\t44.0\tKEEP\tcapitals, and $math^ & 'quotes' in \\text
c1b2c3d\tOOM\t-\tcrash\tno number
d1b2c3d\t0\t0\tcrash\tOOM
e1b2c3d\t0.97
f1b2c3d\tnan\t44\tkeep\tnot a number
"""


def test_report_copes_with_rows_that_an_agent_wrote_by_hand(desk):
    process = report_of(desk, HAND_WRITTEN)
    assert process.stdout.startswith("3 rows: 2 keep (67%), 0 discard (0%), 1 crash (33%)\nbest 0.980000 (b1b2c3d)")
    assert re.search(r"^warning: 4 lines of .* are no rows and were left out$", process.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    [
        "a\t1.0\t1\tkeep\tonly one\n",
        "a\t1.0\t1\tdiscard\tnone kept\nb\t0\t0\tcrash\tx\n",
        "a\t0\t0\tkeep\tzero\nb\t0\t0\tkeep\tzero\n",
        "a\t-1.0\t0\tkeep\tnegative\nb\t-2.0\t0\tkeep\tbetter\n",
        "a\t1.0\t1\tkeep\tx\nb\t1e30\t1\tdiscard\tfar\nc\t0.9\t1\tkeep\t" + "long " * 99 + "\n",
        "".join(f"{n}\t1.0\t1\tkeep\tthe same point {n}\n" for n in range(60)),
        "a\t1.0\t1\tkeep\t\u65e5\u672c\u8a9e \x07 $\\frac{$\n",
    ],
)
def test_report_draws_any_ledger_with_a_score(desk, text):
    report_of(desk, text)
    assert (desk.path / "progress.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", HEADER, HEADER + "a\t0\t0\tcrash\tx\n"])
def test_report_without_a_score_is_one_error_line(desk, text):
    process = report_of(desk, text, code=1)
    assert process.stderr.splitlines()[-1].startswith("error: ") and "no scored row" in process.stderr
    assert process.stdout == ""


def test_report_without_a_ledger_is_one_error_line(desk):
    process = desk.loop("report", "--tag", "t", code=1)
    assert process.stderr.startswith("error: no ledger at ") and len(process.stderr.splitlines()) == 1


def test_report_of_15000_rows_counts_every_row(desk):
    rows, best = [], 1.0
    for n in range(15000):
        status = "keep" if n % 20 == 0 else "crash" if n % 20 == 1 else "discard"
        best -= 1e-5 * (status == "keep")
        score = {"keep": best, "crash": 0.0, "discard": best + 1e-4 * (n % 7)}[status]
        rows.append(Row(f"{n:07x}", score, 44.0, status, f"change {n}"))
    out = report_of(desk, HEADER + "".join(map(str, rows))).stdout
    assert out.startswith("15000 rows: 750 keep (5%), 13500 discard (90%), 750 crash (5%)\n")


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_shows_branch_best_pace_and_the_last_rows(night):
    out = night.loop("status").stdout
    assert out.startswith("autoresearch/t: no loop is running\nBest val_bpb 1.069900")
    assert "rows: 3 keep, 1 discard, 1 crash." in out and "% of the time" in out
    assert [line.split("\t")[4] for line in out.splitlines() if "\t" in line] == [row[4] for row in night.rows()]


def test_pace_leaves_out_the_time_between_sessions():
    timeline = [
        (0, "session", 0), (5, "training", 0), (60, "measured", 50), (100, "stopped", 0),  # it ended
        (5000, "session", 0), (5010, "training", 0), (5050, "measured", 30), (5060, "training", 0),  # it was killed
        (9000, "session", 0), (9010, "training", 0), (9040, "measured", 20),
    ]  # fmt: skip
    events = [{"at": 1e9 + at, "event": event, "seconds": seconds} for at, event, seconds in timeline]
    told = "54.0 runs an hour, training or evaluating 50.0% of the time"  # 3 runs and 100 s in 100 + 60 + 40 s
    assert pace(events) == told


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


def test_audit_runs_baseline_and_champion_on_fresh_seeds_and_on_the_test_split(noisy):
    before, past = (noisy.home() / "results.tsv").read_text(), len(noisy.events())
    process = noisy.loop("audit", "--replicates", "2")
    baseline, champion, gain = process.stdout.splitlines()[1:]
    rows = noisy.rows()
    assert baseline.split()[:2] == ["baseline", rows[0][0]] and champion.split()[:2] == ["champion", rows[1][0]]
    means = [[float(x) for x in re.findall(r"(\d\.\d{6}) ±", line)] for line in (baseline, champion)]
    for validation, test in means:
        assert test - validation == pytest.approx(0.01, abs=2e-6)
    assert float(gain.split()[1]) == pytest.approx(0.02, abs=2e-6)  # the same seeds for both: their noise cancels
    seeds = re.findall(r"seed (\d+)", process.stderr)
    assert seeds[0::2] == seeds[1::2] and len(set(seeds)) == 2 and "42" not in seeds
    assert (noisy.home() / "results.tsv").read_text() == before  # an audit is no experiment
    assert noisy.git("rev-parse", "HEAD")[:7] == rows[1][0]
    assert [event["event"] for event in noisy.events()[past:]] == ["session", *["training", "measured"] * 4, "stopped"]


def test_audit_deviation_is_that_of_the_seeds(noisy):
    done = noisy.loop("audit", "--replicates", "3")
    seeds = [int(seed) for seed in re.findall(r"audit of the baseline .*, seed (\d+)", done.stderr)]
    deviations = [float(found) for found in re.findall(r"± (\d\.\d{6})", done.stdout)]
    assert len(seeds) == 3
    assert deviations == [pytest.approx(NOISE * statistics.stdev(seeds), abs=1e-6)] * 4


@pytest.mark.parametrize("count", ["0", "-1"])
def test_audit_of_less_than_one_replicate_is_one_error_line(night, count):
    done = night.loop("audit", "--replicates", count, code=2)
    assert done.stderr == f"error: --replicates {count}: audit needs at least 1\n" and done.stdout == ""


def test_audit_before_any_run_is_one_error_line(desk):
    process = desk.loop("audit", "--tag", "t", code=1)
    assert "error: there are no rows to audit" in process.stderr


def test_search_never_sees_the_sealed_test_split(noisy):
    noisy.loop("audit", "--replicates", "1")
    records = {path.parent.name: path.read_text() for path in (noisy.home() / "experiments").glob("*/result.json")}
    assert [name for name in sorted(records) if "test_bpb" in records[name]] == ["0003", "0004"]
