"""harness/verdict.py: a run beside its base, and in a word why it lost.

uv run pytest tests/test_verdict.py
"""

import pytest

import loop
from harness.contract import Record
from harness.curve import Point, Training
from harness.ledger import Noise, Row
from harness.store import Run, Store
from harness.verdict import (
    Beliefs,
    Side,
    base_run,
    compare,
    discarded_when_busy,
    earlier_run,
    explain,
    find_marks,
    in_a_word,
    is_weak,
    latest_verdicts,
    read_beliefs,
    speed_swing,
    table,
    usual_runs,
)


def side(number=1, score=1.7, steps=100, batch=1000, start=5.0, end=2.0, **changes) -> Side:
    """A run whose loss falls evenly with its tokens, from `start` to `end` at 100,000 of them."""
    summary = {"num_steps": f"{steps}", "eval_seconds": "1.5"}
    facts = {"score": score, "startup_seconds": 4.0, "training_seconds": 10.0, "summary": summary} | changes
    run = Run(number, f"{number}" * 40, "", 42, "an idea", "experiment", **facts)
    points = []
    for part in range(1, 11):
        step = steps * part // 10
        points.append(Point(step, part / 10, start - (start - end) * step * batch / 100_000))
    return Side(run, Training(points, batch))


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    """Name -> candidate, base, change."""
    width = lines[0].index("run ")
    return {line[:width].strip(): line[width:].split() for line in lines[:-1]}


def test_table_shows_both_runs_at_equal_time_and_at_equal_tokens():
    slow = side(2, score=1.75, steps=92, memory_gb=2.0, busy_others=0.83)
    lines = table(slow, side(busy_others=0.02), loop.DOMAIN)
    assert max(map(len, lines)) < 60
    rows = rows_of(lines)
    assert rows[""] == ["run", "0002", "base", "0001", "change"]
    assert rows["val_bpb"] == ["1.750000", "1.700000", "+0.050000"]
    assert rows["steps *"] == ["92", "100", "-8%"]
    assert rows["tokens a second *"] == ["9,200", "10,000", "-8%"]
    assert rows["start-up seconds"] == ["4.0", "4.0", "+0.0"]
    assert rows["evaluation seconds *"] == ["1.5", "1.5", "+0.0"]
    assert rows["peak memory, GB *"] == ["2.0", "0.0", "+2.0"]
    assert rows["machine used by others"] == ["83%", "2%"]
    assert rows["loss at 50% of time *"] == ["3.6200", "3.5000", "+0.1200"]
    assert rows["loss at 100% of time *"] == ["2.2400", "2.0000", "+0.2400"]
    assert rows["loss at 92,000 tokens *"] == ["2.2400", "2.2400", "+0.0000"]
    assert lines[-1] == "* the run's own words, not the judge's"


def test_losses_at_equal_tokens_are_not_compared_where_learning_rates_differ():
    """After 80,000 tokens the shorter run is at its end, and the other one in the middle."""
    lines = table(side(2, steps=80, busy_others=0.03), side(), loop.DOMAIN)
    words = "(at 100% and 80% of the time: not comparable)"
    assert " ".join(rows_of(lines)["loss at 80,000 tokens *"]) == f"2.6000 2.6000 {words}"
    assert not any("used by others" in line for line in lines)
    heading, score = lines[:2]
    assert len(heading) == len(score) < 60  # the words do not make the columns wider


