"""harness/curve.py: the training curve in a run's log, whatever else the run printed there.

uv run pytest tests/test_curve.py
"""

import os

import pytest

import loop
from harness import curve
from harness.curve import (
    Point,
    loss_at_share,
    point_at_step,
    point_at_total,
    read_batch,
    read_curve,
    read_training,
)

PATTERN = loop.DOMAIN.curve_pattern
BATCH = "batch 2,048 tokens = 8 rows x 256 x 1 micro-steps\n"


def line(step: int, percent: object, loss: object, end: str = "\n") -> str:
    """A line as train.py logs it."""
    rest = "lr x1.00 | 54 ms | 37,926 tok/s | mfu 0.0% | epoch 1 | 28 s left"
    return f"step {step:05d} | {percent}% | loss {loss} | {rest}{end}"


def test_curve_is_read_from_lines_and_from_a_terminals_rewritten_line():
    points = [Point(12, 0.042, 5.1234), Point(40, 0.25, 4.0), Point(90, 1.0, 3.5)]
    plain = BATCH + line(12, 4.2, 5.1234) + line(40, 25.0, 4.0) + line(90, 100.0, 3.5) + "---\nval_bpb: 1.7\n"
    assert read_curve(plain, PATTERN) == points
    rewritten = "".join(f"\r{line(*point, end='')}\033[K" for point in ((12, 4.2, 5.1234), (40, 25.0, 4.0)))
    assert read_curve(f"{BATCH}{rewritten}\r{line(90, 100.0, 3.5)}", PATTERN) == points
    assert read_batch(plain, loop.DOMAIN.batch_pattern) == 2048


def test_what_is_no_point_is_left_out():
    rubbish = [
        line(20, 10.0, "nan"), line(20, 10.0, "inf"), line(20, "1.2.3", 4.0), line(20, 900.0, 4.0),
        line(20, 10.0, "x" * 31), line(5, 12.0, 4.0), line(30, 1.0, 4.0), "step 00021 | 10.0% | loss\n", "\x00\ufffd\n",
    ]  # fmt: skip
    text = line(10, 5.0, 5.0) + "".join(rubbish) + line(40, 20.0, 4.0)
    assert read_curve(text, PATTERN) == [Point(10, 0.05, 5.0), Point(40, 0.2, 4.0)]
    assert read_curve(text, "") == [] and read_batch(BATCH, "") is None
    assert read_batch("batch 0 tokens = \n", loop.DOMAIN.batch_pattern) is None
    assert read_batch("batch ,, tokens = \n", loop.DOMAIN.batch_pattern) is None


def test_loss_between_points_is_linear_and_unknown_far_from_any():
    points = [Point(10, 0.1, 5.0), Point(30, 0.3, 4.0), Point(40, 0.4, 3.0), Point(100, 0.97, 2.0)]
    assert loss_at_share(points, 0.25) == pytest.approx(4.25)
    assert loss_at_share(points, 0.06) == 5.0 and loss_at_share(points, 0.01) is None
    assert loss_at_share(points, 1.0) == 2.0  # the last step ended at 97 %
    assert loss_at_share(points[:3], 1.0) is None
    assert loss_at_share(points, 0.75) is None  # the middle of the log was cut
    assert loss_at_share([], 0.5) is None
    assert point_at_step(points, 35) == Point(35, pytest.approx(0.35), pytest.approx(3.5))
    assert point_at_step(points, 10) == points[0] and point_at_step(points, 9) is None
    assert point_at_step(points, 101) is None and point_at_step(points, 70) is None


def test_training_of_a_folder_counts_tokens_and_a_fork_may_have_no_curve(tmp_path):
    (tmp_path / "run.log").write_text(BATCH + line(10, 50.0, 4.0) + line(20, 100.0, 3.0))
    training = read_training(tmp_path, loop.DOMAIN)
    assert training.total == 20 * 2048
    assert point_at_total(training, 15 * 2048) is None  # half of the budget lies between the two points
    assert point_at_total(training, 20 * 2048) == Point(20, 1.0, 3.0)
    without = loop.replace(loop.DOMAIN, curve_pattern="", batch_pattern="")
    assert read_training(tmp_path, without).points == []
    assert read_training(tmp_path / "missing", loop.DOMAIN).points == []
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "run.log").unlink()
    (tmp_path / "pipe.log").rename(tmp_path / "run.log")  # reading it would never end
    assert read_training(tmp_path, loop.DOMAIN).points == []


def test_long_log_is_read_in_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "MAX_LOG_BYTES", 2**20)
    monkeypatch.setattr(curve, "MAX_POINTS", 256)
    begin = "".join(line(step, f"{step / 400:.1f}", 4.0) for step in range(1, 20_000))
    with open(tmp_path / "run.log", "w") as file:
        file.write(begin + "x" * 2**20 + line(40_000, 100.0, 3.0))
    points = read_training(tmp_path, loop.DOMAIN).points
    assert 128 <= len(points) <= 257
    assert points[0].step == 1 and points[-1] == Point(40_000, 1.0, 3.0)


def test_pattern_without_its_groups_is_refused_at_once():
    with pytest.raises(ValueError, match="no group loss, percent"):
        loop.replace(loop.DOMAIN, curve_pattern=r"step (?P<step>\d+)")
