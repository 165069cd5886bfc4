"""The agents without a model beside each other: `random` and `tpe`, 60 runs each, three seeds.

    uv run python tests/bench_search.py [SEEDS]    # a simulated objective, no training: about a minute

Simulated: the score is a bowl over the values that the hyperparameters of the real train.py (pocket's block) may take.
Its lowest point lies up to 0.3 of a range off the baseline's values, a few hyperparameters matter far more than others,
three pairs depend on each other, and every run has noise of 0.014, as pocket has. A better score is kept, as the loop
does without --confirm. Printed is by how much the champion after so many runs is truly better than the baseline; the
lowest point would be 0.1.
"""

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.knob_search import Search, nearest, random_draw, read_hyperparameters, tpe_draw

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
PROFILE = "pocket"
SIGMA = 0.014  # standard deviation between seeds
BOWL = 0.1  # by which the baseline is worse than the lowest point
PAIRS = (("DEPTH", "ASPECT_RATIO"), ("MATRIX_LR", "TOTAL_BATCH_SIZE"), ("WARMDOWN_RATIO", "FINAL_LR_FRAC"))
RUNS = 60
SHOWN = (10, 20, 40, 60)


class Bowl:
    def __init__(self, space: dict[str, tuple], baseline: bytes, seed: int):
        rng = random.Random(seed)
        self.space = space
        self.weights = {name: rng.lognormvariate(0, 1.2) for name in space}
        moved = {name: place + rng.uniform(-0.3, 0.3) for name, place in self.places(baseline).items()}
        self.lowest = {name: min(1.0, max(0.0, place)) for name, place in moved.items()}
        self.scale = 1.0
        self.scale = BOWL / self(baseline)

    def places(self, source: bytes) -> dict[str, float]:
        """Where each value lies in its range, from 0 to 1."""
        found = read_hyperparameters(source.decode(), PROFILE)
        return {name: nearest(values, found[name].value) / (len(values) - 1) for name, values in self.space.items()}

    def __call__(self, source: bytes) -> float:
        away = {name: place - self.lowest[name] for name, place in self.places(source).items()}
        total = sum(self.weights[name] * away[name] ** 2 for name in away)
        for one, other in PAIRS:
            total += math.sqrt(self.weights[one] * self.weights[other]) * away[one] * away[other]
        return self.scale * total


def simulate(agent: str, seed: int) -> list[float]:
    """By how much the champion is truly better than the baseline, after each run."""
    champion = TRAIN.read_bytes()
    search = Search(champion, PROFILE)
    score = Bowl(search.space, champion, seed)
    rng = random.Random(seed)
    believed = score(champion) + rng.gauss(0, SIGMA)
    search.tell(champion, "COMPLETE", believed)
    gains = []
    for number in range(RUNS):
        draw = random_draw(rng) if agent == "random" else tpe_draw(search, "minimize", 1000 * seed + number)
        edited, _ = next(search.propose(champion, draw))
        measured = score(edited) + rng.gauss(0, SIGMA)
        search.tell(edited, "COMPLETE", measured)
        if measured < believed:
            champion = edited
            believed = measured
        gains.append(BOWL - score(champion))
    return gains


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("mean gain in bpb over seeds, and each seed's after the last run")
    print("runs   " + "".join(f"{count:>9}" for count in SHOWN))
    for agent in ("random", "tpe"):
        nights = [simulate(agent, seed) for seed in range(seeds)]
        means = [statistics.fmean(gains[count - 1] for gains in nights) for count in SHOWN]
        last = " ".join(f"{gains[-1]:.3f}" for gains in nights)
        print(f"{agent:7}" + "".join(f"{mean:9.4f}" for mean in means) + f"   {last}")


if __name__ == "__main__":
    main()
