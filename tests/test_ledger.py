"""Rows, noise and the decision; one session each with --confirm and with the rule of simplicity.

uv run pytest tests/test_ledger.py
"""

import dataclasses
import json
import math
import random
import re
import statistics

import pytest
from bench_noise import night_with_workers
from hypothesis import given
from hypothesis import strategies as st

import loop
from harness.ledger import (
    ASSUMED_DEGREES,
    CHAMPION_RUNS,
    FIRST_LOOK_SIGMAS,
    STILL_PROMISING,
    Row,
    best_estimate,
    count_tried_and_kept,
    deciding_sigma,
    deserves_second_look,
    find_noise,
    fresh_scores,
    given_away,
    is_gain,
    is_less_code,
    is_resolved,
    is_simpler_keep,
    least_confirmed_gain,
    lines_of_code,
    measured_sigma,
    parse_ledger,
    sigma_to_give_away,
    verdict_on_fresh_runs,
)
from harness.screen import one_line

LOWER = loop.DOMAIN
HIGHER = dataclasses.replace(LOWER, lower_is_better=False)
both_directions = pytest.mark.parametrize(("domain", "better"), [(LOWER, -1), (HIGHER, +1)], ids=["lower", "higher"])


def row(commit: str, score: float, status: str = "keep", description: str = "x") -> Row:
    return Row(commit, score, 1.0, status, description)


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


def test_ledger_that_an_agent_wrote_by_hand_gives_its_rows():
    rows, bad = parse_ledger(HAND_WRITTEN)
    assert rows == [
        Row("a1b2c3d", 0.99, 44.0, "keep", "spaces instead of tabs"),
        Row("b1b2c3d", 0.98, 44.0, "keep", "capitals, and $math^ & 'quotes' in \\text"),
        Row("d1b2c3d", 0.0, 0.0, "crash", "OOM"),
    ]
    assert bad == 4


ANYTHING = st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Zl", "Zp"]))
ROWS = st.builds(
    Row,
    commit=st.text("0123456789abcdef", min_size=7, max_size=7),
    score=st.floats(-99, 99).map(lambda value: round(value, 6)),
    memory_gb=st.floats(0, 999).map(lambda value: round(value, 1)),
    status=st.sampled_from(["keep", "discard", "crash"]),
    description=ANYTHING.map(one_line),
)


def test_row_has_the_five_columns_and_decimals_of_the_ledger():
    text = str(Row("a1b2c3d", 0.9979131, 44.04, "keep", "raise depth to 10 (seed 7)"))
    assert text == "a1b2c3d\t0.997913\t44.0\tkeep\traise depth to 10 (seed 7)\n"


@given(st.lists(ROWS))
def test_row_written_and_parsed_is_the_same_row_whatever_its_description(rows):
    assert parse_ledger(LOWER.columns + "".join(map(str, rows))) == (rows, 0)


def test_sigma_is_pooled_over_the_commits_that_ran_more_than_once():
    rows = [row("a", 1.0), row("a", 1.2), row("b", 5.0), row("b", 5.3), row("b", 5.6), row("c", 9.0)]
    rows.append(Row("a", 0.0, 0.0, "crash", "no score"))
    squares = 2 * 0.1**2 + 2 * 0.3**2
    assert measured_sigma(rows) == pytest.approx(math.sqrt(squares / 3))
    assert measured_sigma(rows[-2:]) is None


def test_noise_pools_one_lucky_pair_with_what_is_known_of_the_profile():
    pair = [row("a", 1.0), row("a", 1.0001)]
    known = dataclasses.replace(LOWER, assumed_sigma={"pocket": 0.01}, default_sigma=0.5)
    assumed = find_noise(pair[:1], "pocket", known)
    assert (assumed.sigma, assumed.is_assumed) == (0.01, True) and "as measured for pocket" in assumed.source
    pooled = find_noise(pair, "pocket", known)
    assert 0.008 < pooled.sigma < 0.01 and not pooled.is_assumed
    assert find_noise(pair, "mine", known).sigma == pytest.approx(0.0001 / math.sqrt(2))
    assert find_noise(pair[:1], "mine", known).sigma == 0.5


