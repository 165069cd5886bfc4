"""The ledger and the edit, as functions of plain data: no git, no process."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.edit import compile_problem, fingerprint, syntax_size
from harness.ledger import Ledger, Run, append_runs, cut_torn_line, is_simpler_keep, parse_tsv, read_runs, render
from loop import DOMAIN

PLAIN = replace(DOMAIN, assumed_sigma={"fake": 0.01})


def run(number: int, commit: str, score: float | None, status: str = "discard", **more) -> Run:
    more.setdefault("purpose", "experiment" if number > 1 else "baseline")
    more.setdefault("record", {"profile": "fake"})
    return Run(number, commit, status=status if score is not None else "crash", score=score, **more)


def ledger_of(*runs: Run, domain=PLAIN) -> Ledger:
    return Ledger(domain, list(runs))


NIGHT = (
    run(1, "base", 1.0, "keep"),
    run(2, "up", 1.1, base="base"),
    run(3, "down", 0.9, "keep", base="base"),
    run(4, "bad", None, base="down", reason="boom"),
    run(5, "more", 0.85, "keep", base="down"),
)


def test_champion_is_the_last_keep_and_the_branch_is_its_lineage():
    ledger = ledger_of(*NIGHT)
    assert (ledger.baseline, ledger.champion, ledger.best) == ("base", "more", 0.85)
    gains = [(change.run.commit, round(change.gain, 9)) for change in ledger.changes()]
    assert gains == [("down", 0.1), ("more", 0.05)]
    assert ledger.standing().startswith("Best val_bpb 0.850000 (more), 0.150000 better than the baseline; 5 runs, 2 ch")
    # A verdict that goes back takes its changes out of the branch.
    back = (run(6, "more", 1.2, "keep", purpose="replicate"), run(7, "down", 0.91, "keep", purpose="replicate"))
    ledger = ledger_of(*NIGHT, *back)
    assert ledger.champion == "down" and ledger.lineage() == ["base", "down"]
    assert [change.is_in_branch for change in ledger.changes()] == [True, False]
    # A gain that waits for approval is no champion yet; the line of its verdict takes the earlier one's place.
    pending = run(6, "new", 0.5, "pending", base="more")
    ledger = ledger_of(*NIGHT, pending)
    assert ledger.champion == "more" and ledger.pending() == [pending] and len(ledger.rows) == 5
    fresh = [run(7, "more", 0.85, "keep", purpose="replicate"), run(8, "new", 0.6, purpose="replicate")]  # meanwhile
    ledger = ledger_of(*ledger.runs, *fresh, replace(pending, status="keep"))
    assert ledger.champion == "new" and ledger.pending() == [] and len(ledger.rows) == 8
    assert ledger.believed("new") == 0.6 and ledger.first_run_of("new").number == 6  # whose score selected it


def test_stale_gain_is_run_again_once_whatever_its_fresh_runs(tag):
    stale = run(6, "new", 0.8, is_stale=True, base="base")
    tag.append(stale, run(9, "new", 0.8, is_stale=True, purpose="replicate", group="confirm 6"), *NIGHT[:1])
    assert tag.ledger.stale_gains() == [stale]
    assert tag.new_folder() == 10  # no number is used twice, whatever the order of verdicts and whoever needed room


def test_first_score_of_a_commit_that_ran_again_is_not_believed_but_the_baselines_is():
    again = [run(6, "down", 1.0, "keep", purpose="replicate"), run(7, "base", 1.2, "keep", purpose="replicate")]
    ledger = ledger_of(*NIGHT[:3], *again)
    assert ledger.believed("down") == 1.0 and ledger.believed("base") == pytest.approx(1.1)
    assert ledger.believed("bad") is None
    assert ledger.better_former() == "down"
    audit = run(8, "base", 5.0, "measured", purpose="audit", group="audit 1/baseline")
    assert ledger_of(*NIGHT, audit).believed("base") == 1.0  # an audit stays apart from what the night believes


def test_noise_is_pooled_over_repeats_of_quiet_runs_and_unknown_where_nothing_is_known():
    pairs = [run(1, "a", 1.0), run(2, "a", 1.2), run(3, "b", 2.0), run(4, "b", 2.0)]
    unknown = replace(PLAIN, assumed_sigma={})
    assert ledger_of(*pairs, domain=unknown).sigma == pytest.approx(math.sqrt(0.02 / 2))
    assert ledger_of(*pairs).sigma == pytest.approx(math.sqrt((0.02 + 4 * 0.01**2) / 6))
    nothing = ledger_of(pairs[0], domain=unknown).noise
    assert nothing.sigma is None and "nothing ran twice" in nothing.source
    assert ledger_of(pairs[0]).sigma == 0.01
    busy = [replace(one, score=9.0 * one.score, number=one.number + 4, busy_others=0.5) for one in pairs]
    assert ledger_of(*pairs, *busy).sigma == ledger_of(*pairs).sigma < ledger_of(*busy).sigma
    audits = [run(5, "c", 1.0, "measured", purpose="audit"), run(6, "c", 2.0, "measured", purpose="audit")]
    assert ledger_of(*audits, domain=unknown).sigma == pytest.approx(math.sqrt(0.5))  # an audit's repeats tell it too


@pytest.mark.parametrize(("score", "counts"), [(1.0282, False), (1.0284, True), (0.9718, False), (0.9716, True)])
def test_change_is_significant_above_two_standard_errors(score, counts):
    for lower_is_better in (True, False):
        domain = replace(PLAIN, lower_is_better=lower_is_better)
        ledger = ledger_of(run(1, "base", 1.0, "keep"), run(2, "new", score, "keep", base="base"), domain=domain)
        (change,) = ledger.changes()
        assert change.standard_error == pytest.approx(0.01 * math.sqrt(2))
        assert change.is_significant is (counts and lower_is_better == (score < 1))


def test_simpler_keeps_give_away_one_sigma_each_and_two_in_all():
    ledger = ledger_of(run(1, "base", 1.0, "keep"))
    assert is_simpler_keep(ledger, -0.1) and is_simpler_keep(ledger, 0.009) and not is_simpler_keep(ledger, 0.011)
    for number, score in ((2, 1.009), (3, 1.018)):
        kept = run(number, f"c{number}", score, "keep", base=ledger.champion, description="simplify: x")
        ledger = ledger_of(*ledger.runs, kept)
    assert is_simpler_keep(ledger, 0.001) and not is_simpler_keep(ledger, 0.004)
    unknown = ledger_of(run(1, "base", 1.0, "keep"), domain=replace(PLAIN, assumed_sigma={}))
    assert is_simpler_keep(unknown, 0.0) and not is_simpler_keep(unknown, 1e-6)


def test_runs_survive_the_file_and_a_torn_line_is_no_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = [replace(one, touched=("prepare.py",), summary={"a": "b"}) for one in NIGHT]
    runs.append(run(6, "zero", 0.0, "keep", busy_others=0.0))
    append_runs(path, runs[:2])
    append_runs(path, runs[2:])
    assert read_runs(path) == runs
    path.write_text(path.read_text() + '{"number": 9, "future": 1')
    assert read_runs(path) == runs
    cut_torn_line(path)
    path.write_text(path.read_text() + '{"number": 9, "commit": "z", "future": 1}\n')
    assert read_runs(path)[-1] == Run(9, "z")  # a later version's key is left out


def test_ledger_that_an_agent_wrote_by_hand_gives_its_rows():
    text = (
        "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
        "\n"
        "b2c3d4e 0.993200 44.2 KEEP increase LR to 0.04\n"
        "c3d4e5f\t0.000000\t0.0\tcrash\tOOM\twith a tab\n"
        "nonsense\nd4e5f6a\tnan\t1\tkeep\tx\ne5f6a7b\t1.0\t1\tmaybe\tx\n"
    )
    ledger, bad = parse_tsv(text, DOMAIN, "climbmix")
    assert [one.status for one in ledger.rows] == ["keep", "keep", "crash"] and bad == 3
    assert ledger.champion == "b2c3d4e" and ledger.runs[1].description == "increase LR to 0.04"
    assert ledger.runs[2].score is None and ledger.sigma == DOMAIN.assumed_sigma["climbmix"]


@given(st.text(max_size=400), st.floats(0.01, 100), st.sampled_from(["keep", "discard"]))
def test_row_written_and_parsed_is_the_same_row_whatever_its_description(description, score, status):
    ledger = ledger_of(run(1, "abcdef1234", round(score, 6), status, description=description, memory_mb=512.0))
    text = render(ledger)
    assert text.count("\n") == 2
    parsed, bad = parse_tsv(text, DOMAIN, "")
    (row,) = parsed.rows
    assert bad == 0
    assert (row.commit, row.score, row.status, row.memory_mb) == ("abcdef1", round(score, 6), status, 512.0)


SOURCE = b'"""A file."""\nimport torch\nSEED = 1\ntorch.manual_seed(7)\n\ndef f(x):\n    return x + 1  # one\n'


def test_fingerprint_is_blind_to_layout_words_and_seeds_alone():
    for old, new, is_same in (
        (b"  # one", b"  # two\n\n", True),
        (b'"""A file."""', b'"""Another."""', True),
        (b"def f(x):\n", b'def f(x):\n    "words"\n', True),
        (b"x + 1", b"(x  +\n 1)", True),
        (b"manual_seed(7)", b"manual_seed(8)", True),
        (b"SEED = 1", b"SEED = 2", True),
        (b"x + 1", b"x + 2", False),
        (b"torch.manual_seed(7)", b"torch.manual_seed(7); x = 8", False),
        (b"torch.manual_seed(7)", b"torch.manual_seed(len(x))", False),
    ):
        assert old in SOURCE
        assert (fingerprint(SOURCE) == fingerprint(SOURCE.replace(old, new))) is is_same, new


def test_source_is_simpler_only_if_it_says_less():
    assert syntax_size(SOURCE.replace(b"    return x + 1", b"    return x")) < syntax_size(SOURCE)
    for new in (
        SOURCE.replace(b"\n\ndef", b"; 0\ndef"),  # lines are joined, nothing is gone
        SOURCE.replace(b"def f(x):\n    return x + 1", b"exec('def f(x):\\n    return x + 1')"),
        SOURCE.replace(b'"""A file."""\n', b""),  # a docstring is no code
    ):
        assert syntax_size(new) >= syntax_size(SOURCE)


def test_source_that_does_not_compile_says_why_and_never_fails():
    assert compile_problem(b"x = (", "train.py").startswith("train.py does not compile: ")
    assert compile_problem(b"x = (", "train.yaml") == "" == compile_problem(SOURCE, "train.py")
    for source in (b"\x00", b"\xff", b"(" * 1000, b"x = " + b"-" * 100_000 + b"1"):
        assert compile_problem(source, "train.py")
        assert fingerprint(source) and syntax_size(source) >= 0