def test_table_leaves_out_what_says_nothing_and_a_fork_without_curves_has_a_short_one():
    bare = Side(Run(3, "3" * 40, "", 42, "", "experiment", score=1.6), Training([]))
    assert len(table(bare, bare, loop.DOMAIN)) == 2  # heading, score
    lines = table(side(2, device_others=2), bare, loop.DOMAIN)
    assert any(line.split()[:4] == ["steps", "*", "100", "-"] for line in lines)
    assert any(line.split()[-2:] == ["2", "-"] for line in lines if line.startswith("others on the device"))
    fork = loop.replace(loop.DOMAIN, explanations=(), steps="", curve_pattern="", batch_pattern="")
    assert len(table(bare, bare, fork)) == 2 and in_a_word(bare, bare, fork) == ""


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        ({"score": 1.8, "steps": 80}, "slower: 20% fewer tokens than its base"),
        ({"score": 1.8, "steps": 80, "end": 2.5}, "slower: 20% fewer tokens than its base"),  # its rate is at its end
        ({"score": 1.8, "steps": 92}, "slower: 8% fewer tokens than its base"),
        ({"score": 1.8, "steps": 92, "end": 2.5}, "slower and worse: 8% fewer tokens than its base, and a higher loss"),
        ({"score": 1.8, "steps": 92, "busy_others": 0.2}, "8% fewer tokens: the edit or the machine, these two runs"),
        ({"score": 1.8, "end": 2.5}, "worse: a higher loss at equal tokens, and not slower"),
        ({"score": 1.8, "end": 2.5, "busy_others": 0.2}, "worse: a higher loss at equal tokens, and not slower"),
        ({"score": 1.8, "steps": 50, "batch": 2000, "end": 2.5}, "worse: "),  # half the steps, of twice the size
        ({"score": 1.8, "steps": 120, "end": 2.5}, ""),  # its learning rate had not fallen yet where the base ended
        ({"score": 1.8}, ""),
        ({"score": 1.8, "steps": 97}, ""),
        ({"score": 1.6, "steps": 120}, "faster: 20% more tokens than its base"),
        ({"score": 1.6, "steps": 108}, "faster: 8% more tokens than its base"),
        ({"score": 1.6, "steps": 108, "device_others": 1}, "8% more tokens: the edit or the machine, these two runs"),
        ({"score": 1.6, "steps": 108, "end": 1.0}, ""),
        ({"score": 1.6, "steps": 80}, ""),
    ],
)
def test_word_is_said_only_where_the_curves_are_clear(candidate, word):
    said = in_a_word(side(2, **candidate), side(), loop.DOMAIN)
    assert said.startswith(word) and bool(said) == bool(word)
    assert ("equal tokens" in said) == ("equal tokens" in word or "higher loss" in word or word == "worse: ")
    if word:
        turned = in_a_word(side(2, **candidate), side(busy_others=0.2), loop.DOMAIN)
        assert turned.startswith("worse: ") or turned.endswith("these two runs cannot tell")


def test_swing_of_the_machines_speed_is_not_the_edits_doing(store):
    slow, base = side(2, score=1.8, steps=80), side()
    said = "20% fewer tokens: the edit or the machine, whose speed differed by 21% between runs of the same code"
    assert in_a_word(slow, base, loop.DOMAIN, swing=0.21) == said
    assert in_a_word(slow, base, loop.DOMAIN, swing=0.19).startswith("slower: ")
    for steps in (100, 121, 110):
        run = add_run(store, BASE, 1.0, "keep", base="", training_seconds=10.0, summary={"num_steps": f"{steps}"})
        (store.folder(run.number) / "run.log").write_text("batch 1,000 tokens = 1 row\n")
    assert speed_swing(store, BASE) == pytest.approx(0.21)
    assert speed_swing(store, "c" * 40) == 0


def test_weak_is_a_run_beside_others():
    assert is_weak(side(busy_others=0.11).run) and is_weak(side(device_others=1).run)
    assert not is_weak(side(busy_others=0.10, device_others=0).run) and not is_weak(side().run)


def test_marks_say_what_makes_a_score_weak_and_nothing_else():
    def marks(startup=10.0, evaluation=5.0, usual=(), budget=300.0, **facts) -> tuple[str, ...]:
        record = Record(1.0, "p", "val", 42, 0.5, 7, "d", {}, "s", "cpu", **facts)
        run = side(startup_seconds=startup, evaluation_seconds=evaluation).run
        return find_marks(record, run, list(usual), budget)

    def timed(name: str, startup: float | None, evaluation: float | None = 5.0) -> tuple[str, Run]:
        return name, side(startup_seconds=startup, evaluation_seconds=evaluation).run

    base = [timed("its base", 10.0)]
    assert marks() == marks(usual=base) == marks(startup=1e6) == marks(busy_others=0.10, device_others=0) == ()
    assert marks(busy_others=0.11) == ("others used 11% of the machine: this score is weak",)
    assert marks(device_others=2) == ("2 other processes were on the device: this score is weak",)
    assert marks(startup=50.0, usual=base) == marks(evaluation=40.0, usual=base) == ()  # twice as long and 30 s
    late = "it took 51 s to start, its base 10 s: compilation, or a head start"
    assert marks(startup=51.0, usual=base) == (late,)
    reasons = "compilation, a slower network, or training after the clock"
    assert marks(evaluation=41.0, usual=base) == (f"it took 41 s to evaluate, its base 5 s: {reasons}",)
    assert marks(1e6, 1e6, usual=[timed("its base", None, None)]) == ()  # of an older loop

    # 9 s are much beside a budget of 30 s. A base that had them makes them usual, but not a little more at every keep.
    late = "it took 13 s to start, its base 4 s: compilation, or a head start"
    assert marks(startup=13.0, usual=[timed("its base", 4.0)], budget=30.0) == (late,)
    later = [timed("its base", 12.0), timed("the baseline", 4.5), timed("the baseline", 4.0)]
    assert marks(startup=15.0, usual=later, budget=30.0) == marks(startup=11.0, usual=later, budget=30.0) == ()
    late = "it took 16 s to start, the baseline 4 s: compilation, or a head start"
    assert marks(startup=16.0, usual=later, budget=30.0) == (late,)
    assert marks(startup=2.1, usual=[timed("its base", 0.1)], budget=1.0) == ()
    assert marks(export_problem="a\nb") == ("the network could not be exported: a b",)


