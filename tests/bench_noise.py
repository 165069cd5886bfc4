"""How many false keeps each rule makes in a night of experiments, and what that costs: a simulation.

    uv run tests/bench_noise.py [LEDGER] [--nights 1000] [--seed 0]

A night is a list of true effects, one an experiment. A run measures the true score plus Gaussian noise, sigma. An
effect that is kept moves the champion's true score by itself. A false keep is a kept experiment that is no true gain.
Every rule is held against the plain one ("better is kept") on the same nights:

    runs    of a night, relative to the plain rule's
    end     the champion's true score at the end minus the plain rule's, in 0.0001 bpb: above 0 is worse

Nights. `drawn`: the true effects that a ledger may have had, see below. `as seen`: its measured differences, taken
for true. `3 + nulls`: three gains of ten sigmas among the first ten of 125 experiments, and nothing else. `null`: 125
or 910 experiments without any effect. Without LEDGER, the effects are an invented set, and the first line says so.

What a ledger's true effects were. Its scores are single runs, and a champion's score was selected for being low, so
its measured differences are too wide, and biased. The scores are taken as noise around hidden true scores, one for
every champion and candidate; effects come from a mixture of half-normals of many widths, gains and losses apart, and of
exactly nothing; its weights are fitted by expectation-maximisation. One run cannot tell the sign of an effect
below sigma, so gains and losses of those widths are taken to be equally frequent. Each night then draws champions and
effects together, given the ledger. So the sum of the kept gains stays what was measured, and single effects shrink.

Sigma is that of one H100 (0.00037 bpb), then that of `pocket` on two CPU cores (0.014), with effects 12.6 times as
large: a real agent went 0.356 bpb down there (fresh seeds), the H100's ledger 0.028. The rules have to find sigma as
the loop does: from their own runs, and from the assumed figure.

Then comes the loop as it schedules many workers, by the functions of harness/ledger.py: gains on former champions run
again on the present one. With many, a candidate is often on its fresh runs when another is kept, and then has to begin
again: fewer false keeps, and a higher end.

The last part is what many workers cost: 16 against one with the same number of runs, under the plain rule. A candidate
is stale if its base is the champion no longer when it ends. A gain among those runs again, in place of a new idea.
"""

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import ledger
from loop import BASELINE_RUNS, DOMAIN

H100_SIGMA = 0.00037  # bpb
POCKET_SIGMA = 0.014  # bpb
POCKET_SCALE = 12.6  # size of an effect on pocket, relative to the H100's
NULL_SIGMAS = 10.0  # size of the three gains that come before nothing else
WIDEST_LOSS = 0.012  # bpb: a larger loss is as hopeless as this one
STEP = 0.00005  # bpb, of the grids of true scores and effects
RUN_JITTER = 0.05  # standard deviation of the time that a run takes, in runs' times


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@dataclass(frozen=True)
class Rule:
    """The plain rule, or one that buys fresh runs; the numbers are those of harness/ledger.py."""

    name: str
    first_look: float = 0.0  # sigmas
    champion_runs: tuple[int, ...] = ()  # one entry for each fresh run that a candidate may get; none: the plain rule
    still_promising: tuple[float, ...] = ()  # standard errors, after each fresh run but the last
    decides_early: bool = True  # whether a candidate may be kept before its last fresh run
    luck_share: float = 0.0
    luck_margin: float = 0.0
    kept_weight: float = 0.0
    baseline_runs: int = BASELINE_RUNS

    def threshold(self, tried: int, kept: np.ndarray) -> np.ndarray:
        luckiest_of = np.maximum(1.0, tried / (1 + self.kept_weight * kept))
        return self.luck_margin + self.luck_share * np.sqrt(2 * np.log(luckiest_of))


