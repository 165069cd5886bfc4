"""The loop's pure functions: ledger, decision, noise, what a run's log and record say. No process, no file.

    uv run pytest tests/test_loop.py
"""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import COLUMNS, Row, decide, is_resolved, noise, one_line, parse_ledger, scores
from loop import Crash, changed_knobs, check_record, crash_reason, parse_log

scores_bpb = st.floats(0.1, 9.9).map(lambda value: round(value, 6))
lists_of_scores = st.lists(scores_bpb, min_size=1, max_size=5)


# ---- The ledger ------------------------------------------------------------------------------------------------------

rows_of_the_loop = st.builds(
    Row,
    commit=st.text("0123456789abcdef", min_size=7, max_size=7),
    val_bpb=scores_bpb,
    memory_gb=st.floats(0, 999).map(lambda value: round(value, 1)),
    status=st.sampled_from(["keep", "discard", "crash"]),
    description=st.text().map(one_line),
)


@given(st.lists(rows_of_the_loop))
def test_row_written_and_parsed_is_the_same_row(rows):
    assert parse_ledger(COLUMNS + "".join(map(str, rows))) == (rows, 0)


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Zl", "Zp"])))
def test_description_is_one_cell_of_printable_text(text):
    cell = one_line(text)
    assert len(cell) <= 200 and cell == cell.strip()
    assert cell.splitlines() in ([cell], []) and "\t" not in cell
    cell.encode()  # a surrogate, from an argument that is not UTF-8, would stop the ledger


def test_one_line_keeps_ordinary_text():
    assert one_line("  raise DEPTH\tto 10,\r\nσ unchanged \x1b[0m") == "raise DEPTH to 10, σ unchanged [0m"


def test_row_has_the_five_columns_and_decimals_of_the_ledger():
    assert COLUMNS == "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
    assert str(Row("1a2b3c4", 0.99791, 43.96, "keep", "baseline")) == "1a2b3c4\t0.997910\t44.0\tkeep\tbaseline\n"
    assert str(Row("1a2b3c4", 0.0, 0.0, "crash", "NaN")) == "1a2b3c4\t0.000000\t0.0\tcrash\tNaN\n"


HAND_WRITTEN = [
    ("a1b2c3d 0.9979 44.0 keep raise depth to 10\n", Row("a1b2c3d", 0.9979, 44.0, "keep", "raise depth to 10")),
    ("a1b2c3d\t0.9979\t44.0\tKEEP\tx\r\n", Row("a1b2c3d", 0.9979, 44.0, "keep", "x")),
    ("  a1b2c3d\t 0.9979\t44.0 \t keep\t x ", Row("a1b2c3d", 0.9979, 44.0, "keep", "x")),
    ("a1b2c3d\t0.9979\t44.0\tkeep\n", Row("a1b2c3d", 0.9979, 44.0, "keep", "")),
    ("a1b2c3d\t0\t0\tcrash\tOOM\n", Row("a1b2c3d", 0.0, 0.0, "crash", "OOM")),
]


@pytest.mark.parametrize(("line", "row"), HAND_WRITTEN)
def test_ledger_row_is_read_as_an_agent_wrote_it(line, row):
    assert parse_ledger(line) == ([row], 0)


