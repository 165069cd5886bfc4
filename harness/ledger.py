"""results.tsv as rows, the noise of its scores, and the decision. Pure functions, in the direction of the domain.

sigma is the standard deviation of one run of the same code, in the unit of the score.
"""

import ast
import io
import math
import statistics
import tokenize
from dataclasses import dataclass

from harness.contract import Domain

STATUSES = ("keep", "discard", "crash")
SIMPLIFY = "simplify:"  # a description that begins so asks for the other rule: less code at an equal score
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
    """The rows of a ledger, and the number of lines that are none. Forgiving: a hand may have written them."""
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
    squares, degrees_of_freedom = _squares_within_commits(rows)
    return math.sqrt(squares / degrees_of_freedom) if degrees_of_freedom else None


@dataclass(frozen=True)
class Noise:
    """The noise of one run, and where the figure comes from."""

    sigma: float
    source: str
    is_assumed: bool  # nothing was measured here


def find_noise(rows: list[Row], profile: str, domain: Domain) -> Noise:
    """What the repeats of this ledger say, pooled with what is known of the profile: one pair alone says little."""
    measured = measured_sigma(rows)
    is_known = profile in domain.assumed_sigma
    assumed = domain.sigma_of(profile)
    if not measured:
        origin = f"assumed, as measured for {profile}" if is_known else "assumed"
        return Noise(assumed, f"{origin}; --confirm measures it here", is_assumed=True)
    source = "from commits that were run more than once"
    if is_known:
        source += f", pooled with {assumed:g} as measured for {profile}"
        return Noise(deciding_sigma(rows, assumed), source, is_assumed=False)
    return Noise(measured, source, is_assumed=False)


def _squares_within_commits(rows: list[Row]) -> tuple[float, int]:
    """Sum of squared differences from each commit's mean, and its degrees of freedom."""
    groups = [values for values in scores_by_commit(rows).values() if len(values) > 1]
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    degrees_of_freedom = sum(len(values) - 1 for values in groups)
    return squares, degrees_of_freedom


def standard_error(before: list[float], after: list[float], sigma: float) -> float:
    """The standard error of the difference of two means."""
    return sigma * math.sqrt(1 / len(before) + 1 / len(after))


def is_resolved(before: list[float], after: list[float], sigma: float, domain: Domain) -> bool:
    """True if the gain is more than twice its standard error."""
    gain = domain.gain(statistics.fmean(before), statistics.fmean(after))
    return gain > 2 * standard_error(before, after, sigma)


# The plain rule: better is kept


def is_gain(before: float, after: float, domain: Domain) -> bool:
    return domain.gain(before, after) > 0


# --confirm: a good first score buys fresh runs, one after another, and these alone decide
#
# The constants were found by simulation: uv run tests/bench_noise.py prints what they cost, and what other rules would.
# Simulated nights, false keeps with this rule and with the plain one:
#     125 experiments with the effects that a night on an H100 had      0.15   3.9
#     125 experiments without any effect                                0.07   4.4
#     910 experiments without any effect                                0.06   6.4
# This rule makes 1.22 times the runs. Its price: it keeps every second gain of two to three sigmas and few smaller
# ones, so that the night ends five to eight sigmas above the plain rule's end. Of the rules with at most 1.25 times
# the runs, none came within one sigma of that end with as few false keeps.

FIRST_LOOK_SIGMAS = 1.0  # by which a first score must beat the champion's mean to buy a fresh run
CHAMPION_RUNS = (1, 2, 3, 4)  # fresh runs that the champion must have beside the candidate's first, second, ...
STILL_PROMISING = (0.5, 0.7, 0.9)  # standard errors of gain after the first, second, ... that buy one more
LUCK_SHARE = 1.15  # of the luckiest null's sqrt(2 ln n) standard errors: what a gain on fresh runs must exceed
LUCK_MARGIN = 0.55  # standard errors that are added to it, because there are several looks
KEPT_WEIGHT = 2  # n is what was tried, divided by 1 + so much for every gain kept
ASSUMED_DEGREES = 4  # of freedom that the assumed sigma counts for: two or three runs measure sigma badly


