"""harness/compare.py: what a log tells, and a run beside its base as an agent and a person read it.

uv run pytest tests/test_compare.py
"""


import pytest
from reading_fixtures import BASELINE, DOMAIN, SLOWER, WARMER, WIDER, made, small_ledger

from harness.compare import headline, read_curve, training_facts, verdict
from harness.ledger import STALE

BAR = "  5%|##        | 10/200 [00:01<00:19]"


def log_of(*points: tuple[int, float, float], batch: str = "16,384", steps: str = "100") -> str:
    lines = [f"batch {batch} tokens = 64 rows x 256 x 1 micro-steps"]
    lines += [f"step {step:05d} | {percent:.1f}% | loss {loss:.4f} | lr x1.00" for step, percent, loss in points]
    return "\n".join([*lines, "---", "val_bpb:          1.700000", f"num_steps:        {steps}", ""])


# ---- What a log tells -----------------------------------------------------------------------------------------------


def test_log_tells_steps_speed_and_the_loss_at_half_and_at_the_end():
    facts = training_facts(log_of((1, 1, 9.0), (40, 40, 5.0), (60, 60, 4.0), (100, 99.8, 3.0)), DOMAIN, 32.0)
    assert facts["steps"] == 100
    assert facts["tokens_per_second"] == 100 * 16384 / 32
    assert facts["loss_half"] == pytest.approx(4.5)  # on the line between 40 and 60 %
    assert facts["loss_end"] == 3.0
    assert read_curve(log_of((1, 1, 9.0), (40, 40, 5.0)), DOMAIN)[-1].loss == 5.0


NONSENSE = {
    "nothing": "",
    "progress bars": f"\r{BAR}" * 1000,
    "binary": bytes(range(256)).decode("latin-1") * 1000,
    "no numbers": "step 1 | 1.2.3% | loss nan | \nstep 2 | ...% | loss 1e999 | \nnum_steps: many\n",
    "too many": log_of((1, 50, 2.0), batch="9" * 20, steps="9" * 25).replace("loss 2", "loss x"),
    "backwards": log_of((9, 90, 1.0), (8, 80, 1.0), (10, 70, 1.0), steps="-5"),
}


def test_log_that_says_nothing_of_use_leaves_facts_unknown():
    for name, text in NONSENSE.items():
        assert set(training_facts(text, DOMAIN, 30.0).values()) == {None}, name


def test_huge_log_is_read_at_both_ends():
    start = "batch 1,000 tokens = 1 row\nstep 1 | 50.0% | loss 4.0 | \n"
    text = start + "x" * 100_000_000 + "\nstep 9 | 100.0% | loss 3.0 | \n---\nnum_steps: 9\n"
    assert training_facts(text, DOMAIN, 10.0) == {
        "steps": 9, "tokens_per_second": 900, "loss_half": 4.0, "loss_end": 3.0,
    }  # fmt: skip


# ---- The verdict ----------------------------------------------------------------------------------------------------

NOISE = "sigma 0.015, from 2 repeats of commits here, pooled with 0.014 as measured before for pocket"


def test_verdict_of_a_discard_needs_no_log():
    ledger = small_ledger()
    assert (
        verdict(ledger, ledger[4])
        == f"""\
run 0004 discard: value embeddings
                                                     run 0004  base bbbbbbb, mean of 2             change
val_bpb                                              1.690000                 1.680000          +0.010000
steps                                                     480                      540             -11.1%
tokens a second                                        19,200                   21,600             -11.1%
peak memory, GB                                           2.0                      2.0               +0.0
training loss at half, nats (bits a byte)     4.2000 (2.0198)          3.9000 (1.8755)  +0.3000 (+0.1443)
training loss at the end, nats (bits a byte)  3.6000 (1.7312)          3.3000 (1.5870)  +0.3000 (+0.1443)
0.010000 worse ± 0.043726 (2 standard errors): within the noise ({NOISE})
speed: 11.1% fewer tokens a second, by the edit or the busy machine
learning: not comparable, 11% fewer tokens mean another stage of the schedule
others used 30% of the machine during this run: its score is weak \
('uv run loop.py try --again 4' measures it once more)"""
    )


def test_verdict_of_a_gain_that_was_measured_again_splits_it_into_speed_and_learning():
    ledger = small_ledger()
    lines = verdict(ledger, ledger[3]).splitlines()
    assert lines[-4:] == [
        "bbbbbbb ran 2 times: believed 1.680000, the mean of all but the first, which selected it",
        f"by what is believed: 0.050000 better ± 0.037868 (2 standard errors): more than the noise ({NOISE})",
        "speed: 6.9% more tokens a second, by the edit: the same code differs by 1.0% (standard deviation)",
        # The longer run at 606,000 of 648,000 tokens: 3.3 + 2 (3.9 - 3.3) (1 - 606 / 648) = 3.3778 against 3.5.
        "learning: at 606,000 tokens, equal for both, training loss 0.1222 lower (-3.5%)",
    ]


def test_verdict_of_a_crash_says_why_and_how_to_mend_it():
    ledger = small_ledger()
    assert (
        verdict(ledger, ledger[5])
        == """\
run 0005 crash: warm up longer
NameError: name 'WARM' is not defined
'tail -n 50 runs/0005/run.log' tells more
'git apply runs/0005/change.diff' brings the edit back, to mend it"""
    )


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (made(7, SLOWER, 1.6, "discard", "x", base=BASELINE, is_stale=True, reason=STALE), f"{STALE}: run 0008"),
        (made(7, SLOWER, 1.6, "pending", "x", base=WIDER), "a gain that waits for approval"),
        (made(7, WARMER, 1.675, "keep", "x", base=WIDER), "kept: the plain rule keeps what scored better"),
        (made(7, WARMER, 1.685, "keep", "simplify: x", base=WIDER), "kept as a simplification"),
        (made(7, WARMER, 1.685, "discard", "simplify: x", base=WIDER), "not kept as a simplification: "),
        (made(7, WARMER, 1.5, "discard", "x", base=WIDER, reason="f1 0.2 is low"), "discard because: f1 0.2 is low"),
        (made(7, WARMER, 1.5, "discard", "x", base=WIDER, touched=("prepare.py",)), "as before: prepare.py"),
        (
            made(7, WIDER, 1.68, "keep", "x", purpose="replicate"),
            "no more than the machine does by itself",
        ),
        (made(7, WIDER, 1.9, "keep", "x", purpose="replicate"), "'uv run loop.py try --again 1' measures it"),
    ],
)
def test_verdict_says_the_rule_by_which_it_fell(run, said):
    ledger = small_ledger(run, made(8, "e" * 40, 1.7, "discard", "x", base=WIDER, again_of=7))
    text = verdict(ledger, run)
    assert said in text


def test_headline_is_one_line_of_what_was_decided():
    ledger = small_ledger()
    assert [headline(ledger, ledger[number]) for number in (1, 3, 4, 5)] == [
        "run 0001 keep: val_bpb 1.720000, 500 steps, 40 s (baseline)",
        "run 0003 keep: val_bpb 1.650000, 0.050000 better ± 0.037868, 540 steps (+8%), 40 s (raise width to 384)",
        "run 0004 discard: val_bpb 1.690000, 0.010000 worse ± 0.043726, 480 steps (-11%), 40 s (value embeddings)",
        "run 0005 crash: NameError: name 'WARM' is not defined (warm up longer)",
    ]
    audit = made(7, WIDER, 1.69, "measured", "champion, seed 3", purpose="audit", group="audit 1/champion")
    assert headline(ledger, audit).startswith("run 0007 measured: val_bpb 1.690000, 0.025000 worse ± ")
