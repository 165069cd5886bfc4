"""harness/report.py: what a person reads as text, and what an audit makes doubtful."""

import dataclasses
import re
import time

import pytest
from reading_fixtures import BASELINE, DOMAIN, WARMER, WIDER, live_status, made, small_ledger

from harness.ledger import STALE, Ledger, Run, parse_tsv
from harness.report import audit_text, report_text, status_text

NOISE = "from 2 repeats of commits here, pooled with 0.014 as measured before for pocket"
COST = "cost: 3 agent calls, at least 0.25 dollars (0.25 a kept change), at least 10,000 tokens (10,000 a kept change)"


def test_report_of_a_small_night():
    assert report_text(Ledger(DOMAIN)).startswith("no scored run yet")
    expected = f"""\
6 runs: 4 keep (67%), 1 discard (17%), 1 crash (17%)
best: val_bpb 1.680000 (run 0003, bbbbbbb), believed from 1 of its 2 runs: the first selected it; \
baseline 1.730000, 0.050000 bpb (2.89%) better
best score of a single run: 1.650000, run 0003, one of 2 runs of bbbbbbb, believed 1.680000
1 change is in the branch, 1 of them significant (a gain over 2 standard errors)

   run   commit     val_bpb      gain  ± 2 errors               steps  tokens/s  description
   0001  aaaaaaaa  1.730000                                       500    20,200  baseline
1  0003  bbbbbbbb  1.680000  0.050000    0.037868  significant    540    21,600  raise width to 384

sigma, the standard deviation between seeds: 0.015460 bpb, {NOISE}
pace: 63.5 runs an hour, 0.62 at a time, 40 s each
{COST}
machine: a CPU, others used 2% of the processors in the median run, over 10% in 1 of 5, every run was isolated

next:
  uv run loop.py audit         baseline and champion on fresh seeds and on the held-out split"""
    assert report_text(small_ledger()) == expected


def words_of(ledger: Ledger) -> list[str]:
    """What the table of kept changes says of each."""
    table = report_text(ledger).split("\n\n")[1].splitlines()
    return [re.search(r"(?<=  )(significant|within|worse|noise)(\S| (?! ))*", line)[0] for line in table[2:]]


def test_no_kept_change_is_worse_without_a_word():
    repeats = [made(number, WIDER, 1.9, "keep", "again", purpose="replicate") for number in (7, 8)]
    back = made(9, BASELINE, 1.7, "keep", "again", purpose="replicate")
    unknown = [made(1, BASELINE, 1.7, "keep", "b", record={}), made(2, WIDER, 1.6, "keep", "w", base=BASELINE)]
    by_hand = "base 1.0 1 keep b\n1111111 0.99 44 keep wider\n2222222 0 0 crash boom\n3333333 0.992 44 keep "
    for ledger, word, said in (
        (small_ledger(*repeats), "worse by its repeats", "former champion, is believed better now (1.730000): 'uv run"),
        (small_ledger(*repeats, back), "worse by its repeats, left the branch", "1 more was kept and left the"),
        (Ledger(DOMAIN, unknown), "noise unknown", "uv run loop.py try --base"),
        (parse_tsv(f"{by_hand}x", DOMAIN, "pocket")[0], "worse", "run 0002, a former champion, is believed better"),
        (parse_tsv(f"{by_hand}simplify: x", DOMAIN, "pocket")[0], "worse, but simpler", "0.002000 of at most 0.028000"),
    ):
        assert words_of(ledger)[-1] == word and said in report_text(ledger)
        assert ", 0 of them significant" in report_text(ledger)


def test_better_score_than_the_best_is_explained():
    for reason, said in ((STALE, STALE), ("f1 0.2 is low", "f1 0.2 is low"), ("", "a discard beside the champion")):
        lucky = made(7, WARMER, 1.6, "discard", "lucky", base=WIDER, reason=reason)
        line = next(line for line in report_text(small_ledger(lucky)).splitlines() if "single run" in line)
        assert line.startswith("best score of a single run: 1.600000, run 0007, ") and said in line


def test_hours_in_which_nothing_ran_are_told():
    night = small_ledger(made(200, WARMER, 1.9, "discard", "after a rate limit", base=WIDER))
    assert re.search(r"^pace: .* 40 s each, and 3\.2 h without a run$", report_text(night), re.MULTILINE)


def worker(doing: str, seconds: float, run: int = 0, description: str = "") -> dict:
    return {"doing": doing, "run": run, "description": description, "since": time.time() - seconds}


def test_status_says_on_one_screen_what_runs_where_and_where_it_stands(tag):
    workers = [worker("proposing", 200), worker("training", 12, 7, "deeper"), worker("training", 25, 8, "wider")]
    tag.append(*small_ledger().runs)
    tag.write_live(live_status(*workers, waiting="the disk has 0.1 GB free", others=0.07))
    with tag.locked():
        text = status_text(tag)
    expected = f"""\
autoresearch/t: a loop has been running for 2.0 h on 2 devices
  training   0007  12 s of about 40 s  deeper
  training   0008  25 s of about 40 s  wider
  proposing        3 min
waiting: the disk has 0.1 GB free
others used 7% of the processors during the last run
Best val_bpb 1.680000 (bbbbbbb), 0.050000 better than the baseline; 6 runs, 1 change in the branch, 1 crashed.

aaaaaaa\t1.720000\t2.0\tkeep\tbaseline
aaaaaaa\t1.740000\t2.0\tkeep\tbaseline (seed 7)
bbbbbbb\t1.650000\t2.0\tkeep\traise width to 384
ddddddd\t1.690000\t2.0\tdiscard\tvalue embeddings
ccccccc\t0.000000\t0.0\tcrash\tNameError: name 'WARM' is not defined: warm up longer
bbbbbbb\t1.680000\t2.0\tkeep\traise width to 384 (again, seed 9)

pace: 63.5 runs an hour, 0.62 at a time, 40 s each
{COST}"""
    assert text == expected


