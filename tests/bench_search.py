"""The agents without a model beside each other: `random` and `tpe`, 60 runs each, three seeds.

    uv run python tests/bench_search.py [SEEDS]    # a simulated objective, no training: about a minute
    uv run python tests/bench_search.py --train    # trainings of 30 seconds on pocket: about five hours on two cores

Simulated: the score is a bowl over the hyperparameters of the real train.py (pocket's block), with its lowest point up
to 2.3 times off the defaults, a few of them mattering far more than others, three pairs that depend on each other, and
noise of 0.014 on every run, as pocket has. A better score is kept, as the loop does without --confirm. Printed is by
how much the champion after so many runs is truly better than the baseline; the lowest point would be 0.1.
"""

import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loop
from harness import knob_search, tpe
from harness.ledger import Ledger, read_runs

ROOT = Path(loop.__file__).parent
PROFILE = "pocket"
SIGMA = 0.014  # standard deviation between seeds
BOWL = 0.1  # by which the baseline is worse than the lowest point
PAIRS = (("DEPTH", "ASPECT_RATIO"), ("MATRIX_LR", "TOTAL_BATCH_SIZE"), ("WARMDOWN_RATIO", "FINAL_LR_FRAC"))
RUNS = 60
SHOWN = (10, 20, 40, 60)
AGENTS = ("random", "tpe")


class Bowl:
    """What a train.py would score, by its hyperparameters alone."""

    def __init__(self, baseline: str, seed: int):
        rng = random.Random(seed)
        self.weights: dict[str, float] = {}
        self.lowest: dict[str, object] = {}
        for name, value in self.read(baseline).items():
            self.weights[name] = rng.lognormvariate(0, 1.2)
            if isinstance(value, bool):
                self.lowest[name] = rng.random() < 0.5
            elif isinstance(value, str):
                self.lowest[name] = rng.choice(knob_search.PATTERNS)
            elif name.endswith(("RATIO", "FRAC")) and isinstance(value, float):
                self.lowest[name] = min(1.0, abs(value + rng.uniform(-0.2, 0.2)))
            else:
                self.lowest[name] = value * 2 ** rng.uniform(-1.2, 1.2)
        self.scale = 1.0
        self.scale = BOWL / self(baseline)

    def read(self, source: str) -> dict:
        found = knob_search.read_hyperparameters(source, PROFILE, with_booleans=True)
        return {name: one.value for name, one in found.items() if not isinstance(one.value, tuple)}

    def __call__(self, source: str) -> float:
        away = {}
        for name, value in self.read(source).items():
            lowest = self.lowest[name]
            if isinstance(value, bool | str):
                away[name] = 0.5 * (value != lowest)
            elif name.endswith(("RATIO", "FRAC")) and isinstance(value, float):
                away[name] = 3 * (value - lowest)
            else:
                away[name] = math.log2(max(value, 1e-9) / lowest)
        total = sum(self.weights[name] * away[name] ** 2 for name in away)
        for one, other in PAIRS:
            total += math.sqrt(self.weights[one] * self.weights[other]) * away[one] * away[other]
        return self.scale * total


def simulate(agent: str, seed: int) -> list[float]:
    """By how much the champion is truly better than the baseline, after each run."""
    champion = (ROOT / "train.py").read_text()
    score = Bowl(champion, seed)
    rng = random.Random(seed)
    believed = score(champion) + rng.gauss(0, SIGMA)
    baseline = champion.encode()
    told = [(baseline, believed)]
    seen = ""
    gains = []
    for number in range(RUNS):
        if agent == "random":
            source, description = knob_search.propose(champion, PROFILE, seen, rng)
            seen += f"\n{description}"
        else:
            search = tpe.Search(baseline, PROFILE, "minimize", 1000 * seed + number)
            for edited, measured in told:
                search.tell(edited, "", "COMPLETE", measured)
            source = next(search.propose(champion.encode()))[0].decode()
        measured = score(source) + rng.gauss(0, SIGMA)
        told.append((source.encode(), measured))
        if measured < believed:
            champion, believed = source, measured
        gains.append(BOWL - score(champion))
    return gains


def train(agent: str, seed: int) -> list[float]:
    """By how much the champion is believed better than the baseline after each run of a real night on pocket."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        command = [sys.executable, "loop.py", "--agent", agent, "--tag", f"s{seed}", "--max-experiments", str(RUNS)]
        subprocess.run(command, cwd=folder, env=os.environ | {"AUTORESEARCH_PROFILE": PROFILE}, check=True)
        runs = read_runs(Path(folder, f".git/autoresearch/s{seed}/runs.jsonl"))
    ledger = Ledger(loop.DOMAIN)
    gains = []
    for run in runs:
        ledger.add(run)
        if run.purpose == "experiment":
            gains.append(ledger.believed(ledger.baseline) - ledger.best)
    return gains


def main() -> None:
    is_real = "--train" in sys.argv
    counts = [int(word) for word in sys.argv[1:] if word.isdigit()]
    seeds = counts[0] if counts else 3
    print("mean gain in bpb over seeds, and each seed's after the last run")
    print("runs   " + "".join(f"{count:>9}" for count in SHOWN))
    for agent in AGENTS:
        nights = [(train if is_real else simulate)(agent, seed) for seed in range(seeds)]
        means = [statistics.fmean(gains[count - 1] for gains in nights) for count in SHOWN]
        last = " ".join(f"{gains[-1]:.3f}" for gains in nights)
        print(f"{agent:7}" + "".join(f"{mean:9.4f}" for mean in means) + f"   {last}")


if __name__ == "__main__":
    main()