BASE = "b" * 40


def add_run(store: Store, commit: str, score: float, status: str, base: str = BASE, **facts) -> Run:
    """A run with its folder, and its row unless it was an audit's."""
    facts = {"description": "x", "purpose": "experiment", "score": score, "decision": status} | facts
    run = Run(number=store.new_folder(), commit=commit, base=base, seed=42, **facts)
    store.write_run(run)
    if run.purpose != "audit":
        store.rows.append(Row(commit[:7], score, 1.0, status, f"row {run.number}"))
    return run


def test_base_of_a_run_is_the_last_one_before_it_and_no_audits(store):
    first = add_run(store, BASE, 1.0, "keep", base="")
    second = add_run(store, BASE, 1.2, "keep", base="")
    add_run(store, BASE, 1.3, "audit", base="", purpose="audit")
    add_run(store, BASE, 0.0, "crash", base="")
    run = add_run(store, "c" * 40, 0.95, "discard", busy_others=0.4)
    later = add_run(store, BASE, 1.1, "keep", base="", busy_others=0.2)
    assert base_run(store, run).number == second.number and base_run(store, first) is None
    assert base_run(store, add_run(store, "d" * 40, 0.9, "keep")).number == later.number
    assert earlier_run(store, later).number == second.number and earlier_run(store, first) is None
    early = add_run(store, "e" * 40, 1.0, "keep", base="f" * 40)
    late = add_run(store, "f" * 40, 1.0, "keep", base="")
    assert base_run(store, early).number == late.number  # none came before it
    assert compare(run, second, loop.DOMAIN).startswith("val_bpb 0.950000 (-0.250000 to run 0002 of its base)")
    know(store, first, run)
    compared = [(name, other.number) for name, other in usual_runs(store, run)]
    assert compared == [("its base", 2), ("the baseline", 1), ("the baseline", 2), ("the baseline", 6)]
    assert usual_runs(store, first) == []


MARK = "others used 40% of the machine: this score is weak"


def know(store: Store, *runs: Run) -> None:
    """The refs of these attempts."""
    store.attempts = {run.number: run.commit for run in runs}
    store._commits = {run.commit[:7]: run.commit for run in runs}


def test_verdict_compares_two_runs_and_says_apart_what_is_believed_and_decides(store):
    store.trailer = lambda key: "another profile"
    first = add_run(store, BASE, 1.0, "keep", base="")
    add_run(store, BASE, 1.2, "keep", base="")
    add_run(store, BASE, 1.3, "audit", base="", purpose="audit")
    run = add_run(store, "c" * 40, 0.95, "keep", busy_others=0.4, marks=(MARK, "it took 51 s to start"))
    heading, scores, *_ = lines = explain(store, run)
    assert heading.split() == ["run", "0004", "base", "0002", "change"]
    assert scores.split() == ["val_bpb", "0.950000", "1.200000", "-0.250000"]
    assert lines[-4:] == [
        "base believed 1.100000: mean of runs 0001, 0002",
        "change that decides -0.150000, 2 standard errors 0.35 (noise of one run 0.14): "
        "within noise; better is kept all the same",
        "it took 51 s to start",
        "weak: the machine was busy during run 0004",
    ]
    for score in (1.21, 1.23):
        again = add_run(store, "c" * 40, score, "discard")
    lines = explain(store, again, with_commands=True)
    listed = "ccccccc ran 3 times: 0.950000, 1.210000, 1.230000"
    reason = "the mean of its repeats (the first run is left out: it was picked for being low)"
    assert lines[-2] == f"{listed}; believed: 1.220000, {reason}"
    assert lines[-1].startswith("change that decides +0.120000, ") and lines[-1].endswith(": within noise")

    late = add_run(store, "d" * 40, 5.0, "discard", base="c" * 40, device_others=1)
    store.write_run(loop.replace(again, busy_others=0.85))
    know(store, first, run, late)
    lines = explain(store, late, with_commands=True)
    assert lines[-3] == "base believed 1.220000: mean of runs 0005, 0006"
    assert lines[-2].startswith("change that decides +3.780000, ") and lines[-2].endswith(": over the noise")
    advice = "measure again, one after the other: uv run loop.py try --again 7, uv run loop.py try --base"
    assert lines[-1] == f"weak: the machine was busy during run 0007 and run 0006; {advice}"
    third = add_run(store, "e" * 40, 0.9, "keep", base="c" * 40)
    know(store, first, run, late, third)
    assert explain(store, third, with_commands=True)[-1].endswith(
        "run 0006; measure again: uv run loop.py try --again 4"
    )