@both_directions
def test_gain_is_resolved_above_two_standard_errors(domain, better):
    error = 0.1 * math.sqrt(1 / 2 + 1 / 1)
    assert is_resolved([1.0, 1.2], [1.1 + better * 2.01 * error], 0.1, domain)
    assert not is_resolved([1.0, 1.2], [1.1 + better * 1.99 * error], 0.1, domain)
    assert not is_resolved([1.0, 1.2], [1.1 - better * 9 * error], 0.1, domain)


@both_directions
def test_plain_rule_keeps_what_is_strictly_better(domain, better):
    assert is_gain(1.0, 1.0 + better * 1e-6, domain)
    assert not is_gain(1.0, 1.0, domain)
    assert not is_gain(1.0, 1.0 - better * 1e-6, domain)


@both_directions
def test_second_look_is_for_a_first_gain_over_its_noise(domain, better):
    champion = [0.9, 1.1, 0.9, 1.1]
    assert deserves_second_look(champion, 1.0 + better * 0.101 * FIRST_LOOK_SIGMAS, 0.1, domain)
    assert not deserves_second_look(champion, 1.0 + better * 0.099 * FIRST_LOOK_SIGMAS, 0.1, domain)


@both_directions
def test_fresh_runs_keep_a_gain_over_the_threshold_and_drop_one_that_looks_like_none(domain, better):
    champion = [1.0, 1.0, 1.0]

    def verdict(standard_errors: float, runs: int, tried: int = 60, kept: int = 4) -> str:
        gain = standard_errors * 0.1 * math.sqrt(1 / 3 + 1 / runs)
        return verdict_on_fresh_runs(champion, [1.0 + better * gain] * runs, 0.1, tried, kept, domain)

    enough = least_confirmed_gain(60, 4)
    for runs in range(1, len(CHAMPION_RUNS) + 1):
        assert verdict(1.01 * enough, runs) == "keep"
        assert verdict(-3 * enough, runs) == "discard"
        if runs < len(CHAMPION_RUNS):
            assert verdict(0.99 * enough, runs) == "look again"
            assert verdict(1.01 * STILL_PROMISING[runs - 1], runs) == "look again"
            assert verdict(0.99 * STILL_PROMISING[runs - 1], runs) == "discard"
    assert verdict(0.99 * enough, len(CHAMPION_RUNS)) == "discard"
    assert verdict(1.01 * enough, 1, tried=61) == "keep"
    assert verdict(1.01 * enough, 1, tried=90) == verdict(1.01 * enough, 1, kept=2) == "look again"


def test_threshold_of_confirmation_grows_with_what_was_tried_and_falls_with_what_was_kept():
    of_tried = [least_confirmed_gain(tried, 0) for tried in range(2, 1000)]
    assert of_tried == sorted(of_tried) and of_tried[0] < of_tried[-1]
    of_kept = [least_confirmed_gain(1000, kept) for kept in range(2000)]
    assert of_kept == sorted(of_kept, reverse=True)
    assert of_kept[-1] > 0  # a gain of less than nothing is never kept
    assert least_confirmed_gain(90, 4) == least_confirmed_gain(10, 0)  # each gain that was kept counts twice


def test_verdict_counts_commits_and_not_their_runs():
    rows = [row("a", 1.0), row("a", 1.1), row("b", 1.2, "discard"), row("c", 0.9), row("a", 1.0), row("c", 0.8)]
    assert count_tried_and_kept(rows[:2]) == (2, 0)
    assert count_tried_and_kept(rows) == (4, 1)


def test_sigma_that_decides_is_the_assumed_one_until_enough_was_measured():
    assert deciding_sigma([row("a", 1.0)], 0.1) == pytest.approx(0.1)
    rng = random.Random(0)
    rows = [row("a", rng.gauss(1, 0.3)) for _ in range(1000)]
    two_runs = [row("b", 1.0), row("b", 1.0)]
    assert deciding_sigma(two_runs, 0.1) == pytest.approx(0.1 * math.sqrt(ASSUMED_DEGREES / (ASSUMED_DEGREES + 1)))
    assert deciding_sigma(rows, 0.1) == pytest.approx(0.3, rel=0.1)