def deserves_second_look(champion: list[float], first: float, sigma: float, domain: Domain) -> bool:
    return domain.gain(statistics.fmean(champion), first) > FIRST_LOOK_SIGMAS * sigma


def least_confirmed_gain(tried: int, kept: int) -> float:
    """The gain, in standard errors, that fresh runs must exceed. `tried` and `kept`: see count_tried_and_kept.

    The more commits were tried, the luckier the luckiest of those without effect looks: of n commits, its score is
    about sqrt(2 ln n) standard errors too good. Where gains were found before, more are to be expected: every kept one
    lowers the threshold again.
    """
    luckiest_of = max(1.0, tried / (1 + KEPT_WEIGHT * kept))
    return LUCK_MARGIN + LUCK_SHARE * math.sqrt(2 * math.log(luckiest_of))


def verdict_on_fresh_runs(
    champion: list[float], fresh: list[float], sigma: float, tried: int, kept: int, domain: Domain
) -> str:
    """`keep`, `discard` or `look again`: what fresh runs of champion and candidate say so far.

    First scores have no part in it: a candidate's first score was selected for being good, and so was that of a
    champion. After every fresh run, a gain over the threshold is kept and one that is too small is dropped. Between the
    two one more run is made, as long as CHAMPION_RUNS goes on.
    """
    gain = domain.gain(statistics.fmean(champion), statistics.fmean(fresh))
    standard_errors = gain / standard_error(champion, fresh, sigma)
    if standard_errors > least_confirmed_gain(tried, kept):
        return "keep"
    is_last_look = len(fresh) == len(CHAMPION_RUNS)
    if not is_last_look and standard_errors > STILL_PROMISING[len(fresh) - 1]:
        return "look again"
    return "discard"


def count_tried_and_kept(rows: list[Row]) -> tuple[int, int]:
    """For the next verdict: how many commits were tried, baseline and candidate included, and how many gains kept."""
    tried = {row.commit for row in rows}
    kept = {row.commit for row in rows[1:] if row.status == "keep" and row.commit != rows[0].commit}
    return len(tried) + 1, len(kept)


def deciding_sigma(rows: list[Row], assumed: float) -> float:
    """sigma as measured here, pooled with the assumed one, which counts as ASSUMED_DEGREES of freedom."""
    squares, degrees_of_freedom = _squares_within_commits(rows)
    squares += assumed**2 * ASSUMED_DEGREES
    return math.sqrt(squares / (degrees_of_freedom + ASSUMED_DEGREES))


def fresh_scores(rows: list[Row], commit: str) -> list[float]:
    """The scores of a commit that were not selected: all of the baseline's, of another commit all but the first.

    The first score of a candidate is selected: only because it was good did the commit run again.
    """
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


# simplify: less code at an equal score


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


def syntax_size(source: bytes) -> int:
    """How much a source says, however its lines are wrapped: nodes of its syntax tree, text that stands alone left out.

    In another language than Python: words.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return len(source.split())
    texts = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(nodes) - 2 * len(texts)  # the statement, and the text in it


def is_less_code(before: bytes, after: bytes) -> bool:
    """Fewer lines that also say less: joining two lines, by a semicolon say, removes nothing."""
    return lines_of_code(after) < lines_of_code(before) and syntax_size(after) < syntax_size(before)


def sigma_to_give_away(rows: list[Row], assumed: float) -> float:
    """The measured sigma, but not more than the assumed one: on a busy machine everything would be within the noise."""
    measured = measured_sigma(rows)
    return assumed if measured is None else min(measured, assumed)


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
    """Whether a candidate with less code may stay: within one sigma of the best, and within what is left to give."""
    loss = domain.gain(after, before)
    if loss <= 0:  # nothing is given away
        return True
    return loss <= sigma and spent + loss <= GIVEN_AWAY_SIGMAS * sigma
