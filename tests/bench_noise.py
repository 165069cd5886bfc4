"""How many false keeps each rule makes in a night of experiments, and what it costs in runs: a simulation.

    uv run tests/bench_noise.py [LEDGER] [--sigma 0.00037] [--nights 2000]

The decisions are the loop's own (harness/ledger.py): the plain rule, and --confirm with sigma measured as the loop
measures it. A night is the true effects of a ledger: of each scored row, its difference from the champion of its time
(crashes left out), in the order of the ledger; without LEDGER an invented set, and it says so. Each run of a commit
measures its true score plus Gaussian noise. An effect that is kept moves the champion's true score by itself, one that
is not leaves it. A false keep is a kept experiment whose true effect is no improvement; a gain missed is an improvement
that was not kept.

The effects were themselves measured once, under a rule of "lower is kept": they hold noise too, so that the spread of
true effects is somewhat narrower than simulated here. Figures are means over nights, ± their standard error.

The second part is a night with many workers, whose candidates may end when another is the champion: such a gain is run
again on the new one. It has the same number of runs for every number of workers.
"""

import argparse
import heapq
import math
import random
import statistics
import sys
from collections import deque
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import ledger
from harness.ledger import Row
from loop import BASELINE_RUNS, DOMAIN

RULES = ("plain", "--confirm")
FIGURES = ("kept", "false keeps", "gains missed", "final true bpb", "runs")


@dataclass
class Night:
    """What came of one simulated night: the values of FIGURES."""

    kept: int = 0
    false_keeps: int = 0
    gains_missed: int = 0
    final: float = 0.0
    runs: int = 0


class Simulation:
    """A night's ledger: true scores, noise, and the rule's decisions."""

    def __init__(self, baseline: float, sigma: float, rule: str, rng: random.Random):
        self.rows: list[Row] = []
        self.true_score = baseline
        self.champion = "baseline"
        self.true_sigma = sigma
        self.confirms = rule == "--confirm"
        self.rng = rng
        for _ in range(BASELINE_RUNS if self.confirms else 1):
            self.rows.append(self.run("baseline", baseline, "keep"))

    def run(self, commit: str, true_score: float, status: str) -> Row:
        return Row(commit, round(self.rng.gauss(true_score, self.true_sigma), 6), 0.0, status, "")

    def experiment(self, commit: str, effect: float) -> bool:
        """Run one experiment; whether it was kept."""
        true_score = self.true_score + effect
        first = self.run(commit, true_score, "discard").score
        scores = [first]
        if self.confirms:
            is_kept = self.confirm(commit, true_score, scores)
        else:
            is_kept = ledger.is_gain(ledger.best_estimate(self.rows, self.champion), first, DOMAIN)
        status = "keep" if is_kept else "discard"
        self.rows += [Row(commit, score, 0.0, status, "") for score in scores]
        if is_kept:
            self.champion = commit
            self.true_score = true_score
        return is_kept

    def confirm(self, commit: str, true_score: float, scores: list[float]) -> bool:
        """The rule of --confirm, as loop.py applies it; fresh scores are appended to `scores`."""
        of_champion = ledger.fresh_scores(self.rows, self.champion)
        sigma = ledger.measured_sigma(self.rows)
        if not ledger.deserves_second_look(of_champion, scores[0], sigma, DOMAIN):
            return False
        fresh = [self.run(commit, true_score, "discard").score for _ in range(ledger.FRESH_RUNS)]
        scores += fresh
        tried = len({row.commit for row in self.rows})
        return ledger.is_confirmed(of_champion, fresh, sigma, tried, DOMAIN)


def simulate_night(baseline: float, effects: list[float], rule: str, sigma: float, rng: random.Random) -> Night:
    simulation = Simulation(baseline, sigma, rule, rng)
    night = Night()
    for number, effect in enumerate(effects):
        is_kept = simulation.experiment(str(number), effect)
        is_better = effect < 0
        night.kept += is_kept
        night.false_keeps += is_kept and not is_better
        night.gains_missed += is_better and not is_kept
    night.final = simulation.true_score
    night.runs = len(simulation.rows)
    return night


def effects_of(rows: list[Row]) -> tuple[float, list[float]]:
    """The baseline's score, and each later scored row's difference from the champion of its time (negative: better)."""
    scored = [row for row in rows if row.status != "crash"]
    champion = scored[0].score
    effects = []
    for row in scored[1:]:
        effects.append(row.score - champion)
        if row.status == "keep":
            champion = row.score
    return scored[0].score, effects


def invented_effects() -> tuple[float, list[float]]:
    """125 effects: a few large gains, many small losses, some large ones. Invented, not measured."""
    rng = random.Random(0)
    gains = [-0.01 * 0.6**n for n in range(12)]
    small_losses = [abs(rng.gauss(0, 0.001)) for _ in range(100)]
    large_losses = [rng.uniform(0.003, 0.01) for _ in range(13)]
    effects = gains + small_losses + large_losses
    rng.shuffle(effects)
    return 1.0, effects


def print_rule(rule: str, nights: list[Night], plain_means: list[float]) -> list[float]:
    """One line of the table; the means of its figures."""
    means = []
    cells = []
    columns = zip(*map(astuple, nights), strict=True)
    for index, (figure, column) in enumerate(zip(FIGURES, columns, strict=True)):
        mean = statistics.fmean(column)
        error = statistics.stdev(column) / math.sqrt(len(column))
        means.append(mean)
        if figure == "final true bpb":
            cells.append(f"{mean:.6f} ± {error:.6f}")
            continue
        of_plain = plain_means[index] if plain_means else mean
        cells.append(f"{mean:.2f} ± {error:.2f} (x {mean / (of_plain or 1):.2f})")
    print(f"{rule:12}" + "".join(f"{cell:>26}" for cell in cells))
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Many workers: a candidate may end when its base is the champion no longer