def false_keeps(confirms: bool, nights: int = 250) -> float:
    """In a night of 125 experiments without effect, by four workers; a run takes about as long as another."""
    total = 0
    for seed in range(nights):
        total += night_with_workers(confirms, [0.0] * 125, 0.1, 4, random.Random(seed))[0]
    return total / nights


def test_night_without_any_real_gain_keeps_nothing_with_confirm():
    assert false_keeps(confirms=True) <= 0.1
    assert false_keeps(confirms=False, nights=20) > 3  # the plain rule


def test_night_of_real_gains_keeps_those_that_fresh_runs_can_tell():
    """By one worker and by many: two gains of five sigmas, and no more than one of three of half a sigma."""
    effects = [0.0, -0.5, -0.05, 0.1, -0.5, 0.0, -0.05, 0.3, -0.05]  # sigma is 0.1
    for workers in (1, 8):
        ends = [night_with_workers(True, effects, 0.1, workers, random.Random(seed))[1] for seed in range(200)]
        assert -1.05 < statistics.fmean(ends) < -0.99, workers


def test_sigma_to_give_away_is_the_measured_one_but_at_most_the_assumed_one():
    rows = [row("a", 1.0), row("a", 1.2)]
    assert sigma_to_give_away(rows, 0.1) == 0.1  # a busy machine measured it
    assert sigma_to_give_away(rows, 0.9) == pytest.approx(0.2 / math.sqrt(2))
    assert sigma_to_give_away(rows[:1], 0.9) == 0.9


def test_estimate_leaves_out_the_score_that_chose_a_commit():
    rows = [row("a", 1.0), row("b", 0.8), row("b", 0.95), row("a", 1.2), row("b", 0.93), row("c", 0.7)]
    assert fresh_scores(rows, "a") == [1.0, 1.2]  # the baseline was chosen by nobody
    assert fresh_scores(rows, "b") == [0.95, 0.93]
    assert best_estimate(rows, "a") == pytest.approx(1.1)
    assert best_estimate(rows, "b") == pytest.approx(0.94)
    assert best_estimate(rows, "c") == 0.7  # nothing better is known
    assert best_estimate(rows, "d") is None


SOURCE = b'''"""A module.

Of two paragraphs."""

import os  # one


# a comment
def f(x):
    """Says what it does."""
    text = """two
    lines"""

    "text that stands alone"
    return {  # three more
        "key": x,
    }
'''


def test_lines_of_code_are_those_that_do_something():
    assert lines_of_code(SOURCE) == 7
    assert lines_of_code(b"") == 0
    assert lines_of_code("x = 'é'\n\n\ny = 1".encode()) == 2
    assert lines_of_code(b'int main() {\n\n  printf("it\'s C\n");\n}\n') == 4  # not Python: lines that are not empty


def test_source_is_simpler_only_if_it_says_less():
    """Not if its lines are only wrapped otherwise, or joined."""
    source = b"""a = f(
    1,
    2,
)
b = (
    a
)
if b:
    c = 3
d = 4
"""
    for joined in (b"a = f(1, 2)\nb = a\nif b: c = 3\nd = 4\n", b"a = f(1, 2); b = a\nif b:\n    c = 3\nd = 4\n"):
        assert lines_of_code(joined) < lines_of_code(source)
        assert not is_less_code(source, joined)
    assert not is_less_code(source, b"# one\n" + source.replace(b"d = 4", b"d = 0"))
    assert is_less_code(source, source.replace(b"d = 4\n", b""))
    assert not is_less_code(b'"""Text."""\n' + source, joined)
    assert is_less_code(b"int a;\nint b;\n", b"int a;\n") and not is_less_code(b"int a;\nint b;\n", b"int a; int b;\n")


