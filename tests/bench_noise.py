"""How many false keeps each rule makes in a night of experiments, and what it costs in runs: a simulation.

    uv run tests/bench_noise.py [LEDGER] [--sigma 0.00037] [--nights 2000]

The decision and the estimate of sigma are loop.py's own. A night is the true effects of a ledger: of each scored row,
its difference from the champion of its time (crashes left out), in the order of the ledger; without LEDGER a synthetic
set, stated as such. Each run of a commit measures its true bpb plus Gaussian noise. An effect that is kept lowers the
champion's true bpb by itself, one that is not leaves it. A false keep is a kept experiment whose true effect is no
improvement; a gain missed is an improvement that was not kept.

The effects were themselves measured once, under a rule of "lower is kept": they hold noise too, so that the spread of
true effects is somewhat narrower than simulated here. Figures are means over nights, ± their standard error.
"""

import argparse
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ledger import Row, decide, noise, parse_ledger

RULES = {  # name -> runs of the baseline; with one, no commit is run twice and the rule is the plain one
    "plain": 1,
    "confirm, 2 replicates": 2,
    "confirm, 3 replicates": 3,
    "confirm, 5 replicates": 5,
}
FIGURES = "kept", "false keeps", "gains missed", "final true bpb", "runs"


def effects_of(rows: list[Row]) -> tuple[float, list[float]]:
    """(The baseline's bpb, each later scored row's difference from the champion of its time; negative is better)."""
    champion, effects = None, []
    for row in rows:
        if row.status == "crash":
            continue
        if champion is not None:
            effects.append(row.val_bpb - champion)
        if champion is None or row.status == "keep":
            champion = row.val_bpb
    first = next(row.val_bpb for row in rows if row.status != "crash")
    return first, effects


def synthetic_effects() -> tuple[float, list[float]]:
    """125 effects: a few large gains early, many small losses, some large ones. Invented, not measured."""
    rng = random.Random(0)
    gains = [-0.01 * 0.6**n for n in range(12)]
    losses = [abs(rng.gauss(0, 0.001)) for _ in range(100)] + [rng.uniform(0.003, 0.01) for _ in range(13)]
    effects = gains + losses
    rng.shuffle(effects)
    return 1.0, effects


def night(baseline: float, effects: list[float], replicates: int, sigma: float, rng: random.Random) -> list[float]:
    """One simulated night under a rule: the values of FIGURES."""

    def run(commit: str, true_bpb: float) -> list[float]:
        found[commit] = [*found.get(commit, []), round(rng.gauss(true_bpb, sigma), 6)]
        return found[commit]

    def estimate() -> float | None:  # of sigma: the loop's own, from the commits that were run more than once
        again = {commit: scores for commit, scores in found.items() if len(scores) > 1}
        return noise([Row(commit, score, 0, "keep", "") for commit in again for score in again[commit]])

    found: dict[str, list[float]] = {}  # commit -> its scores
    champion, true_bpb, kept, false, missed = "baseline", baseline, 0, 0, 0
    for _ in range(replicates):
        run(champion, true_bpb)
    estimated = estimate()
    for number, effect in enumerate(effects):
        commit, verdict = str(number), "again"
        while verdict == "again":  # as Ratchet.experiment
            verdict = decide(found[champion], run(commit, true_bpb + effect), estimated)
            if len(found[commit]) > 1:
                estimated = estimate()
        if verdict == "keep":
            champion, true_bpb = commit, true_bpb + effect
        kept += verdict == "keep"
        false += verdict == "keep" and effect >= 0
        missed += verdict != "keep" and effect < 0
    return [kept, false, missed, true_bpb, sum(map(len, found.values()))]


def simulate(baseline: float, effects: list[float], replicates: int, sigma: float, nights: int) -> list[list[float]]:
    """The figures of many nights, a column each; the same nights' seeds for every rule."""
    return [list(column) for column in zip(*(
        night(baseline, effects, replicates, sigma, random.Random(seed)) for seed in range(nights)
    ), strict=True)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", nargs="?", type=Path, metavar="LEDGER")
    parser.add_argument("--sigma", type=float, default=0.00037, help="noise of one run, bpb (default 0.00037)")
    parser.add_argument("--nights", type=int, default=2000, help="simulated nights a rule (default 2000)")
    args = parser.parse_args()
    rows = parse_ledger(args.ledger.read_text())[0] if args.ledger else None
    baseline, effects = effects_of(rows) if rows else synthetic_effects()
    source = "of the ledger" if rows else "invented (no LEDGER was given)"
    better = sum(effect < 0 for effect in effects)
    ideal = baseline + sum(effect for effect in effects if effect < 0)
    print(f"{len(effects)} effects {source}, {better} of them improvements: {baseline:.6f} -> {ideal:.6f} if those")
    print(f"were kept; sigma {args.sigma}, {args.nights} nights a rule, mean ± standard error (x: ratio to plain)\n")
    print(f"{'rule':22}" + "".join(f"{name:>26}" for name in FIGURES))
    plain: list[float] = []
    for name, replicates in RULES.items():
        columns = simulate(baseline, effects, replicates, args.sigma, args.nights)
        means = [statistics.fmean(column) for column in columns]
        plain = plain or means
        cells = []
        for figure, column, mean, before in zip(FIGURES, columns, means, plain, strict=True):
            error = statistics.stdev(column) / math.sqrt(len(column))
            if figure == "final true bpb":
                cells.append(f"{mean:.6f} ± {error:.6f}")
            else:
                cells.append(f"{mean:.2f} ± {error:.2f} (x {mean / (before or 1):.2f})")
        print(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