def test_simplification_that_was_not_kept_says_why(store):
    store.trailer = lambda key: "another profile"
    sources = {"b": b"x = 1\ny = 2\n", "c": b"# less\nx = 1\n\nz = 2\n", "d": b"x = 1\n"}
    store.repository.read = lambda commit, path: sources[commit[0]]
    base = add_run(store, BASE, 1.0, "keep", base="")
    runs = [add_run(store, name * 40, 1.5, "discard", base=BASE, description="simplify: less") for name in "cd"]
    know(store, base, *runs)
    why = "not simpler: 2 lines of code, its base 2 (comments, blank lines and joined lines do not count)"
    assert why in explain(store, runs[0])
    assert any(line.startswith("simpler, 1 lines of code, its base 2, but ") for line in explain(store, runs[1]))
    kept = add_run(store, "f" * 40, 1.0001, "keep", description="simplify: less")
    assert any(line.endswith(": within noise; kept as a simplification") for line in explain(store, kept))


def test_champion_that_is_measured_again_stands_beside_its_own_earlier_run(store):
    store.trailer = lambda key: "pocket"
    first = add_run(store, BASE, 1.0, "keep", base="", busy_others=0.4, marks=(MARK,))
    know(store, first)
    assert explain(store, first)[1:] == [MARK]
    again = add_run(store, BASE, 1.2, "keep", base="", purpose="repeat")
    lines = explain(store, again, with_commands=True)
    assert lines[0].split() == ["run", "0002", "run", "0001", "change"]
    assert lines[-3:] == [
        "bbbbbbb ran 2 times: 1.000000, 1.200000; believed: 1.100000, the mean of all",
        "the same code as run 0001: only seed and machine differ; noise of one run 0.064",
        "weak: the machine was busy during run 0001; measure again: uv run loop.py try --base",
    ]
    assert explain(store, add_run(store, "c" * 40, 0.0, "crash")) == []


def test_latest_verdicts_are_of_different_experiments_oldest_first(store):
    add_run(store, BASE, 1.0, "keep", base="")
    for letter in "cdef":
        add_run(store, letter * 40, 1.1, "discard")
    add_run(store, "f" * 40, 1.2, "discard")
    add_run(store, "a" * 40, 0.0, "crash")
    store._commits = {run.commit[:7]: run.commit for run in store.read_runs()}
    told = latest_verdicts(store, read_beliefs(store))
    assert [text.partition("\t")[0] for text in told] == ["ddddddd", "eeeeeee", "fffffff"]
    assert "\trow 6\n" in told[-1] and "run 0006" in told[-1]


def test_discard_says_little_only_if_every_run_was_disturbed(store):
    for commit, *shares in (("c", 0.4), ("d", 0.4, 0.0), ("e", 0.0, 0.4), ("f", 0.4, 0.4), ("0", None)):
        for share in shares:
            add_run(store, commit * 40, 1.1, "discard", busy_others=share)
    add_run(store, "1" * 40, 0.9, "keep", busy_others=0.4)
    assert discarded_when_busy(store) == {"ccccccc", "fffffff"}


def test_change_is_over_the_noise_above_two_standard_errors():
    noise = Noise(0.1, "", is_assumed=False)  # an error is 0.1414
    beliefs = Beliefs({}, {"b" * 7: [1.0], "c" * 7: [0.72], "d" * 7: [1.29]}, noise)
    assert not beliefs.is_over_noise("c" * 40, BASE) and beliefs.is_over_noise("d" * 40, BASE)