@both_directions
def test_simpler_keep_is_bounded_by_one_sigma_and_all_of_them_by_two(domain, better):
    sigma = 0.1
    assert is_simpler_keep(1.0, 1.0 + better, sigma, 0.0, domain)
    assert is_simpler_keep(1.0, 1.0 - better * 0.099, sigma, 0.0, domain)
    assert not is_simpler_keep(1.0, 1.0 - better * 0.101, sigma, 0.0, domain)
    assert is_simpler_keep(1.0, 1.0 - better * 0.05, sigma, 0.149, domain)
    assert not is_simpler_keep(1.0, 1.0 - better * 0.05, sigma, 0.151, domain)
    assert is_simpler_keep(1.0, 1.0, sigma, 0.5, domain)  # nothing is given away

    rows = [
        row("a", 1.0),
        row("b", 1.0 + better),  # a gain
        row("c", 1.0 + better - better * 0.03, description="simplify: no gate"),
        row("d", 1.0 - better * 0.5, "discard", "simplify: no model"),
        row("e", 1.0 + 2 * better, description="Simplify: and a gain"),
        row("f", 1.0 + 2 * better - better * 0.04, description="simplify: no comment"),
    ]
    assert given_away(rows, domain) == pytest.approx(0.07)
    rows.append(row("f", 1.0 + 2 * better - better * 0.06, description="simplify: no comment (again)"))
    assert given_away(rows, domain) == pytest.approx(0.09)  # its first score was lucky


# ---- sessions --------------------------------------------------------------------------------------------------------


def lucky_desk(desk):
    """Every first score can be too low by LUCK, as a lucky seed's would be; every append to the ledger is told."""
    desk.replace("train.py", "+ NOISE * (seed - 42)", "- LUCK * (seed == 42)")
    desk.replace("train.py", "NOISE = 0.0", "LUCK = 0.0")
    desk.replace("train.py", "LR = 0.1 ", "LR = 0.2 ")
    desk.replace("train.py", "# ---- The rest ----", "# ---- The rest ----\nuseless = 1")
    desk.replace("train.py", "time.sleep(SECONDS)", "time.sleep(SECONDS * (os.getpid() * 7919 % 200))")
    desk.replace("harness/store.py", "self.rows += rows", "self.rows += rows; self.note('rows', len(rows))")
    desk.commit("a lucky first seed; tell each write")


SEED = re.compile(r" \(seed \d+\)$")


def told_experiments(rows: list[list[str]]) -> list[tuple[str, list[str]]]:
    """Each experiment's status and the descriptions of its rows, seeds left out."""
    found = []
    for cells in rows:
        description = SEED.sub(" (seed)", cells[4])
        if description.endswith("(seed)") or "beside: " in description:
            found[-1][1].append(description)
        else:
            found.append((cells[3], [description]))
    return found


def test_session_with_confirm_decides_on_fresh_seeds_alone(desk):
    """The first score of every candidate is too low: only real gains are kept."""
    lucky_desk(desk)
    agent = desk.agent(
        """
        n = count()
        if n < 4:
            knob("LR", {1: 0.2, 2: 0.1, 3: 0.105}[n])  # nothing, a gain of 0.01, a loss of 0.0005
            knob("LUCK", n / 1000)  # the first score says that it is a gain
        if n == 3:
            path = pathlib.Path("train.py")
            path.write_text(path.read_text().replace("useless = 1\\n", ""))
        if n == 4:
            knob("DEPTH", 3)  # a loss by its first score: no second look
        say("simplify: idea 3" if n == 3 else f"idea {n}")
        """
    )
    done = desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "4", "--confirm")
    rows = desk.rows()
    assert told_experiments(rows) == [
        ("keep", ["baseline", "baseline (seed)"]),
        ("discard", ["idea 1", "idea 1 (seed)"]),
        ("keep", ["idea 2", "idea 2 (seed)"]),
        # The new champion has a fresh score already; its first, which chose it, is not used.
        ("discard", ["simplify: idea 3", "simplify: idea 3 (seed)"]),
        ("discard", ["idea 4"]),
    ]
    assert [event["run"] for event in desk.events() if event["event"] == "rows"] == [2, 2, 2, 2, 1]
    used = [int(found) for cells in rows for found in re.findall(r"\(seed (\d+)\)", cells[4])]
    assert len(set(used)) == len(used) == 4
    assert 42 not in used
    assert "idea 2: a gain so far, 1 more to confirm it" in done.stderr
    assert desk.git("rev-parse", "HEAD").startswith(rows[5][0])
    report = desk.loop("report").stdout
    assert f"best {float(rows[5][1]):.6f}" in report  # without the lucky score
    assert "from commits that were run more than once" in report


