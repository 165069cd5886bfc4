"""ledger.py: results.tsv as text and as rows, the noise of its scores, and the decision. Pure functions.

A score is in bits per byte (bpb), lower is better. sigma is the standard deviation of one run of the same code.
"""

import math
import re
import statistics
from dataclasses import dataclass

COLUMNS = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
ASSUMED_SIGMA = {"climbmix": 0.0004, "pocket": 0.014}  # bpb, by profile, for a ledger in which no commit ran twice
AGAIN = "within noise: run again"  # ends the description of a gain that is not believed before a second run


@dataclass(frozen=True)
class Row:
    commit: str  # 7 characters
    val_bpb: float  # 0 for a crash
    memory_gb: float  # GiB
    status: str  # keep, discard or crash
    description: str

    def __str__(self) -> str:
        return f"{self.commit}\t{self.val_bpb:.6f}\t{self.memory_gb:.1f}\t{self.status}\t{self.description}\n"


def parse_ledger(text: str) -> tuple[list[Row], int]:
    """The rows of a ledger and the number of lines that are none; forgiving, an agent may have written it by hand."""
    rows, bad = [], 0
    for line in filter(str.strip, text.splitlines()):
        cells = line.split("\t", 4) if line.count("\t") > 2 else line.split(None, 4)
        try:
            commit, score, memory, status = cells[0].strip(), float(cells[1]), float(cells[2]), cells[3].strip().lower()
            if not math.isfinite(score) or status not in ("keep", "discard", "crash"):
                raise ValueError
            rows.append(Row(commit, score, memory, status, "".join(cells[4:]).strip()))
        except (ValueError, IndexError):
            bad += cells[0].strip().lower() != "commit"
    return rows, bad


def one_line(text: str, limit: int = 200) -> str:
    """Fit for a cell of the ledger: no tab, newline or other control character, nor what UTF-8 cannot hold."""
    return " ".join(re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", text).split())[:limit].rstrip()


def scores(rows: list[Row]) -> dict[str, list[float]]:
    """Commit -> its scores (bpb), crashes left out, in the order of the ledger."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.status != "crash":
            found.setdefault(row.commit, []).append(row.val_bpb)
    return found


def noise(rows: list[Row]) -> float | None:
    """Pooled standard deviation (bpb) of the commits that were run more than once; None where none was."""
    groups = [values for values in scores(rows).values() if len(values) > 1]
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups)) if groups else None


def is_resolved(before: list[float], after: list[float], sigma: float) -> bool:
    """True if the means differ by more than twice the standard error of their difference."""
    gain = statistics.fmean(before) - statistics.fmean(after)
    return gain > 2 * sigma * math.sqrt(1 / len(before) + 1 / len(after))


def decide(champion: list[float], candidate: list[float], sigma: float | None) -> str:
    """`keep`, `discard` or `again` (one more run on a fresh seed), from the scores (bpb) of the two commits.

    Without sigma the plain rule: lower is kept. With it, a first gain under 2*sqrt(2)*sigma, twice the noise of the
    difference of two runs, is not believed before a second run; then the means decide.
    """
    gain = statistics.fmean(champion) - statistics.fmean(candidate)
    if gain <= 0:
        return "discard"
    if sigma is None:
        return "keep"
    if len(candidate) == 1:
        return "keep" if gain >= 2 * math.sqrt(2) * sigma else "again"
    return "keep" if is_resolved(champion, candidate, sigma) else "discard"
