"""harness/verdict.py: a run beside its base, and in a word why it lost.

uv run pytest tests/test_verdict.py
"""

import pytest

import loop
from harness.contract import Record
from harness.curve import Point, Training
from harness.store import Run
from harness.verdict import Side, find_marks, in_a_word, is_weak, table


def side(number=1, score=1.7, steps=100, batch=1000, start=5.0, end=2.0, **changes) -> Side:
    """A run whose loss falls evenly with its tokens, from `start` to `end` at 100,000 of them."""
    summary = {"num_steps": f"{steps}", "eval_seconds": "1.5"}
    facts = {"score": score, "startup_seconds": 4.0, "training_seconds": 10.0, "summary": summary} | changes
    run = Run(number, f"{number}" * 40, "", 42, "an idea", "experiment", **facts)
    points = []
    for part in range(1, 11):
        step = steps * part // 10
        points.append(Point(step, part / 10, start - (start - end) * step * batch / 100_000))
    return Side(run, score, Training(points, batch))


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    """Name -> candidate, base, change."""
    width = lines[0].index("run ")
    return {line[:width].strip(): line[width:].split() for line in lines[:-1]}


def test_table_shows_both_runs_at_equal_time_and_at_equal_tokens():
    slow = side(2, score=1.75, steps=80, memory_gb=2.0)
    lines = table(slow, side(), loop.DOMAIN)
    assert max(map(len, lines)) < 80
    rows = rows_of(lines)
    assert rows[""] == ["run", "0002", "base", "1111111", "change"]
    assert rows["val_bpb"] == ["1.750000", "1.700000", "+0.050000"]
    assert rows["steps *"] == ["80", "100", "-20%"]
    assert rows["tokens a second *"] == ["8,000", "10,000", "-20%"]
    assert rows["start-up seconds"] == ["4.0", "4.0", "+0.0"]
    assert rows["evaluation seconds *"] == ["1.5", "1.5", "+0.0"]
    assert rows["peak memory, GB *"] == ["2.0", "0.0", "+2.0"]
    assert rows["loss at 50% of the time *"] == ["3.8000", "3.5000", "+0.3000"]
    assert rows["loss at 100% of the time *"] == ["2.6000", "2.0000", "+0.6000"]
    assert rows["loss at 80,000 tokens *"] == ["2.6000", "2.6000", "+0.0000"]
    assert rows["reached at this share of the time *"] == ["100%", "80%"]
    assert lines[-1] == "* the run's own words: the judge did not measure them"


def test_table_leaves_out_what_neither_run_says_and_a_fork_without_curves_has_a_short_one():
    bare = Side(Run(3, "3" * 40, "", 42, "", "experiment", score=1.6), 1.6, Training([]))
    assert len(table(bare, bare, loop.DOMAIN)) == 4  # heading, score, memory, the star's meaning
    lines = table(side(2), bare, loop.DOMAIN)
    assert any(line.split()[:4] == ["steps", "*", "100", "-"] for line in lines)
    fork = loop.replace(loop.DOMAIN, explanations=(), steps="", curve_pattern="", batch_pattern="")
    assert len(table(bare, bare, fork)) == 4 and in_a_word(bare, bare, fork) == ""


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        ({"score": 1.8, "steps": 80}, "slower: 20% fewer tokens"),
        ({"score": 1.8, "steps": 80, "end": 2.5}, "slower and worse: 20% fewer tokens"),
        ({"score": 1.8, "end": 2.5}, "worse: a higher loss at equal tokens"),
        ({"score": 1.8, "steps": 50, "batch": 2000, "end": 2.5}, "worse: "),  # half the steps, of twice the size
        ({"score": 1.8, "steps": 120, "end": 2.5}, ""),  # its learning rate had not fallen yet where the base ended
        ({"score": 1.8}, ""),
        ({"score": 1.8, "steps": 97}, ""),
        ({"score": 1.6, "steps": 120}, "faster: 20% more tokens"),
        ({"score": 1.6, "steps": 120, "end": 1.0}, ""),
        ({"score": 1.6, "steps": 80}, ""),
    ],
)
def test_word_is_said_only_where_the_curves_are_clear(candidate, word):
    said = in_a_word(side(2, **candidate), side(), loop.DOMAIN)
    assert said.startswith(word) and bool(said) == bool(word)


def test_weak_is_a_run_beside_others():
    assert is_weak(side(busy_others=0.11).run) and is_weak(side(device_others=1).run)
    assert not is_weak(side(busy_others=0.10, device_others=0).run) and not is_weak(side().run)


def test_marks_say_what_makes_a_score_weak_and_nothing_else():
    def marks(startup=10.0, base=None, **facts) -> tuple[str, ...]:
        record = Record(1.0, "p", "val", 42, 0.5, 7, "d", {}, "s", "cpu", **facts)
        return find_marks(record, startup, base)

    base = side(startup_seconds=10.0).run
    assert marks() == marks(base=base) == marks(startup=1e6) == marks(busy_others=0.10, device_others=0) == ()
    assert marks(busy_others=0.11) == ("others used 11% of the machine: this score is weak",)
    assert marks(device_others=2) == ("2 other processes were on the device: this score is weak",)
    assert marks(startup=50.0, base=base) == ()  # twice the base's and 30 s
    late = "it took 51 s to start, its base 10 s: compilation, or a head start"
    assert marks(startup=51.0, base=base) == (late,)
    assert marks(export_problem="a\nb") == ("the network could not be exported: a b",)