@pytest.mark.slow
def test_session_with_confirm_and_four_workers_keeps_the_real_gain_whatever_arrives_first(desk):
    lucky_desk(desk)
    desk.set_knob(SECONDS=0.001)  # a run takes up to 0.2 s, by its process id
    desk.commit("runs of any length")
    agent = desk.agent(
        """
        n = count()
        if n == 3:
            knob("DEPTH", 8)  # one real gain among lucky ones
        else:
            knob("LUCK", 0.001 + n * 1e-6)
        say(f"idea {n}")
        """
    )
    desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "8", "--workers", "4", "--confirm")
    rows = desk.rows()
    told = told_experiments(rows)
    kept = [descriptions for status, descriptions in told if status == "keep"]
    assert [descriptions[0] for descriptions in kept] == ["baseline", "idea 3"]
    assert {SEED.sub("", cells[4]).split(";")[0] for cells in rows} == {"baseline", *(f"idea {n}" for n in range(1, 9))}
    assert [len(found[1]) for found in told] == [event["run"] for event in desk.events() if event["event"] == "rows"]


@pytest.mark.slow
def test_session_with_confirm_measures_a_champion_again_that_was_kept_by_the_plain_rule(desk):
    desk.set_knob(NOISE=1e-13)
    desk.commit("noise")
    desk.loop("--agent-cmd", desk.agent('knob("DEPTH", 6)'), "--tag", "t", "--max-experiments", "1")
    agent = desk.agent('knob("DEPTH", 8); say("deeper")')
    (desk.home() / "try.log").write_text("error: refused: an earlier try\n")
    desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "1", "--confirm")
    rows = desk.rows()
    assert desk.loop("status", "--wait").stdout.splitlines()[0].split("\t") == rows[-1]
    champion = rows[1][0]
    again = [cells for cells in rows[2:] if cells[0] == champion]
    assert [cells[4] for cells in again] == ["champion once more, beside: deeper"] * CHAMPION_RUNS[0]
    assert {cells[3] for cells in rows[2:]} == {"keep"}
    runs = [json.loads(path.read_text()) for path in sorted(desk.home().glob("runs/*/run.json"))]
    assert {run["base"][:7] for run in runs if run["commit"].startswith(champion)} == {rows[0][0], ""}
    of_candidate = rows[2 + len(again) :]
    assert len(of_candidate) == 2 and len({cells[0] for cells in of_candidate}) == 1


@pytest.mark.slow
def test_session_with_simplify_keeps_fewer_lines_within_the_noise_and_not_more_than_two_sigmas(desk):
    desk.replace("loop.py", "default_sigma=0.0004", "default_sigma=0.01")
    desk.replace("train.py", "# ---- The rest ----", "# ---- The rest ----\na = 1\nb = 2\nc = 3\nd = 4\n# a comment\n")
    desk.commit("four useless lines")
    agent = desk.agent(
        """
        n = count()
        path = pathlib.Path("train.py")
        def remove(line):
            path.write_text(path.read_text().replace(line + "\\n", ""))
        if n == 1:  # 0.0081 worse, a line less: kept
            remove("a = 1"); knob("LR", 0.181); say("simplify: no a")
        if n == 2:  # as many lines, a comment less: discarded by the plain rule
            remove("# a comment"); say("simplify: no comment")
        if n == 3:  # 0.0101 worse: over one sigma
            remove("b = 2"); knob("LR", 0.282); say("simplify: no b")
        if n == 4:  # 0.0069 worse, but it does not say simplify
            remove("b = 2"); knob("LR", 0.25); say("no b")
        if n == 5:  # another 0.0099: 0.018 of 0.02 are spent
            remove("b = 2"); knob("LR", 0.28); say("simplify: no b, again")
        if n == 6:  # 0.003 more would be over two sigmas
            remove("c = 3"); knob("LR", 0.31); say("simplify: no c")
        if n == 7:  # no worse
            remove("c = 3"); say("Simplify: no c, for nothing")
        """
    )
    desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "7")
    kept = [cells[4] for cells in desk.rows() if cells[3] == "keep"]
    assert kept == ["baseline", "simplify: no a", "simplify: no b, again", "Simplify: no c, for nothing"]
    assert len(desk.rows()) == 8
    assert "given away for simplicity: 0.018000 of at most 0.020000 bpb" in desk.loop("report").stdout
