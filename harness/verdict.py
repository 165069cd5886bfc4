"""What stands beside a score: the marks that make it weaker, and how it differs from its base. Pure functions."""

import math

from harness.contract import Domain, Record
from harness.screen import duration, one_line
from harness.store import Run

BUSY_SHARE = 0.10  # of the machine, used by others: over it a score is weak
STARTUP_FACTOR = 2  # a start-up this many times the base's,
STARTUP_EXTRA = 30  # and this many seconds longer, is marked: compilation may explain it, training before the clock too


def find_marks(record: Record, startup_seconds: float, base: Run | None) -> tuple[str, ...]:
    """What a person should know before believing the score of a run."""
    marks = []
    if record.busy_others is not None and record.busy_others > BUSY_SHARE:
        marks.append(f"others used {record.busy_others:.0%} of the machine: this score is weak")
    if record.device_others:
        marks.append(f"{record.device_others} other processes were on the device: this score is weak")
    if base is not None and base.startup_seconds is not None:
        limit = STARTUP_FACTOR * base.startup_seconds + STARTUP_EXTRA
        if startup_seconds > limit:
            usual = duration(base.startup_seconds)
            taken = duration(startup_seconds)
            marks.append(f"it took {taken} to start, its base {usual}: compilation, or a head start")
    if record.export_problem:
        marks.append(f"the network could not be exported: {one_line(record.export_problem, 90)}")
    return tuple(marks)


def number(run: Run, key: str) -> float | None:
    """A finite number that a run printed in its summary; None where there is none."""
    try:
        value = float(run.summary[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def compare(run: Run, base: Run | None, domain: Domain) -> str:
    """The score of a run and, where the base's is known, the difference and what may explain it."""
    text = f"{domain.metric} {run.score:.6f}"
    if base is None or not base.score:
        return f"{text}, {duration(run.seconds)}"
    text += f" ({run.score - base.score:+.6f} to its base)"
    steps = number(run, domain.steps)
    steps_of_base = number(base, domain.steps)
    if steps and steps_of_base:
        text += f", {steps:.0f} steps ({steps / steps_of_base - 1:+.0%})"
    text += f", {run.memory_gb:.1f} GB ({run.memory_gb - base.memory_gb:+.1f})"
    return f"{text}, {duration(run.seconds)}"