CHOSEN = Rule(
    "--confirm",
    ledger.FIRST_LOOK_SIGMAS,
    ledger.CHAMPION_RUNS,
    ledger.STILL_PROMISING,
    luck_share=ledger.LUCK_SHARE,
    luck_margin=ledger.LUCK_MARGIN,
    kept_weight=ledger.KEPT_WEIGHT,
)
RULES = (
    Rule("plain"),
    Rule("plain, first score decides by sqrt(2 ln n)", luck_share=1.0),
    Rule("two fresh, 0.25 sqrt(2 ln n)", 0.7, (2, 2), (-9,), False, 0.25),
    Rule("two fresh, sqrt(2 ln n)", 1.0, (2, 2), (-9,), False, 1.0),
    Rule("four fresh, sqrt(2 ln n)", 1.3, (4,) * 4, (-9,) * 3, False, 1.0),
    Rule("up to four, sqrt(2 ln n)", 1.0, (1, 2, 3, 4), (0.5, 0.7, 0.9), True, 1.0),
    Rule("up to four, 1.15 sqrt(2 ln n) + 0.55", 1.0, (1, 2, 3, 4), (0.5, 0.7, 0.9), True, 1.15, 0.55),
    CHOSEN,
    replace(CHOSEN, name="--confirm, threshold lower by 0.5", luck_margin=CHOSEN.luck_margin - 0.5),
    replace(CHOSEN, name="--confirm, threshold lower by 1", luck_margin=CHOSEN.luck_margin - 1),
    replace(CHOSEN, name="--confirm, a kept gain counts 20", kept_weight=20),
    Rule("--confirm, up to eight fresh", 0.5, tuple(range(1, 9)), (0, 0.2, 0.4, 0.6, 0.8, 1, 1.2), True, 1.15, 0.55, 2),
)


@dataclass
class Nights:
    """What came of many nights."""

    is_kept: np.ndarray  # nights x experiments
    false_keeps: np.ndarray  # a night
    end: np.ndarray  # a night: the champion's true score
    runs: np.ndarray  # a night


class Group:
    """The fresh scores of one commit in each of many nights, as sums."""

    def __init__(self, nights: int):
        self.count = np.zeros(nights)
        self.total = np.zeros(nights)
        self.squares = np.zeros(nights)

    def add(self, scores: np.ndarray, where: np.ndarray) -> None:
        self.count += where
        self.total += where * scores
        self.squares += where * scores**2

    def within(self) -> tuple[np.ndarray, np.ndarray]:
        """Squared differences from the mean, and degrees of freedom."""
        squares = self.squares - self.total**2 / np.maximum(self.count, 1)
        return np.where(self.count > 1, squares, 0.0), np.maximum(self.count - 1, 0)

    def replace(self, other: "Group", where: np.ndarray) -> None:
        self.count = np.where(where, other.count, self.count)
        self.total = np.where(where, other.total, self.total)
        self.squares = np.where(where, other.squares, self.squares)


def simulate(rule: Rule, effects: np.ndarray, sigma: float, seed: int, assumed: float | None = None) -> Nights:
    """Nights (rows of `effects`) under one rule, with one worker. The baseline's true score is 0."""
    if not rule.champion_runs:
        return simulate_plain(rule, effects, sigma, seed)
    rng = np.random.default_rng(seed)
    nights, experiments = effects.shape
    champion = np.zeros(nights)  # true score
    runs = np.zeros(nights)
    kept = np.zeros(effects.shape, bool)
    of_champion = Group(nights)  # fresh scores
    repeated = Group(nights)  # all scores of the champion, which tell sigma
    squares = np.full(nights, ledger.ASSUMED_DEGREES * (assumed or sigma) ** 2)  # of the commits before
    degrees = np.full(nights, float(ledger.ASSUMED_DEGREES))

    def measure(true_score: np.ndarray, where: np.ndarray, *groups: Group) -> np.ndarray:
        nonlocal runs
        scores = true_score + sigma * rng.standard_normal(nights)
        runs = runs + where
        for group in groups:
            group.add(scores, where)
        return scores

    def known_sigma() -> np.ndarray:
        within, freedom = repeated.within()
        return np.sqrt((squares + within) / (degrees + freedom))

    everywhere = np.ones(nights, bool)
    for _ in range(rule.baseline_runs):
        measure(champion, everywhere, of_champion, repeated)
    for number in range(experiments):
        candidate = champion + effects[:, number]
        fresh = Group(nights)
        of_candidate = Group(nights)
        first = measure(candidate, everywhere, of_candidate)
        assumed_sigma = known_sigma()
        looking = of_champion.total / of_champion.count - first > rule.first_look * assumed_sigma
        threshold = rule.threshold(number + 2, kept.sum(axis=1))
        is_kept = np.zeros(nights, bool)
        for look, wanted in enumerate(rule.champion_runs):
            if not looking.any():
                break
            measure(candidate, looking, fresh, of_candidate)
            while (missing := looking & (of_champion.count < wanted)).any():
                measure(champion, missing, of_champion, repeated)
            gain = of_champion.total / of_champion.count - fresh.total / np.maximum(fresh.count, 1)
            error = assumed_sigma * np.sqrt(1 / of_champion.count + 1 / np.maximum(fresh.count, 1))
            is_last = look == len(rule.champion_runs) - 1
            if is_last or rule.decides_early:
                is_kept |= looking & (gain > threshold * error)
            if not is_last:
                looking &= ~is_kept & (gain > rule.still_promising[look] * error)
        # The scores of the commit that is the champion no longer, or never was one, still tell sigma.
        loser = Group(nights)
        loser.replace(of_candidate, ~is_kept)
        loser.replace(repeated, is_kept)
        within, freedom = loser.within()
        squares += within
        degrees += freedom
        repeated.replace(of_candidate, is_kept)
        of_champion.replace(fresh, is_kept)
        champion = np.where(is_kept, candidate, champion)
        kept[:, number] = is_kept
    return Nights(kept, (kept & (effects >= 0)).sum(axis=1), champion, runs)