BAD_LINES = [
    "a1b2c3d\tnan\t44.0\tkeep\tx", "a1b2c3d\t0.99\t44.0\tkept\tx", "a1b2c3d\t0.99", "# a comment of an agent",
    "a1b2c3d\tlow\t44.0\tkeep\tx", "a1b2c3d\tinf\t1.0\tdiscard\tx", "\t\t\t\t",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_ledger_line_that_is_no_row_is_counted_and_left_out(line):
    rows, bad = parse_ledger(f"{COLUMNS}{line}\na1b2c3d\t0.99\t1.0\tkeep\tgood\n\n")
    assert [row.description for row in rows] == ["good"]
    assert bad == bool(line.strip())


def test_ledger_header_and_empty_lines_are_no_bad_lines():
    assert parse_ledger(f"\n{COLUMNS}\n  \nCommit val_bpb memory_gb status description\n") == ([], 0)
    assert parse_ledger("") == ([], 0)


def test_scores_leave_crashes_out_and_keep_the_order():
    text = "a\t1.2\t1\tkeep\tx\nb\t0\t0\tcrash\tx\na\t1.1\t1\tdiscard\tx\nc\t1.3\t1\tdiscard\tx\n"
    assert scores(parse_ledger(text)[0]) == {"a": [1.2, 1.1], "c": [1.3]}


# ---- Noise -----------------------------------------------------------------------------------------------------------


def ledger_of(groups: list[list[float]]) -> list[Row]:
    return [Row(f"{i:07d}", value, 1.0, "discard", "") for i, group in enumerate(groups) for value in group]


def test_noise_of_commits_that_were_run_once_is_unknown():
    assert noise([]) is None
    assert noise([*ledger_of([[1.0], [1.1]]), Row("0000001", 0.0, 0.0, "crash", "not a second run")]) is None


@given(st.lists(lists_of_scores, min_size=1, max_size=5))
def test_noise_pools_the_squared_deviations_from_each_commits_mean(groups):
    repeated = [group for group in groups if len(group) > 1]
    squares = sum((x - sum(group) / len(group)) ** 2 for group in repeated for x in group)
    freedom = sum(len(group) - 1 for group in repeated)
    found = noise(ledger_of(groups))
    assert found is None if not freedom else math.isclose(found, math.sqrt(squares / freedom), abs_tol=1e-9)


@pytest.mark.parametrize(
    ("before", "after", "sigma", "resolved"),
    [
        ([1.000], [0.9980], 0.0005, True),  # 2 * 0.0005 * sqrt(2) = 0.00141
        ([1.000], [0.9990], 0.0005, False),
        ([1.000] * 4, [0.9990] * 4, 0.0005, True),  # 2 * 0.0005 * sqrt(1/2) = 0.00071
        ([1.000], [1.0020], 0.0005, False),  # worse is no gain
        ([1.000], [1.0000], 0.0, False),
    ],
)
def test_gain_is_resolved_over_two_standard_errors(before, after, sigma, resolved):
    assert is_resolved(before, after, sigma) is resolved


# ---- The decision ----------------------------------------------------------------------------------------------------

SIGMA = 0.0005  # 2 * sqrt(2) * SIGMA = 0.001414

DECISIONS = [
    # champion, candidate, sigma, verdict
    ([1.0], [0.999999], None, "keep"),  # the plain rule: lower
    ([1.0], [1.0], None, "discard"),  # equal is not lower
    ([1.0], [1.000001], None, "discard"),
    ([1.0], [0.9985], SIGMA, "keep"),  # larger than the noise of a difference: no second run
    ([1.0], [0.9987], SIGMA, "again"),
    ([1.0], [0.999999], SIGMA, "again"),
    ([1.0], [1.0], SIGMA, "discard"),
    ([1.0], [1.1], SIGMA, "discard"),
    ([1.0], [0.9987, 0.9987], SIGMA, "keep"),  # 0.0013 > 2 * SIGMA * sqrt(1 + 1/2) = 0.001225
    ([1.0], [0.9988, 0.9988], SIGMA, "discard"),  # 0.0012: not resolved
    ([1.0], [0.9987, 1.0020], SIGMA, "discard"),  # the second run took the gain away
    ([1.0001, 0.9999, 1.0], [0.9989, 0.9989], SIGMA, "keep"),  # 0.0011 > 2 * SIGMA * sqrt(1/3 + 1/2) = 0.000913
    ([1.0001, 0.9999, 1.0], [0.9992, 0.9992], SIGMA, "discard"),  # 0.0008
    ([1.001, 0.999], [0.9999], None, "keep"),  # against the mean, not the last or the best
    ([1.0], [0.999999], 0.0, "keep"),  # a deterministic domain: every gain is real
]


@pytest.mark.parametrize(("champion", "candidate", "sigma", "verdict"), DECISIONS)
def test_decision_keeps_a_lower_score_and_doubts_a_gain_within_noise(champion, candidate, sigma, verdict):
    assert decide(champion, candidate, sigma) == verdict


@given(lists_of_scores, lists_of_scores, st.none() | st.floats(0, 0.1))
def test_decision_never_keeps_what_is_not_lower_and_ends_after_a_second_run(champion, candidate, sigma):
    verdict = decide(champion, candidate, sigma)
    lower = statistics.fmean(candidate) < statistics.fmean(champion)
    assert verdict == "discard" if not lower else verdict in ("keep", "again", "discard")
    assert not (verdict == "again" and (sigma is None or len(candidate) > 1))
    assert not (lower and sigma is None and verdict != "keep")


# ---- What a run said -------------------------------------------------------------------------------------------------


def test_parse_log_finds_the_number_of_the_summary():
    log = "step 1 val_bpb: 9.9\n---\nval_bpb:          0.997900\npeak_vram_mb:     45060.2\r\n"
    assert parse_log(log, "val_bpb") == 0.9979
    assert parse_log(log, "peak_vram_mb") == 45060.2


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no val_bpb printed"),
        (" val_bpb: 1.0\nmy_val_bpb: 1.0\nVAL_BPB: 1.0", "no val_bpb printed"),
        ("val_bpb: 1.0\nval_bpb: 1.0", "val_bpb printed 2 times"),
        ("val_bpb: nan", "val_bpb is 'nan', not a finite number"),
        ("val_bpb: -inf", "val_bpb is '-inf', not a finite number"),
        ("val_bpb:", "val_bpb is '', not a finite number"),
        ("val_bpb: 1.0 or so", "val_bpb is '1.0 or so', not a finite number"),
    ],
)
def test_parse_log_refuses_what_is_not_one_finite_number(log, reason):
    with pytest.raises(Crash) as crash:
        parse_log(log, "val_bpb")
    assert str(crash.value) == reason