def audited(gain: float = 0.05, test_gain: float | None = None, seeds: int = 2, **changes) -> list[Run]:
    """The runs of an audit; `changes` are the champion's."""
    test_gain = gain if test_gain is None else test_gain
    runs = []
    for seed in range(seeds):
        for role, commit in (("baseline", BASELINE), ("champion", WIDER)):
            is_champion = role == "champion"
            score = 1.73 - gain * is_champion + 0.01 * seed
            test = 1.60 - test_gain * is_champion + 0.01 * seed
            facts = {"test_score": test, "clean_score": score + 0.0001, "clean_test_score": test}
            facts |= {"purpose": "audit", "group": f"audit 1/{role}"} | (changes if is_champion else {})
            runs.append(made(10 + len(runs), commit, score, "measured", f"{role}, seed {seed}", **facts))
    return runs


def test_audit_of_an_honest_night_gives_the_table_and_no_doubt():
    ledger = small_ledger(*audited())
    assert ledger.last_group("audit") == "audit 1" and small_ledger().last_group("audit") == ""
    text, doubts = audit_text(ledger, "audit 1")
    assert doubts == []
    expected = """\
audit 1                                  validation, bpb   held-out test, bpb  steps  tokens/s
baseline aaaaaaa, 2 seeds            1.735000 ± 0.007071  1.605000 ± 0.007071    500    20,000
  in a clean process                 1.735100 ± 0.007071  1.605000 ± 0.007071
  believed before, off by +0.005000             1.730000
champion bbbbbbb, 2 seeds            1.685000 ± 0.007071  1.555000 ± 0.007071    500    20,000
  in a clean process                 1.685100 ± 0.007071  1.555000 ± 0.007071
  believed before, off by +0.005000             1.680000
gain ± 2 standard errors             0.050000 ± 0.030919  0.050000 ± 0.030919"""
    assert text == expected
    later = made(30, WIDER, 1.9, "keep", "again", purpose="replicate")  # what was believed then is shown
    assert audit_text(small_ledger(*audited(), later), "audit 1") == (text, [])


DOUBTS = {
    "trained on the validation text": (audited(0.05, -0.4), "the gains disagree: 0.050000 on validation and -0.400000"),
    "gains nothing held-out": (audited(0.05, -0.02), "what gained may have seen the validation text"),
    "lucky belief": (audited(-0.02), "champion: believed 1.680000, its fresh runs give 1.755000"),
    "not exported": (audited(clean_score=None, problem="a list in forward"), "in a clean process: a list in forward"),
    "other clean scores": (audited(clean_score=1.7), "1.680000 in its own process and 1.700000 in a clean one (valid"),
    "clean score is NaN": (audited(clean_test_score=float("nan")), "and nan in a clean one (held-out): believe n"),
    "floor": (audited(record={"floors": {"f1": 0.2}}), "champion, run 0011: f1 0.2 is below its floor 0.9"),
    "floor is NaN": (audited(record={"floors": {"f1": float("nan")}}), "f1 nan is below its floor 0.9"),
}


@pytest.mark.parametrize(("runs", "said"), DOUBTS.values(), ids=DOUBTS)
def test_audit_doubts_in_one_line_each(runs, said):
    domain = dataclasses.replace(DOMAIN, floors={"f1": 0.9})
    fine = {"floors": {"f1": 0.95}, "profile": "pocket", "weights_sha256": "3f2a91c0e5d1" + 52 * "0"}
    runs = [run if "floors" in run.record else dataclasses.replace(run, record=fine) for run in runs]
    text, doubts = audit_text(Ledger(domain, [*small_ledger().runs, *runs]), "audit 1")
    assert any(said in doubt for doubt in doubts), doubts
    assert "baseline, f1: 0.95, 0.95 (floor 0.9)\nbaseline, weights' SHA-256: 3f2a91c0e5d1, " in text


def test_audit_without_a_kept_change_or_a_held_out_split():
    baseline_only = [dataclasses.replace(run, busy_others=0.5) for run in audited() if run.commit == BASELINE]
    later = made(20, WIDER, 1.6, "keep", "wider", base=BASELINE)
    text, doubts = audit_text(Ledger(DOMAIN, [*small_ledger().runs[:2], *baseline_only, later]), "audit 1")
    assert "no change was in the branch" in text and not doubts
    assert "stopped before both had run" in audit_text(small_ledger(*baseline_only), "audit 1")[0]
    assert text.endswith("others used over 10% of the processors in 2 of these runs: their scores are weak")
    domain = dataclasses.replace(DOMAIN, test_metric="")
    runs = [dataclasses.replace(run, test_score=None, clean_test_score=None) for run in audited()]
    text, doubts = audit_text(Ledger(domain, [*small_ledger().runs, *runs]), "audit 1")
    assert doubts == [] and "held-out" not in text and re.search("gain ± 2 standard errors +0.050000 ± ", text)