def simulate_plain(rule: Rule, effects: np.ndarray, sigma: float, seed: int) -> Nights:
    rng = np.random.default_rng(seed)
    nights, experiments = effects.shape
    champion = np.zeros(nights)  # true score
    best = sigma * rng.standard_normal(nights)  # measured score
    kept = np.zeros(effects.shape, bool)
    for number in range(experiments):
        candidate = champion + effects[:, number]
        score = candidate + sigma * rng.standard_normal(nights)
        is_kept = best - score > rule.threshold(number + 2, kept.sum(axis=1)) * sigma * math.sqrt(2)
        best = np.where(is_kept, score, best)
        champion = np.where(is_kept, candidate, champion)
        kept[:, number] = is_kept
    false_keeps = (kept & (effects >= 0)).sum(axis=1)
    return Nights(kept, false_keeps, champion, np.full(nights, experiments + 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Effects


def measured_effects(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Each row's difference from the champion of its time; hopeless losses cut to WIDEST_LOSS."""
    champion_of = np.cumsum(kept) - kept - 1  # index of each row's base among the kept ones
    differences = scores[1:] - scores[kept][champion_of[1:]]
    return np.minimum(differences, WIDEST_LOSS)


def draw_effects(scores: np.ndarray, kept: np.ndarray, sigma: float, nights: int, seed: int) -> np.ndarray:
    """Nights of true effects, given a ledger's scores: a hidden Markov model over the true scores of its champions.

    scores, kept: (rows,), crashes left out, the first the baseline. Returns (nights, rows - 1).
    """
    rng = np.random.default_rng(seed)
    differences = measured_effects(scores, kept)
    champions = scores[kept]
    champion_of = np.cumsum(kept) - kept - 1
    discards = np.flatnonzero(~kept)
    discard_scores = champions[champion_of[discards]] + differences[discards - 1]

    # Grids: true scores of champions, effects, and the widths of the mixture, gains and losses apart.
    grid = np.arange(champions.min() - 4 * sigma, champions.max() + 4 * sigma, STEP)
    reach = math.ceil((max(WIDEST_LOSS, np.abs(np.diff(champions)).max()) + 4 * sigma) / STEP)
    effects = np.arange(-reach, reach + 1) * STEP
    widths = 0.0001 * 2.0 ** np.arange(8)
    shapes = [np.exp(-0.5 * (effects / width) ** 2) * side for width in widths for side in (effects < 0, effects > 0)]
    shapes.append((effects == 0).astype(float))
    shapes = np.array([shape / shape.sum() for shape in shapes])
    weights = np.full(len(shapes), 1 / len(shapes))

    # Likelihoods: of each discard's score under each shape, of each champion's own score, of a step between champions.
    noise = np.exp(-0.5 * ((discard_scores[:, None, None] - grid[:, None] - effects) / sigma) ** 2)
    of_discard = noise @ shapes.T + 1e-30  # discards x grid x shapes
    of_champion = np.exp(-0.5 * ((champions[:, None] - grid) / sigma) ** 2)
    lag = np.arange(len(grid)) - np.arange(len(grid))[:, None]
    is_reached = np.abs(lag) <= reach
    steps = [np.where(is_reached, shape[np.clip(lag + reach, 0, 2 * reach)], 0.0) for shape in shapes]

    for _ in range(40):
        evidence = of_champion.copy()
        for row, base in enumerate(champion_of[discards]):
            evidence[base] *= of_discard[row] @ weights
            evidence[base] /= evidence[base].max()
        transition = np.tensordot(weights, steps, 1)
        forward = [evidence[0]]
        for now in evidence[1:]:
            reached = forward[-1] @ transition * now
            forward.append(reached / reached.sum())
        backward = [np.ones(len(grid))]
        for later in evidence[:0:-1]:
            left = transition @ (backward[0] * later)
            backward.insert(0, left / left.max())
        counts = np.zeros(len(shapes))
        for row, base in enumerate(champion_of[discards]):
            belief = forward[base] * backward[base]
            shares = of_discard[row] * weights
            counts += belief / belief.sum() @ (shares / shares.sum(1, keepdims=True))
        for index in range(len(champions) - 1):
            after = evidence[index + 1] * backward[index + 1]
            shares = weights * [forward[index] @ step @ after for step in steps]
            counts += shares / shares.sum()
        below_sigma = 2 * int(np.sum(widths < 1.1 * sigma))
        counts[:below_sigma] = np.repeat(counts[:below_sigma].reshape(-1, 2).mean(1), 2)
        weights = counts / counts.sum()

    def pick(chances: np.ndarray) -> np.ndarray:
        sums = chances.cumsum(axis=1)
        return (sums < rng.random((nights, 1)) * sums[:, -1:]).sum(axis=1)

    places = [pick(np.tile(forward[-1], (nights, 1)))]  # of the champions on the grid, from the last to the first
    for before in forward[-2::-1]:
        places.insert(0, pick(before * transition[:, places[0]].T))
    found = np.zeros((nights, len(scores) - 1))
    for index, row in enumerate(np.flatnonzero(kept)[1:]):
        found[:, row - 1] = grid[places[index + 1]] - grid[places[index]]
    prior = weights @ shapes
    for row, score in zip(discards, discard_scores, strict=True):
        off = score - grid[places[champion_of[row]]]
        found[:, row - 1] = effects[pick(np.exp(-0.5 * ((off[:, None] - effects) / sigma) ** 2) * prior)]
    return np.round(found / STEP) * STEP


def invented_scores() -> tuple[np.ndarray, np.ndarray]:
    """A night under the plain rule with 125 invented effects: its scores, and which were kept."""
    rng = random.Random(0)
    gains = [-0.012 * 0.75**n for n in range(20)]
    small_losses = [abs(rng.gauss(0, 0.001)) for _ in range(90)]
    large_losses = [rng.uniform(0.003, 0.01) for _ in range(15)]
    effects = gains + small_losses + large_losses
    rng.shuffle(effects)
    champion = 1.0
    scores = [1.0]
    kept = [True]
    for effect in effects:
        score = rng.gauss(champion + effect, H100_SIGMA)
        is_gain = score < min(score for score, was_kept in zip(scores, kept, strict=True) if was_kept)
        scores.append(score)
        kept.append(is_gain)
        champion += effect if is_gain else 0.0
    return np.array(scores), np.array(kept)


def gains_then_nulls(nights: int, sigma: float) -> np.ndarray:
    effects = np.zeros((nights, 125))
    effects[:, [1, 4, 8]] = -NULL_SIGMAS * sigma
    return effects


# ---------------------------------------------------------------------------------------------------------------------
# Many workers


@dataclass(eq=False)
class Champion:
    true_score: float
    first: float
    fresh: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Candidate:
    effect: float
    base: Champion
    true_score: float
    is_again: bool  # a gain on a former champion
    first: float = 0.0
    fresh: list[float] = field(default_factory=list)
    of_base: list[float] = field(default_factory=list)
    outstanding: int = 1


class KnownSigma:
    """As ledger.deciding_sigma, without reading all rows again for every verdict."""

    def __init__(self, assumed: float):
        self.degrees = ledger.ASSUMED_DEGREES
        self.squares = self.degrees * assumed**2

    def add(self, scores: list[float]) -> None:
        mean = sum(scores) / len(scores)
        self.squares += sum((score - mean) ** 2 for score in scores)
        self.degrees += len(scores) - 1

    @property
    def sigma(self) -> float:
        return math.sqrt(self.squares / self.degrees)


def night_with_workers(
    confirms: bool, effects: list[float], sigma: float, workers: int, rng: random.Random
) -> tuple[float, ...]:
    """False keeps, the champion's true score at the end, runs and hours (in runs' times) of the loop's schedule.

    Effects add up in truth, and every edit merges; the loop does not know that and runs every gain on a former champion
    again.
    """
    fresh_of_baseline = [rng.gauss(0, sigma) for _ in range(BASELINE_RUNS)]
    champion = Champion(0.0, fresh_of_baseline[0], fresh_of_baseline)
    known = KnownSigma(sigma)
    known.add(fresh_of_baseline)
    runs = BASELINE_RUNS if confirms else 1
    ideas = deque(effects)
    again: deque[float] = deque()
    planned: deque[tuple[Candidate, str]] = deque()
    flying: list[tuple[float, int, Candidate, str]] = []  # when it ends, its number, whose it is, what it measures
    tried = 2
    kept = false_keeps = 0
    clock = 0.0
    while ideas or again or planned or flying:
        while len(flying) < workers and (planned or again or ideas):
            if planned:
                candidate, what = planned.popleft()
            else:
                is_again = bool(again)
                effect = again.popleft() if is_again else ideas.popleft()
                candidate, what = Candidate(effect, champion, champion.true_score + effect, is_again), "first"
            runs += 1
            heapq.heappush(flying, (clock + rng.gauss(1, RUN_JITTER), runs, candidate, what))
        clock, _, candidate, what = heapq.heappop(flying)
        base = candidate.base
        if what == "base":
            candidate.of_base.append(rng.gauss(base.true_score, sigma))
        elif what == "fresh":
            candidate.fresh.append(rng.gauss(candidate.true_score, sigma))
        else:
            candidate.first = rng.gauss(candidate.true_score, sigma)
        candidate.outstanding -= 1
        if candidate.outstanding:
            continue
        verdict = judge(candidate, known.sigma, tried, kept) if confirms else judge_plain(candidate)
        if base is champion and verdict == "look again":
            planned.append((candidate, "fresh"))
            missing = ledger.CHAMPION_RUNS[len(candidate.fresh)] - len(base.fresh) - len(candidate.of_base)
            planned.extend([(candidate, "base")] * missing)
            candidate.outstanding = 1 + max(0, missing)
            continue
        tried += 1
        base.fresh += candidate.of_base
        known.add([candidate.first, *candidate.fresh])
        if verdict == "discard":
            continue
        if base is not champion:
            again.append(candidate.effect)
            continue
        champion = Champion(candidate.true_score, candidate.first, candidate.fresh)
        kept += 1
        false_keeps += candidate.effect >= 0
    return false_keeps, champion.true_score, runs, clock


def judge_plain(candidate: Candidate) -> str:
    return "keep" if ledger.is_gain(candidate.base.first, candidate.first, DOMAIN) else "discard"


def judge(candidate: Candidate, sigma: float, tried: int, kept: int) -> str:
    """As Ratchet.find_confirmed_verdict."""
    of_base = candidate.base.fresh + candidate.of_base
    if candidate.fresh:
        return ledger.verdict_on_fresh_runs(of_base, candidate.fresh, sigma, tried, kept, DOMAIN)
    is_promising = candidate.is_again or ledger.deserves_second_look(of_base, candidate.first, sigma, DOMAIN)
    return "look again" if is_promising else "discard"


# ---------------------------------------------------------------------------------------------------------------------
# Many workers and one, with the same number of runs under the plain rule

NIGHT_RUNS = 910  # after the baseline
RUN_SECONDS = 300  # of a run, for the hours of a night

CHAMPION = np.dtype([("number", int), ("true_score", float), ("score", float)])
FLIGHT = np.dtype([("end", float), ("effect", float), ("base", CHAMPION)])  # end: when it ends, in runs' times


def each_gain_once(effects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """NIGHT_RUNS ideas a night: the gains of its effects (a row), once each, and draws from its losses."""
    ideas = np.empty((len(effects), NIGHT_RUNS))
    for night, of_night in enumerate(effects):
        gains = of_night[of_night < 0]
        losses = rng.choice(of_night[of_night >= 0], NIGHT_RUNS - len(gains))
        ideas[night] = rng.permutation(np.concatenate([gains, losses]))
    return ideas


def gains_as_often(effects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """NIGHT_RUNS ideas a night, drawn from its effects (a row): gains do not run out."""
    drawn = rng.integers(0, effects.shape[1], (len(effects), NIGHT_RUNS))
    return np.take_along_axis(effects, drawn, axis=1)


class EqualNights:
    """Nights with as many runs as ideas (rows of `ideas`, true effects), all nights at once: arrays have a row or an
    element for each.

    Effects add up in truth, and every edit merges. The loop does not know that: it compares a candidate with its own
    base, and runs a gain on a former champion again, before any new idea. The last ideas then get no run.
    """

    def __init__(self, ideas: np.ndarray, sigma: float, workers: int, rng: np.random.Generator):
        nights = len(ideas)
        self.ideas = ideas
        self.sigma = sigma
        self.workers = workers
        self.rng = rng
        self.every_night = np.arange(nights)
        self.champion = np.zeros(nights, CHAMPION)
        self.champion["score"] = self.measure(self.champion["true_score"])
        self.flying = np.zeros((nights, workers), FLIGHT)
        self.clock = np.zeros(nights)  # in runs' times
        self.begun = np.zeros(nights, int)  # ideas
        self.false_keeps = np.zeros(nights)
        self.stale = np.zeros(nights)  # runs that ended when their base was the champion no longer
        self.again = np.zeros(nights)  # runs of stale gains

    def simulate(self) -> "EqualNights":
        for worker in range(self.workers):
            self.launch(worker, is_again=np.zeros(len(self.ideas), bool))
        for _ in range(self.ideas.shape[1] - self.workers):
            worker, is_stale_gain = self.settle()
            self.launch(worker, is_stale_gain)
        for _ in range(self.workers):
            self.settle()
        return self

    def measure(self, true_score: np.ndarray) -> np.ndarray:
        return true_score + self.sigma * self.rng.standard_normal(len(true_score))

    def launch(self, worker: int | np.ndarray, is_again: np.ndarray) -> None:
        """Let a worker that is free begin a run: again what ended there just now, or a new idea."""
        ended = self.flying[self.every_night, worker]
        idea = self.ideas[self.every_night, self.begun]
        flight = np.zeros_like(ended)
        flight["end"] = self.clock + self.rng.normal(1, RUN_JITTER, len(ended))
        flight["effect"] = np.where(is_again, ended["effect"], idea)
        flight["base"] = self.champion
        self.flying[self.every_night, worker] = flight
        self.begun += ~is_again
        self.again += is_again

    def settle(self) -> tuple[np.ndarray, np.ndarray]:
        """Decide on the run that ends next; its worker, and whether it gained on a former champion."""
        worker = self.flying["end"].argmin(axis=1)
        flight = self.flying[self.every_night, worker]
        self.flying["end"][self.every_night, worker] = np.inf
        self.clock = flight["end"]
        true_score = flight["base"]["true_score"] + flight["effect"]
        score = self.measure(true_score)
        is_gain = score < flight["base"]["score"]
        is_stale = flight["base"]["number"] != self.champion["number"]
        is_kept = is_gain & ~is_stale
        self.champion["number"] += is_kept
        self.champion["true_score"] = np.where(is_kept, true_score, self.champion["true_score"])
        self.champion["score"] = np.where(is_kept, score, self.champion["score"])
        self.false_keeps += is_kept & (flight["effect"] >= 0)
        self.stale += is_stale
        return worker, is_gain & is_stale


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def print_frontier(sets: dict[str, np.ndarray], sigma: float, scale: float, nights: int) -> None:
    sets = {name: effects * scale for name, effects in sets.items()}
    sets["3 + nulls"] = gains_then_nulls(nights, sigma)
    sets["null 125"] = np.zeros((4 * nights, 125))
    sets["null 910"] = np.zeros((nights, 910))
    print(f"\nsigma {sigma}, effects x {scale:g}; end in 0.0001 bpb above the plain rule's: {scale * 3:.0f} at most\n")
    print(f"{'':43}" + "".join(f"{name:>24}" for name in sets))
    print(f"{'rule':43}" + f"{'false':>10}{'runs':>6}{'end':>8}" * 2 + f"{'false':>17}{'runs':>7}" * 3)
    plain = {name: simulate(RULES[0], effects, sigma, seed=1) for name, effects in sets.items()}
    for rule in RULES:
        print(f"{rule.name:43}" + "".join(cells(rule, sets, plain, sigma)), flush=True)
    doubtful = {"half": 0.5, "twice": 2.0, "1/30 of": 1 / 30}
    for name, ratio in doubtful.items():
        label = f"--confirm, assumes {name} the true sigma"
        print(f"{label:43}" + "".join(cells(CHOSEN, sets, plain, sigma, ratio * sigma)), flush=True)


def cells(
    rule: Rule, sets: dict[str, np.ndarray], plain: dict[str, Nights], sigma: float, assumed: float | None = None
) -> Iterator[str]:
    for name, effects in sets.items():
        found = plain[name] if rule is RULES[0] else simulate(rule, effects, sigma, seed=2, assumed=assumed)
        runs = found.runs.mean() / plain[name].runs.mean()
        if name in ("drawn", "as seen"):
            end = (found.end - plain[name].end).mean() * 1e4
            yield f"{found.false_keeps.mean():10.2f}{runs:6.2f}{end:+8.1f}"
        else:
            yield f"{found.false_keeps.mean():17.3f}{runs:7.2f}"


def print_sizes(effects: np.ndarray, sigma: float) -> None:
    """Which gains the plain and the chosen rule keep, by size, and what they are worth together."""
    edges = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 99.0)
    print("\ngains of a drawn night by size: how many, their sum in 0.0001 bpb, and the share that each rule keeps\n")
    print(f"{'sigmas':12}{'gains':>8}{'sum':>8}{'plain':>9}{'--confirm':>11}")
    plain = simulate(RULES[0], effects, sigma, seed=1).is_kept
    confirmed = simulate(CHOSEN, effects, sigma, seed=2).is_kept
    for low, high in itertools.pairwise(edges):
        is_in = (effects < -low * sigma) & (effects >= -high * sigma)
        count = is_in.sum(axis=1).mean()
        worth = -np.where(is_in, effects, 0).sum(axis=1).mean() * 1e4
        print(f"{low:g} to {high:<7g}{count:8.2f}{worth:8.1f}{plain[is_in].mean():9.2f}{confirmed[is_in].mean():11.2f}")


def print_workers(effects: np.ndarray, sigma: float, nights: int) -> None:
    print(f"\nworkers, --confirm and the plain rule beside it; {nights} nights; end in 0.0001 bpb above plain with 1\n")
    print(f"{'night':12}{'workers':>8}{'false':>10}{'plain':>9}{'runs':>8}{'time':>8}{'end':>8}{'plain':>8}")
    for name, size in (("drawn", 125), ("null 125", 125), ("null 910", 910)):
        reference = None
        for workers in (1, 8, 16):
            found = {False: [], True: []}
            for seed in range(nights if size == 125 else nights // 4):
                ideas = list(effects[seed]) if name == "drawn" else [0.0] * size
                for confirms, rows in found.items():
                    rows.append(night_with_workers(confirms, ideas, sigma, workers, random.Random(seed)))
            plain = np.mean(found[False], axis=0)
            confirmed = np.mean(found[True], axis=0)
            reference = plain[1] if reference is None else reference
            ends = f"{(confirmed[1] - reference) * 1e4:+8.1f}{(plain[1] - reference) * 1e4:+8.1f}"
            ratios = f"{confirmed[2] / plain[2]:8.2f}{confirmed[3] / plain[3]:8.2f}"
            print(f"{name:12}{workers:8}{confirmed[0]:10.3f}{plain[0]:9.2f}{ratios}{ends}", flush=True)


def print_equal_nights(effects: np.ndarray, sigma: float, seed: int) -> None:
    rng = np.random.default_rng([seed, 0])
    sets = {
        "each gain of a drawn night once": each_gain_once(effects, rng),
        "gains as often as in a drawn night": gains_as_often(effects, rng),
    }
    print(f"\n{NIGHT_RUNS} runs after the baseline, plain rule, {len(effects)} nights; hours at {RUN_SECONDS} s a run;")
    print("stale, again: share of the runs; end: bpb below the baseline; worse: than one worker's, in 0.0001 bpb\n")
    columns = f"{'workers':>8}{'hours':>7}{'kept':>7}{'false':>7}{'stale':>8}{'again':>8}{'end':>10}{'worse':>13}"
    print(f"{'ideas':36}{columns}")
    for name, ideas in sets.items():
        end_of_one = None
        for workers in (1, 16):
            found = EqualNights(ideas, sigma, workers, np.random.default_rng([seed, workers])).simulate()
            end = found.champion["true_score"]
            end_of_one = end if end_of_one is None else end_of_one
            worse = (end - end_of_one) * 1e4
            error = worse.std(ddof=1) / math.sqrt(len(worse))
            hours = found.clock.mean() * RUN_SECONDS / 3600
            counts = f"{hours:7.1f}{found.champion['number'].mean():7.1f}{found.false_keeps.mean():7.2f}"
            shares = f"{found.stale.mean() / NIGHT_RUNS:8.1%}{found.again.mean() / NIGHT_RUNS:8.2%}"
            print(f"{name:36}{workers:8}{counts}{shares}{-end.mean():10.5f}{worse.mean():+8.1f} ± {error:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", nargs="?", type=Path, metavar="LEDGER")
    parser.add_argument("--nights", type=int, default=1000, help="simulated nights a figure (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn nights, and of the last part (default 0)")
    args = parser.parse_args()
    if args.ledger:
        rows, _ = ledger.parse_ledger(args.ledger.read_text())
        scored = [row for row in rows if row.status != "crash"]
        scores = np.array([row.score for row in scored])
        kept = np.array([row.status == "keep" for row in scored])
        source = "the ledger"
    else:
        scores, kept = invented_scores()
        source = "an invented night (no LEDGER was given)"
    seen = measured_effects(scores, kept)
    drawn = draw_effects(scores, kept, H100_SIGMA, args.nights, args.seed)
    below_sigma = np.where(drawn > -H100_SIGMA, np.minimum(drawn, 0), 0).sum(axis=1).mean()
    print(f"{len(seen)} effects of {source}")
    print(f"as seen: {np.sum(seen < 0)} gains, together {-np.minimum(seen, 0).sum():.4f} bpb")
    gains = np.minimum(drawn, 0).sum(axis=1).mean()
    print(f"drawn: {np.sum(drawn < 0) / len(drawn):.1f} gains, together {-gains:.4f} bpb,", end=" ")
    print(f"{-below_sigma:.4f} of it in gains below one sigma")
    sets = {"drawn": drawn, "as seen": np.tile(seen, (args.nights, 1))}
    print_frontier(sets, H100_SIGMA, 1.0, args.nights)
    print_frontier(sets, POCKET_SIGMA, POCKET_SCALE, args.nights)
    print_sizes(drawn, H100_SIGMA)
    print_workers(drawn, H100_SIGMA, args.nights // 2)
    print_equal_nights(drawn, H100_SIGMA, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
