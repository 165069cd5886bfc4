"""Rows, noise and the decision; one session each with --confirm and with the rule of simplicity.

    uv run pytest tests/test_ledger.py
"""

import dataclasses
import itertools
import math
import random
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loop
from harness.ledger import (
    FIRST_LOOK_SIGMAS,
    LUCK_SHARE,
    Row,
    best_estimate,
    deserves_second_look,
    fresh_scores,
    given_away,
    is_confirmed,
    is_gain,
    is_resolved,
    is_simpler_keep,
    lines_of_code,
    measured_sigma,
    parse_ledger,
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
    error = 0.1 * math.sqrt(1 / 4 + 1)
    champion = [0.9, 1.1, 0.9, 1.1]
    assert deserves_second_look(champion, 1.0 + better * 1.01 * FIRST_LOOK_SIGMAS * error, 0.1, domain)
    assert not deserves_second_look(champion, 1.0 + better * 0.99 * FIRST_LOOK_SIGMAS * error, 0.1, domain)


@both_directions
def test_confirmation_needs_more_of_a_gain_the_more_was_tried(domain, better):
    champion = [1.0, 1.0, 1.0]
    error = 0.1 * math.sqrt(1 / 3 + 1 / 2)
    fresh = [1.0 + better * 0.6 * error] * 2
    enough = [n for n in range(1, 400) if is_confirmed(champion, fresh, 0.1, n, domain)]
    assert enough == list(range(1, len(enough) + 1))  # once it is too little, it stays so
    last = len(enough)
    assert LUCK_SHARE * math.sqrt(2 * math.log(last)) < 0.6 < LUCK_SHARE * math.sqrt(2 * math.log(last + 1))


def test_confirmation_keeps_far_fewer_nulls_than_the_plain_rule():
    rng = random.Random(0)
    plain = 0
    confirmed = 0
    for _ in range(10_000):
        champion = [rng.gauss(1, 0.1) for _ in range(2)]
        first = rng.gauss(1, 0.1)
        fresh = [rng.gauss(1, 0.1) for _ in range(2)]
        plain += is_gain(champion[0], first, LOWER)
        looked_at_again = deserves_second_look(champion, first, 0.1, LOWER)
        confirmed += looked_at_again and is_confirmed(champion, fresh, 0.1, 60, LOWER)
    assert 0.47 < plain / 10_000 < 0.53
    assert confirmed / 10_000 < 0.13  # a null that the champion's own luck favours passes both looks


def test_estimate_leaves_out_the_score_that_chose_a_commit():
    rows = [row("a", 1.0), row("b", 0.8), row("b", 0.95), row("a", 1.2), row("b", 0.93), row("c", 0.7)]
    assert fresh_scores(rows, "a") == [1.0, 1.2]  # the baseline was chosen by nobody
    assert fresh_scores(rows, "b") == [0.95, 0.93]
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
    assert lines_of_code(b"int main() {\n\n  printf(\"it's C\n\");\n}\n") == 4  # not Python: lines that are not empty


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


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_session_with_confirm_decides_on_fresh_seeds_alone(desk):
    """The first score of every candidate is too low, as a lucky seed's would be: only a real gain is kept."""
    desk.replace("train.py", "+ NOISE * (seed - 42)", "- LUCK * (seed == 42)")
    desk.replace("train.py", "NOISE = 0.0", "LUCK = 0.0")
    desk.commit("a lucky first seed")
    agent = desk.agent(
        """
        n = count()
        if n < 4:
            knob("DEPTH", {1: 4, 2: 6, 3: 5}[n])  # nothing, a gain, a loss of 0.01
            knob("LUCK", {1: 0.001, 2: 0.001, 3: 0.02}[n])  # the first score says that it is a gain
        else:
            knob("DEPTH", 3)  # a loss by its first score: no second look
        say(f"idea {n}")
        """
    )
    # The appends are recorded: one write an experiment.
    desk.replace("harness/store.py", "self.rows += rows", "self.rows += rows; self.note('rows', len(rows))")
    desk.commit("tell each write")
    done = desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "4", "--confirm")
    rows = desk.rows()
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda cells: (cells[0], cells[3]))]
    told = [(group[0][3], [cells[4] for cells in group]) for group in groups]
    seeds = re.compile(r" \(seed \d+\)$")
    described = [(status, [seeds.sub(" (seed)", text) for text in texts]) for status, texts in told]
    assert described == [
        ("keep", ["baseline", "baseline (seed)", "baseline (seed)"]),
        ("discard", ["idea 1", "idea 1 (seed)", "idea 1 (seed)"]),
        ("keep", ["idea 2", "idea 2 (seed)", "idea 2 (seed)"]),
        # The new champion has two fresh scores already; its first, which chose it, is not used.
        ("discard", ["idea 3", "idea 3 (seed)", "idea 3 (seed)"]),
        ("discard", ["idea 4"]),
    ]
    assert [event["run"] for event in desk.events() if event["event"] == "rows"] == [3, 3, 3, 3, 1]
    used = [int(found) for cells in rows for found in re.findall(r"\(seed (\d+)\)", cells[4])]
    assert len(set(used)) == len(used) == 8
    assert 42 not in used
    assert "to be confirmed by 2 more runs" in done.stderr
    assert desk.git("rev-parse", "HEAD").startswith(groups[2][0][0])
    report = desk.loop("report").stdout
    best = statistics.fmean(float(cells[1]) for cells in groups[2][1:])
    assert f"best {best:.6f}" in report  # without the lucky score
    assert "from commits that were run more than once" in report


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
    assert [cells[4] for cells in again] == ["champion once more, beside: deeper"] * 2
    assert [cells[3] for cells in again] == ["keep"] * 2
    assert [cells[3] for cells in rows[4:]] == ["keep"] * 3
    assert len({cells[0] for cells in rows[4:]}) == 1


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