RUN_SECONDS = 300.0
RUN_JITTER = 15.0  # seconds, one standard deviation
NIGHT_RUNS = 910
PARALLEL_WORKERS = (1, 4, 16, 64)
PARALLEL_FIGURES = ("hours", "kept", "stale, % of runs", "run again, % of runs", "final true bpb")


@dataclass
class Candidate:
    """A run in flight."""

    effect: float
    base: int  # number of the champion that it edits
    true_score: float
    is_again: bool = False  # a gain on a former champion, on its second run or later


def ideas_of_night(effects: list[float], each_gain_once: bool, rng: random.Random) -> list[float]:
    """The true effects of NIGHT_RUNS ideas: drawn from the ledger's, or its gains once and the rest drawn."""
    if not each_gain_once:
        return rng.choices(effects, k=NIGHT_RUNS)
    gains = [effect for effect in effects if effect < 0]
    losses = [effect for effect in effects if effect >= 0]
    ideas = gains + rng.choices(losses, k=NIGHT_RUNS - len(gains))
    rng.shuffle(ideas)
    return ideas


def parallel_night(
    baseline: float, ideas: list[float], sigma: float, workers: int, rng: random.Random
) -> tuple[float, ...]:
    """A night of NIGHT_RUNS runs under the plain rule, as the loop schedules them: the values of PARALLEL_FIGURES.

    Effects add up in truth, and every edit merges; the loop does not know that and runs every merged edit again.
    """
    champions = [(baseline, rng.gauss(baseline, sigma))]  # true and measured, of each champion in turn
    flying: list[tuple[float, int, Candidate]] = []  # when it ends, its number, what it is
    again: deque[float] = deque()  # effects of gains on former champions
    clock = 0.0
    launched = stale = repeated = 0
    while launched < NIGHT_RUNS or flying:
        while launched < NIGHT_RUNS and len(flying) < workers:
            is_again = bool(again)
            effect = again.popleft() if is_again else ideas[launched - repeated]
            base = len(champions) - 1
            candidate = Candidate(effect, base, champions[base][0] + effect, is_again)
            heapq.heappush(flying, (clock + rng.gauss(RUN_SECONDS, RUN_JITTER), launched, candidate))
            launched += 1
            repeated += is_again
        clock, _, candidate = heapq.heappop(flying)
        is_stale = candidate.base != len(champions) - 1
        stale += is_stale
        score = rng.gauss(candidate.true_score, sigma)
        if not ledger.is_gain(champions[candidate.base][1], score, DOMAIN):
            continue
        if is_stale:
            again.append(candidate.effect)
        else:
            champions.append((candidate.true_score, score))
    share = 100 / NIGHT_RUNS
    return clock / 3600, len(champions) - 1, stale * share, repeated * share, champions[-1][0]


def print_parallel(baseline: float, effects: list[float], sigma: float, nights: int) -> None:
    for each_gain_once in (False, True):
        gains = "the ledger's gains once each" if each_gain_once else "gains as often as in the ledger"
        print(f"\n{NIGHT_RUNS} runs of {RUN_SECONDS:.0f} s for every number of workers, plain rule, {gains}\n")
        print(f"{'workers':22}" + "".join(f"{name:>26}" for name in PARALLEL_FIGURES))
        for workers in PARALLEL_WORKERS:
            found = []
            for seed in range(nights):
                rng = random.Random(seed)
                ideas = ideas_of_night(effects, each_gain_once, rng)
                found.append(parallel_night(baseline, ideas, sigma, workers, rng))
            cells = []
            for name, column in zip(PARALLEL_FIGURES, zip(*found, strict=True), strict=True):
                digits = 6 if name == "final true bpb" else 2
                error = statistics.stdev(column) / math.sqrt(nights)
                cells.append(f"{statistics.fmean(column):.{digits}f} ± {error:.{digits}f}")
            print(f"{workers:<22}" + "".join(f"{cell:>26}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", nargs="?", type=Path, metavar="LEDGER")
    parser.add_argument("--sigma", type=float, default=0.00037, help="noise of one run, bpb (default 0.00037)")
    parser.add_argument("--nights", type=int, default=2000, help="simulated nights a rule (default 2000)")
    args = parser.parse_args()
    if args.ledger:
        rows, _ = ledger.parse_ledger(args.ledger.read_text())
        baseline, effects = effects_of(rows)
        source = "of the ledger"
    else:
        baseline, effects = invented_effects()
        source = "invented (no LEDGER was given)"
    gains = [effect for effect in effects if effect < 0]
    ideal = baseline + sum(gains)
    print(f"{len(effects)} effects {source}, {len(gains)} of them improvements: {baseline:.6f} -> {ideal:.6f} if those")
    print(f"were kept; sigma {args.sigma}, {args.nights} nights a rule, mean ± standard error (x: ratio to plain)\n")
    print(f"{'rule':12}" + "".join(f"{name:>26}" for name in FIGURES))
    plain_means: list[float] = []
    for rule in RULES:
        nights = []
        for seed in range(args.nights):  # the same seeds for every rule
            nights.append(simulate_night(baseline, effects, rule, args.sigma, random.Random(seed)))
        means = print_rule(rule, nights, plain_means)
        plain_means = plain_means or means
    print_parallel(baseline, effects, args.sigma, max(10, args.nights // 20))
    return 0


if __name__ == "__main__":
    sys.exit(main())
