"""harness/compare.py: what a log tells, and a run beside its base as an agent and a person read it."""

import pytest
from reading_fixtures import BASELINE, DOMAIN, SLOWER, WARMER, WIDER, made, small_ledger

from harness.compare import headline, training_facts, verdict
from harness.ledger import STALE


def log_of(*points: tuple[int, float, float], batch: str = "16,384", steps: str = "100") -> str:
    lines = [f"batch {batch} tokens = 64 rows x 256 x 1 micro-steps"]
    lines += [f"step {step:05d} | {percent:.1f}% | loss {loss:.4f} | lr x1.00" for step, percent, loss in points]
    return "\n".join([*lines, "---", "val_bpb:          1.700000", f"num_steps:        {steps}", ""])


def test_log_tells_steps_speed_and_the_loss_at_half_and_at_the_end_however_long_it_is():
    log = log_of((1, 1, 9.0), (40, 40, 5.0), (52, 52, 4.5), (100, 99.8, 3.0))
    for text in (log, log.replace("step 00100", "x" * 10_000_000 + "\nstep 00100")):
        facts = {"steps": 100, "tokens_per_second": 100 * 16384 / 32, "loss_half": 4.5, "loss_end": 3.0}
        assert training_facts(text, DOMAIN, 32.0) == facts


NOISE = "sigma 0.015, from 2 repeats of commits here, pooled with 0.014 as measured before for pocket"


def test_verdict_of_a_discard_is_a_table_and_what_the_machine_did():
    expected = f"""\
run 0004 discard: value embeddings
                          run 0004  base bbbbbbb, 2 runs     change
val_bpb                   1.690000              1.680000  +0.010000
steps                          480                   540     -11.1%
tokens a second             19,200                21,600     -11.1%
peak memory, GB                2.0                   2.0       +0.0
training loss at half       4.2000                3.9000    +0.3000
training loss at the end    3.6000                3.3000    +0.3000
0.010000 worse ± 0.043726 (2 standard errors): within the noise ({NOISE})
others used 30% of the processors during this run: its score is weak \
('uv run loop.py try --again 4' measures it once more)"""
    assert verdict(small_ledger(), small_ledger()[4]) == expected


def again(status: str, score: float):
    return made(7, WIDER, score, status, "x", purpose="replicate")


def edit(status: str, score: float, description: str = "x", **changes):
    return made(7, WARMER, score, status, description, base=WIDER, **changes)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (small_ledger()[3], "bbbbbbb ran 2 times: believed 1.680000, the mean of all but the first, which selected it"),
        (small_ledger()[3], f"0.050000 better ± 0.037868 (2 standard errors): more than the noise ({NOISE})"),
        (small_ledger()[5], "'git apply -3 runs/0005/change.diff' brings the edit back, to mend it"),
        (made(7, SLOWER, 1.6, "discard", "x", base=BASELINE, is_stale=True, reason=STALE), f"{STALE}: run 0008"),
        (edit("pending", 1.6), "a gain that waits for approval"),
        (edit("keep", 1.675), "kept: the plain rule keeps what scored better"),
        (edit("keep", 1.685, "simplify: x"), "kept as a simplification"),
        (edit("keep", 1.685), "kept at first, and worse by all that is known now"),
        (edit("discard", 1.5, reason="f1 0.2 is low"), "discard because: f1 0.2 is low"),
        (edit("discard", 1.5, touched=("prepare.py",)), "as before: prepare.py"),
        (again("keep", 1.9), "'uv run loop.py try --again 1' measures it"),
    ],
)
def test_verdict_says_the_rule_by_which_it_fell_and_what_to_do_next(run, said):
    others = [] if run.number < 7 else [run, made(8, "e" * 40, 1.7, "discard", "x", base=WIDER, again_of=7)]
    assert said in verdict(small_ledger(*others), run)


def test_headline_is_one_line_of_what_was_decided():
    ledger = small_ledger()
    said = "run 0004 discard: val_bpb 1.690000, 0.010000 worse ± 0.043726, 480 steps (-11%), 40 s (value embeddings)"
    assert headline(ledger, ledger[4]) == said
    repeat = made(7, SLOWER, None, "crash", "again", purpose="replicate", base=WIDER)
    assert "git apply" not in verdict(small_ledger(repeat), repeat)  # it has no diff of its own
    assert headline(ledger, ledger[5]) == "run 0005 crash: NameError: name 'WARM' is not defined (warm up longer)"