EXPECTED = {"profile": "pocket", "split": "val", "seed": 42, "rows": 7, "digest": "d" * 64}


def test_record_of_this_run_gives_the_evaluators_score():
    assert check_record(EXPECTED | {"val_bpb": 0.99790044}, EXPECTED, 0.9979) == 0.99790044


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"profile": "smoke"}, "profile 'smoke', this run was to have 'pocket'"),
        ({"seed": 43}, "seed 43, this run was to have 42"),
        ({"rows": 6}, "rows 6, this run was to have 7"),
        ({"digest": "e" * 64}, "digest 'eeee"),
        ({"split": None}, "split None, this run was to have 'val'"),
        ({"val_bpb": 0.9}, "printed val_bpb 0.9979 is not the evaluator's 0.9"),
        ({"val_bpb": 0.997903}, "printed val_bpb 0.9979 is not the evaluator's 0.997903"),  # 3e-6 off
        ({"val_bpb": math.nan}, "printed val_bpb 0.9979 is not the evaluator's nan"),
        ({"val_bpb": "0.9979"}, "printed val_bpb 0.9979 is not the evaluator's 0.9979"),
    ],
)
def test_record_that_is_not_this_runs_is_a_crash(change, reason):
    with pytest.raises(Crash) as crash:
        check_record(EXPECTED | {"val_bpb": 0.9979} | change, EXPECTED, 0.9979)
    assert reason in str(crash.value) and len(str(crash.value)) < 160  # room for the idea in the ledger's cell


@pytest.mark.parametrize("record", [[], None, "val_bpb", 0.9979])
def test_record_that_is_no_object_is_a_crash(record):
    with pytest.raises(Crash):
        check_record(record, EXPECTED, 0.9979)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no output"),
        ("step 1\nstep 2\n\n", "step 2"),
        ("Traceback (most recent call last):\n  File x\nValueError: 3 % 2\n", "ValueError: 3 % 2"),
        ("torch.OutOfMemoryError: CUDA out of memory\nrank 0 exits\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("error: loss is nan at step 7\nbye\n", "error: loss is nan at step 7"),
        ("prepare.BudgetExceeded: 400 s of 300 s\n", "prepare.BudgetExceeded: 400 s of 300 s"),
        ("KeyError: 'a'\nDuring handling\nIndexError: b\n", "IndexError: b"),
        ("RuntimeError: " + "x" * 500, "RuntimeError: " + "x" * 106),
    ],
)
def test_crash_reason_is_the_line_that_says_why(log, reason):
    assert crash_reason(log) == reason


# ---- Descriptions ----------------------------------------------------------------------------------------------------

KNOBS = "DEPTH = 8  # layers\nLR = 0.04\nBETAS = (0.8, 0.95)  # of Adam\nif x:\n    DEPTH = 2  # layers\n"


@pytest.mark.parametrize(
    ("old", "new", "description"),
    [
        ("DEPTH = 8", "DEPTH = 10", "DEPTH 8 -> 10"),
        ("LR = 0.04", "LR = 0.05  # new", "LR 0.04 -> 0.05"),
        ("(0.8, 0.95)", "(0.9, 0.95)", "BETAS (0.8, 0.95) -> (0.9, 0.95)"),
        ("    DEPTH = 2", "    DEPTH = 3", "DEPTH 2 -> 3"),
        ("DEPTH = 8  # layers\nLR = 0.04", "DEPTH = 9  # layers\nLR = 0.05", "DEPTH 8 -> 9, LR 0.04 -> 0.05"),
        ("LR = 0.04", "WARMUP = 1\nLR = 0.04", "edit of train.py"),  # a new knob: the lists do not match
        ("LR = 0.04\n", "", "edit of train.py"),
        ("if x:", "if y:", "edit of train.py"),
        ("# layers", "# blocks", "edit of train.py"),
    ],
)
def test_changed_knobs_name_old_and_new_value(old, new, description):
    assert changed_knobs(KNOBS, KNOBS.replace(old, new, 1)) == description
