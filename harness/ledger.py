"""results.tsv as rows, the noise of its scores, and the decision. Pure functions, in the direction of the domain.

sigma is the standard deviation of one run of the same code, in the unit of the score.
"""

import io
import math
import statistics
import tokenize
from dataclasses import dataclass

from harness.contract import Domain

STATUSES = ("keep", "discard", "crash")
SIMPLIFY = "simplify:"  # a description that begins so asks for the other rule: fewer lines at an equal score
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
GIVEN_AWAY_SIGMAS = 2  # what all the simpler keeps together may give away


@dataclass(frozen=True)
class Row:
    """One run of the ledger."""

    commit: str  # 7 characters
    score: float  # 0 for a crash
    memory_gb: float  # GiB
    status: str  # keep, discard or crash
    description: str

    def __str__(self) -> str:
        return f"{self.commit}\t{self.score:.6f}\t{self.memory_gb:.1f}\t{self.status}\t{self.description}\n"


def parse_ledger(text: str) -> tuple[list[Row], int]:
    """The rows of a ledger and the number of lines that are none; forgiving, an agent may have written it by hand."""
    rows = []
    bad = 0
    for line in filter(str.strip, text.splitlines()):
        cells = line.split("\t", 4) if line.count("\t") > 2 else line.split(None, 4)
        row = _parse_row(cells)
        if row is not None:
            rows.append(row)
        elif cells[0].strip().lower() != "commit":
            bad += 1
    return rows, bad


def _parse_row(cells: list[str]) -> Row | None:
    try:
        commit = cells[0].strip()
        score = float(cells[1])
        memory = float(cells[2])
        status = cells[3].strip().lower()
    except (ValueError, IndexError):
        return None
    if not math.isfinite(score) or status not in STATUSES:
        return None
    return Row(commit, score, memory, status, "".join(cells[4:]).strip())


def scores_by_commit(rows: list[Row]) -> dict[str, list[float]]:
    """Commit -> its scores, crashes left out, in the order of the ledger."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.status != "crash":
            found.setdefault(row.commit, []).append(row.score)
    return found


def measured_sigma(rows: list[Row]) -> float | None:
    """Pooled standard deviation of the commits that were run more than once; None where none was."""
    groups = [values for values in scores_by_commit(rows).values() if len(values) > 1]
    if not groups:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    degrees_of_freedom = sum(len(values) - 1 for values in groups)
    return math.sqrt(squares / degrees_of_freedom)


def standard_error(before: list[float], after: list[float], sigma: float) -> float:
    """Of the difference of two means."""
    return sigma * math.sqrt(1 / len(before) + 1 / len(after))


def is_resolved(before: list[float], after: list[float], sigma: float, domain: Domain) -> bool:
    """True if the gain is more than twice its standard error."""
    gain = domain.gain(statistics.fmean(before), statistics.fmean(after))
    return gain > 2 * standard_error(before, after, sigma)


# The plain rule: better is kept


def is_gain(before: float, after: float, domain: Domain) -> bool:
    return domain.gain(before, after) > 0


# --confirm: a first gain only buys a second look, and the decision is made on fresh seeds alone

FRESH_RUNS = 2  # more runs of a candidate whose first score was a gain, and of a champion that has none
FIRST_LOOK_SIGMAS = 0.6  # standard errors that a first gain must have: a null passes in one case of four
LUCK_SHARE = 0.25  # of the luckiest of n nulls, sqrt(2 ln n) standard errors: what fresh seeds must exceed


def deserves_second_look(champion: list[float], first: float, sigma: float, domain: Domain) -> bool:
    gain = domain.gain(statistics.fmean(champion), first)
    return gain > FIRST_LOOK_SIGMAS * standard_error(champion, [first], sigma)


def is_confirmed(champion: list[float], fresh: list[float], sigma: float, tried: int, domain: Domain) -> bool:
    """Whether fresh seeds of both confirm a gain; `tried` experiments have been, this one included.

    The more are tried, the luckier the luckiest null looks: the threshold grows with their number. The two constants
    are a compromise found by simulation (tests/bench_noise.py): fewer false keeps, about as good a model in the end.
    """
    luckiest_null = math.sqrt(2 * math.log(max(tried, 2)))
    gain = domain.gain(statistics.fmean(champion), statistics.fmean(fresh))
    return gain > LUCK_SHARE * luckiest_null * standard_error(champion, fresh, sigma)


def fresh_scores(rows: list[Row], commit: str) -> list[float]:
    """Scores of a commit that did not choose it: all of the baseline's; of others, not the first."""
    scores = scores_by_commit(rows).get(commit, [])
    is_baseline = bool(rows) and rows[0].commit == commit
    return scores if is_baseline else scores[1:]


def believed_scores(rows: list[Row]) -> dict[str, list[float]]:
    """Commit -> its fresh scores; of a commit that ran once, the only one."""
    found = scores_by_commit(rows)
    for commit, scores in found.items():
        is_baseline = rows[0].commit == commit
        if not is_baseline and len(scores) > 1:
            found[commit] = scores[1:]
    return found


def best_estimate(rows: list[Row], commit: str) -> float | None:
    """The mean of the scores that are believed."""
    scores = believed_scores([row for row in rows if row.commit in (commit, rows[0].commit)]).get(commit)
    return statistics.fmean(scores) if scores else None


# simplify: fewer lines of code at an equal score


def wants_simpler_rule(description: str) -> bool:
    return description.lower().startswith(SIMPLIFY)


def lines_of_code(source: bytes) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings or other text that stands alone.

    In another language than Python: lines that are not blank.
    """
    try:
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return sum(bool(line.strip()) for line in source.splitlines())
    lines: set[int] = set()
    begins_statement = True
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            begins_statement = True
        elif token.type not in LAYOUT:
            stands_alone = token.type == tokenize.STRING and begins_statement
            if not stands_alone:
                lines.update(range(token.start[0], token.end[0] + 1))
            begins_statement = False
    return len(lines)


def given_away(rows: list[Row], domain: Domain) -> float:
    """What the simpler keeps cost so far, in the unit of the score."""
    total = 0.0
    champion = None
    for row in rows:
        if row.status != "keep" or row.commit == champion:
            continue
        if champion is not None and wants_simpler_rule(row.description):
            before = best_estimate(rows, champion)
            after = best_estimate(rows, row.commit)
            total += max(0.0, domain.gain(after, before))
        champion = row.commit
    return total


def is_simpler_keep(before: float, after: float, sigma: float, spent: float, domain: Domain) -> bool:
    """Whether a candidate with fewer lines may stay: within one sigma of the best, and within what is left to give."""
    loss = domain.gain(after, before)
    if loss <= 0:  # nothing is given away
        return True
    return loss <= sigma and spent + loss <= GIVEN_AWAY_SIGMAS * sigma
