"""How often `ablate` is right, and what --confirm and `ablate --apply` make of a night, over simulated nights.

    uv run tests/bench_ablation.py                  # error rates of the ablation
    uv run tests/bench_ablation.py LEDGER           # rules beside each other, for the effects of a results.tsv

Scores are normal, sigma is estimated as the ledger does it; nothing trains. The second form draws the true effect of
each experiment from what the ledger's discards and keeps suggest: gain over noise, shrunk by the noise's variance.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import loop
from harness.ablation import order_runs
from harness.ledger import ASSUMED_DEGREES, parse_tsv

NIGHTS = 200
REPLICATES = 3


def measure(rng, effects: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Contribution and standard error of each change, as `ablate` finds them."""
    sides = ["champion", *(f"without {number}" for number in range(len(effects)))]
    of_champion = order_runs(sides, REPLICATES).count("champion")
    champion = rng.normal(0, sigma, of_champion)
    without = [rng.normal(-effect, sigma, REPLICATES) for effect in effects]
    groups = [champion, *without]
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups) + ASSUMED_DEGREES * sigma**2
    estimate = math.sqrt(squares / (sum(len(group) - 1 for group in groups) + ASSUMED_DEGREES))  # as Ledger.noise
    gains = np.array([champion.mean() - runs.mean() for runs in without])
    return gains, np.full(len(effects), estimate * math.sqrt(1 / REPLICATES + 1 / of_champion))


def print_error_rates() -> None:
    rng = np.random.default_rng(1)
    print(f"{NIGHTS} nights, {REPLICATES} replicates, 14 changes, of which four are real")
    print("effect of the real ones   nulls said to carry   real ones found   nights with a null that carries")
    for size in (1.5, 2.0, 3.0):
        effects = np.array([size] * 4 + [0.0] * 10)
        nights = [measure(rng, effects, 1.0) for _ in range(NIGHTS)]
        carries = np.array([gains > 2 * errors for gains, errors in nights])
        null, real = carries[:, 4:], carries[:, :4]
        print(f"{size:>16.1f} sigma {null.mean():>21.1%} {real.mean():>17.1%} {null.any(axis=1).mean():>33.0%}")


def night(rng, effects: np.ndarray, sigma: float, confirm: int) -> tuple[list[float], int]:
    """The true effects that a rule keeps, and the runs that it takes."""
    kept: list[float] = []
    runs = 1
    believed = rng.normal(0, sigma)  # of the champion: its first score
    level = 0.0  # the champion's true score, higher is better
    for effect in effects:
        runs += 1
        score = rng.normal(level + effect, sigma)
        if score <= believed:
            continue
        fresh: tuple[list[float], list[float]] = ([], [])
        gain = 0.0
        for _ in range(confirm):
            runs += 2
            fresh[0].append(rng.normal(level, sigma))
            fresh[1].append(rng.normal(level + effect, sigma))
            gain = np.mean(fresh[1]) - np.mean(fresh[0])
            if gain <= 0:
                break
        if confirm and gain <= 2 * sigma * math.sqrt(2 / confirm):
            continue
        kept.append(effect)
        level += effect
        believed = np.mean(fresh[1]) if confirm else score
    return kept, runs


def print_rules(ledger) -> None:
    rng = np.random.default_rng(2)
    sigma = ledger.sigma
    domain = ledger.domain
    scored = [run for run in ledger.rows if run.score is not None and run.base]
    gains = np.array([domain.gain(ledger.believed(run.base), run.score) for run in scored])
    print(f"{len(gains)} experiments, sigma {sigma:g} {domain.unit}; means of {NIGHTS} nights")
    print(f"rule                            kept   false keeps   runs   end, 0.0001 {domain.unit} better than plain")
    results: dict[str, list] = {"plain": [], "--confirm 4": [], "plain, then ablate --apply": []}
    shrunk = np.maximum(0.0, 1 - 2 * sigma**2 / gains**2) * gains
    for _ in range(NIGHTS):
        effects = rng.permutation(shrunk)
        kept, runs = night(rng, effects, sigma, 0)
        results["plain"].append((kept, runs))
        results["--confirm 4"].append(night(rng, effects, sigma, 4))
        if kept:
            found, errors = measure(rng, np.array(kept), sigma)
            left = [effect for effect, gain, error in zip(kept, found, errors, strict=True) if gain > 2 * error]
            spent = len(order_runs(["champion", *(f"without {n}" for n in range(len(kept)))], REPLICATES))
            # --apply keeps it if fresh runs of both differ by no more than one sigma.
            loss = sum(kept) - sum(left) + rng.normal(0, sigma * math.sqrt(2 / REPLICATES))
            kept = left if loss <= sigma else kept
            results["plain, then ablate --apply"].append((kept, runs + spent + 2 * REPLICATES))
    plain_end = np.mean([sum(kept) for kept, _ in results["plain"]])
    for rule, nights in results.items():
        number = np.mean([len(kept) for kept, _ in nights])
        false = np.mean([sum(effect <= 0 for effect in kept) for kept, _ in nights])
        runs = np.mean([runs for _, runs in nights])
        end = np.mean([sum(kept) for kept, _ in nights]) - plain_end
        print(f"{rule:<28} {number:>7.1f} {false:>13.2f} {runs:>6.0f} {1e4 * end:>13.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print_rules(parse_tsv(Path(sys.argv[1]).read_text(), loop.DOMAIN, "climbmix")[0])
    else:
        print_error_rates()
