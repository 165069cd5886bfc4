"""What a person reads as text: `status`, the `report` of a ledger, the table of an audit. It measures nothing.

All of it follows from a Ledger; only `status` asks a tag what its loop does now. "In the branch" is what the champion
stands on: a later verdict may have gone back to a champion before a kept change.
"""

import math
import statistics
import time
from collections import Counter

from harness.compare import align, former_text, mean_of_known, unit_of
from harness.console import duration, one_line
from harness.domain import Domain
from harness.ledger import BUSY, STATUSES, Change, Ledger, Run, broken_floor, wants_simpler

LAST_ROWS = 10
MOST_WORKERS = 12  # of which `status` tells one by one
MOST_CHANGES = 60  # in the table, the largest gains of more
BREAK_SECONDS = 3600  # nothing ended for so long: no loop ran, and the pace does not count it
FAR_ERRORS = 3  # standard errors: a believed score so far from the fresh ones is no longer believed
SPLITS_DIFFER = 0.1  # of a gain: two splits hold different text, so that gains on both differ by something

# ---------------------------------------------------------------------------------------------------------------------
# status


def status_text(tag) -> str:
    """What runs where, since when, of how long; what the loop waits for; where it stands."""
    ledger = tag.ledger
    live = tag.read_live()
    now = time.time()
    lines = []
    if not tag.is_busy():
        lines.append(f"{tag.branch}: no loop is running")
    elif not live:
        lines.append(f"{tag.branch}: a loop is starting")
    else:
        devices = live["devices"]
        of_devices = "1 device" if devices == 1 else f"{devices} devices"
        lines.append(f"{tag.branch}: a loop has been running for {duration(now - live['since'])} on {of_devices}")
        lines += _worker_lines(live, now)
        if live["waiting"]:
            lines.append(f"waiting: {live['waiting']}")
        if live["others"] is not None:
            lines.append(f"others used {live['others']:.0%} of the processors during the last run")
    lines.append(ledger.standing())
    rows = ledger.rows
    if rows:
        lines += ["", *(run.row(ledger.domain).rstrip() for run in rows[-LAST_ROWS:]), ""]
    lines += [text for text in (pace_text(ledger), cost_text(ledger)) if text]
    return "\n".join(lines).rstrip()


def _worker_lines(live: dict, now: float) -> list[str]:
    """A line for each worker, those that train first; many are summed up."""
    workers = sorted(live["workers"], key=lambda worker: worker["doing"] != "training")
    rows = [["", "", "", ""]]
    for worker in workers[:MOST_WORKERS]:
        time_words = duration(now - worker["since"])
        if worker["doing"] == "training" and live["usual_seconds"]:
            time_words += f" of about {duration(live['usual_seconds'])}"
        number = f"{worker['run']:04d}" if worker["run"] else ""
        rows.append([worker["doing"], number, time_words, one_line(worker["description"], 60)])
    lines = [f"  {line}" for line in align(rows)[1:]]
    if more := Counter(worker["doing"] for worker in workers[MOST_WORKERS:]):
        lines.append("  and " + ", ".join(f"{count} {doing}" for doing, count in more.items()))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# report


def report_text(ledger: Ledger) -> str:
    """Where it stands, what was kept, how sure that is, what it took, and what to run next."""
    rows = ledger.rows
    if not any(run.score is not None for run in rows):
        return "no scored run yet: 'uv run loop.py status' tells what is running"
    counts = Counter(run.status for run in rows)
    shares = ", ".join(f"{counts[status]:,} {status} ({counts[status] / len(rows):.0%})" for status in STATUSES)
    lines = [f"{len(rows):,} runs: {shares}"]
    if not ledger.champion:
        return "\n".join([*lines, "nothing was kept, no baseline either"])
    changes = ledger.changes()
    lines += [best_text(ledger), *better_elsewhere(ledger), kept_text(changes), ""]
    lines += align(changes_table(ledger, choose_changes(changes)), right=(0, 3, 4, 5, 7, 8))
    if len(changes) > MOST_CHANGES:
        lines.append(f"the {len(changes) - MOST_CHANGES:,} smallest gains are left out: results.tsv has them")
    lines += ["", *noise_lines(ledger, changes)]
    lines += [text for text in (pace_text(ledger), cost_text(ledger), machine_text(ledger)) if text]
    if any(run.started_at for run in rows):  # of a tag, where more can be run
        lines += ["", *next_lines(ledger, changes)]
    return "\n".join(lines)


def best_text(ledger: Ledger) -> str:
    """The champion and its believed score."""
    domain = ledger.domain
    best = ledger.best
    baseline = ledger.believed(ledger.baseline)
    first = ledger.first_run_of(ledger.champion)
    count = len(ledger.believed_scores(ledger.champion))
    total = len(ledger.scores(ledger.champion))
    runs = f"{count} run{'' if count == 1 else 's'}"
    if count < total:
        runs = f"{count} of its {total} runs: the first selected it"
    name = f"best: {domain.metric} {domain.score_text(best)} (run {first.number:04d}, {ledger.champion[:7]}"
    if ledger.champion == ledger.baseline:
        return f"{name}), the baseline, believed from {runs}"
    gain = domain.gain(baseline, best)
    amount = f"{domain.score_text(abs(gain))} {domain.unit} ({abs(gain) / (abs(baseline) or 1):.2%})"
    against = f"baseline {domain.score_text(baseline)}, {amount} {'worse' if gain < 0 else 'better'}"
    return f"{name}), believed from {runs}; {against}"


def better_elsewhere(ledger: Ledger) -> list[str]:
    """Why a score that is better than the best is not the best."""
    domain = ledger.domain
    lines = [text for text in (former_text(ledger),) if text]
    choose = min if domain.lower_is_better else max
    luckiest = choose((run for run in ledger.rows if run.counts), key=lambda run: run.score)
    if domain.gain(ledger.best, luckiest.score) > 0:
        why = luckiest.reason or f"a {luckiest.status} beside the champion of its time"
        runs = len(ledger.scores(luckiest.commit))
        if runs > 1:
            believed = domain.score_text(ledger.believed(luckiest.commit))
            why = f"one of {runs} runs of {luckiest.commit[:7]}, believed {believed}"
        score = domain.score_text(luckiest.score)
        lines.append(f"best score of a single run: {score}, run {luckiest.number:04d}, {why}")
    return lines


def kept_text(changes: list[Change]) -> str:
    """How many changes are in the branch, and how many of these a person may believe."""
    in_branch = [change for change in changes if change.is_in_branch]
    if not changes:
        return "no change was kept yet"
    words = "1 change is" if len(in_branch) == 1 else f"{len(in_branch):,} changes are"
    significant = sum(change.is_significant for change in in_branch)
    text = f"{words} in the branch, {significant:,} of them significant (a gain over 2 standard errors)"
    if left := len(changes) - len(in_branch):
        text += f"; {left:,} more {'was' if left == 1 else 'were'} kept and left the branch"
    return text


def choose_changes(changes: list[Change], most: int = 0) -> list[tuple[int, Change]]:
    """Numbered from 1; of many the largest gains, in their order."""
    numbered = list(enumerate(changes, 1))
    largest = sorted(numbered, key=lambda pair: pair[1].gain, reverse=True)[: most or MOST_CHANGES]
    return sorted(largest, key=lambda pair: pair[0])


def changes_table(ledger: Ledger, numbered: list[tuple[int, Change]]) -> list[list[str]]:
    """The kept changes below the baseline, with a heading."""
    domain = ledger.domain
    speed = f"{unit_of(domain)}/s"
    table = [["", "run", "commit", domain.metric, "gain", "± 2 errors", "", "steps", speed, "description"]]
    first = ledger.baseline_run
    score = domain.score_text(ledger.believed(first.commit))
    table.append(["", f"{first.number:04d}", first.commit[:8], score, "", "", "", *_speeds(ledger, first.commit)])
    table[-1].append(one_line(first.description))
    for number, change in numbered:
        run = change.run
        error = "" if change.standard_error is None else domain.score_text(2 * change.standard_error)
        cells = [str(number), f"{run.number:04d}", run.commit[:8], domain.score_text(change.score)]
        cells += [domain.score_text(change.gain), error, change_word(ledger, change)]
        table.append([*cells, *_speeds(ledger, run.commit), one_line(run.description)])
    return table


def change_word(ledger: Ledger, change: Change) -> str:
    """What a person must know of a kept change before believing its gain."""
    word = "within the noise"
    if change.gain < 0:
        has_repeats = len(ledger.scores(change.run.commit)) > 1 or len(ledger.scores(change.run.base)) > 1
        word = "worse by its repeats" if has_repeats else "worse"
        if wants_simpler(change.run.description):
            word = "worse, but simpler"
    elif change.standard_error is None:
        word = "noise unknown"
    elif change.is_significant:
        word = "significant"
    return word if change.is_in_branch else f"{word}, left the branch"


def _speeds(ledger: Ledger, commit: str) -> list[str]:
    """Steps and tokens a second of a commit, the means of its runs."""
    runs = ledger.runs_of(commit)
    means = (mean_of_known(run.steps for run in runs), mean_of_known(run.tokens_per_second for run in runs))
    return ["" if mean is None else f"{mean:,.0f}" for mean in means]


def noise_lines(ledger: Ledger, changes: list[Change]) -> list[str]:
    domain = ledger.domain
    noise = ledger.noise
    size = "" if noise.sigma is None else f"{domain.score_text(noise.sigma)} {domain.unit}, "
    lines = [f"sigma, the standard deviation between seeds: {size}{noise.source}"]
    if noise.sigma is not None and any(wants_simpler(change.run.description) for change in changes):
        given = domain.score_text(ledger.given_away())
        lines.append(f"given away for less code: {given} of at most {domain.score_text(2 * noise.sigma)} (two sigma)")
    return lines


def pace_text(ledger: Ledger) -> str:
    """Runs an hour and how many ran at a time, while a loop ran; "" where no times are known."""
    spans = sorted((run.started_at, run.started_at + run.seconds) for run in ledger.runs if run.started_at)
    if not spans:
        return ""
    wall = 0.0
    reached = -math.inf
    for start, end in spans:
        if start - reached > BREAK_SECONDS:
            wall += end - start
        else:
            wall += max(0.0, end - reached)
        reached = max(reached, end)
    busy = sum(end - start for start, end in spans)
    wall = wall or 1e-9
    idle = reached - spans[0][0] - wall
    lost = f", and {duration(idle)} without a run" if idle > 1 else ""
    usual = duration(statistics.median(end - start for start, end in spans))
    return f"pace: {len(spans) / wall * 3600:.1f} runs an hour, {busy / wall:.2f} at a time, {usual} each{lost}"


def cost_text(ledger: Ledger) -> str:
    """What the agents' calls cost; "" where no agent was called that costs anything. What a CLI does not report is
    unknown, so sums are lower bounds then."""
    costs = [run.cost for run in ledger.runs if run.cost]
    calls = sum(cost.get("calls") or 0 for cost in costs)
    if not calls:
        return ""
    parts = [f"cost: {calls:,} agent call{'' if calls == 1 else 's'}"]
    for keys, unit, digits in ((("usd",), "dollars", 2), (("tokens_in", "tokens_out"), "tokens", 0)):
        amounts = [[cost.get(key) for key in keys] for cost in costs]
        known = [sum(amount) for amount in amounts if None not in amount]
        if known:
            least = "" if len(known) == len(amounts) else "at least "
            kept = max(1, len(ledger.lineage()) - 1)
            each = f"{sum(known) / kept:,.{digits}f} a kept change"
            parts.append(f"{least}{sum(known):,.{digits}f} {unit} ({each})")
        else:
            parts.append(f"{unit} unknown")
    return ", ".join(parts)


def machine_text(ledger: Ledger) -> str:
    """On what device it ran, how busy others kept the machine, and whether runs were isolated; "" for a results.tsv."""
    measured = [run for run in ledger.runs if run.started_at and run.score is not None]
    if not measured:
        return ""
    parts = [one_line(str(ledger.runs[0].record.get("device_name", "an unknown device")))]
    if nodes := {run.node for run in measured if run.node}:
        parts.append(f"{len(nodes):,} nodes")
    if known := [run for run in measured if run.busy_others is not None]:
        median = statistics.median(run.busy_others for run in known)
        weak = f"over {BUSY:.0%} in {sum(run.is_busy for run in known):,} of {len(known):,}"
        parts.append(f"others used {median:.0%} of the processors in the median run, {weak}")
    bare = sum(not run.is_isolated for run in measured)
    parts.append(f"{bare:,} of {len(measured):,} runs were not isolated" if bare else "every run was isolated")
    return f"machine: {', '.join(parts)}"


def next_lines(ledger: Ledger, changes: list[Change]) -> list[str]:
    """The commands that say how much of all this to believe."""
    lines = ["next:"]
    in_branch = [change for change in changes if change.is_in_branch]
    if ledger.sigma is None:
        lines.append("  uv run loop.py try --base    the best once more: how much seeds differ is not known yet")
    if in_branch and not any(run.purpose == "audit" and run.commit == ledger.champion for run in ledger.runs):
        lines.append("  uv run loop.py audit         baseline and champion on fresh seeds and on the held-out split")
    ablated = {run.commit for run in ledger.runs if run.purpose == "ablation"}
    if len(in_branch) > 1 and not ablated & set(ledger.lineage()[-2:]):  # --apply adds one change
        lines.append("  uv run loop.py ablate        which of the kept changes are real: the champion without each")
    return lines if len(lines) > 1 else ["next: uv run loop.py --agent NAME goes on"]


# ---------------------------------------------------------------------------------------------------------------------
# audit


def audit_text(ledger: Ledger, group: str) -> tuple[str, list[str]]:
    """Baseline and champion on fresh seeds, in the run's own process and in a clean one; and what is to be doubted,
    a line each."""
    domain = ledger.domain
    began = next(place for place, run in enumerate(ledger.runs) if run.group.partition("/")[0] == group)
    then = Ledger(domain, ledger.runs[:began], ledger.profile)  # what is believed may have changed since
    # sigma without this audit's own runs, where it is known: a belief that was far off would hide in it.
    before = ledger if then.sigma is None else then
    by_role: dict[str, list[Run]] = {}
    for run in ledger.runs:
        name, _, role = run.group.partition("/")
        if run.purpose == "audit" and name == group and run.score is not None:
            by_role.setdefault(role, []).append(run)
    splits = [f"validation, {domain.unit}", f"held-out test, {domain.unit}"]
    rows = [[group, *splits, "steps", f"{unit_of(domain)}/s"]]
    notes = []
    doubts = []
    for role, runs in by_role.items():
        rows += _rows_of_role(then, role, runs)
        notes += _record_lines(domain, role, runs)
        for run in runs:
            doubts += _doubts_of_run(domain, run, role)
        doubts += _doubts_of_belief(then, runs, role, before)
    is_clean = all(run.clean_score is not None for runs in by_role.values() for run in runs)
    if set(by_role) == {"baseline", "champion"}:
        names = ("clean_score", "clean_test_score") if is_clean else ("score", "test_score")
        gains = [_gain(by_role, name, domain) for name in names]
        _, error = before.difference(*([run.score for run in runs] for runs in by_role.values()))
        error_text = "" if error is None else f" ± {domain.score_text(2 * error)}"
        texts = ["" if gain is None else f"{domain.score_text(gain)}{error_text}" for gain in gains]
        rows.append(["gain ± 2 standard errors", *texts, "", ""])
        doubts += _doubts_of_gains(gains, error or 0.0, domain)
    else:
        stopped = "this audit was stopped before both had run"
        notes.append("no change was in the branch" if then.champion == then.baseline else stopped)
    if busy := sum(run.is_busy for runs in by_role.values() for run in runs):
        notes.append(f"others used over {BUSY:.0%} of the processors in {busy} of these runs: their scores are weak")
    if not is_clean:
        notes.append("not every run was scored in a clean process: the gain is of the runs' own scores")
    return "\n".join(align(rows, right=(1, 2, 3, 4)) + notes), doubts


def _rows_of_role(ledger: Ledger, role: str, runs: list[Run]) -> list[list[str]]:
    """Of baseline or champion: the scores in the runs' own processes, in clean ones, and what was believed before."""
    domain = ledger.domain
    commit = runs[0].commit

    def spread(field: str) -> str:
        """Mean and standard deviation; "-" where a score is missing."""
        scores = [getattr(run, field) for run in runs]
        if None in scores:
            return "-" if domain.test_metric or "test" not in field else ""
        text = domain.score_text(statistics.fmean(scores))
        if len(scores) > 1 and all(map(math.isfinite, scores)):
            text += f" ± {domain.score_text(statistics.stdev(scores))}"
        return text

    speeds = [mean_of_known(getattr(run, field) for run in runs) for field in ("steps", "tokens_per_second")]
    speed_texts = ["" if speed is None else f"{speed:,.0f}" for speed in speeds]
    name = f"{role} {commit[:7]}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    rows = [
        [name, spread("score"), spread("test_score"), *speed_texts],
        ["  in a clean process", spread("clean_score"), spread("clean_test_score"), "", ""],
    ]
    believed = ledger.believed(commit)
    if believed is not None:
        off = statistics.fmean(run.score for run in runs) - believed
        label = f"  believed before, off by {off:+.{domain.score_digits}f}"
        rows.append([label, domain.score_text(believed), "", "", ""])
    return rows


def _record_lines(domain: Domain, role: str, runs: list[Run]) -> list[str]:
    """What else the records of an audit's runs hold: numbers that have floors, and digests by which weights are known
    again."""
    lines = []
    for key, least in domain.floors.items():
        values = [run.record.get("floors", {}).get(key) for run in runs]
        lines.append(f"{role}, {key}: {', '.join(map(str, values))} (floor {least:g})")
    digests = [run.record["weights_sha256"][:12] for run in runs if run.record.get("weights_sha256")]
    if digests:
        lines.append(f"{role}, weights' SHA-256: {', '.join(digests)}")
    return lines


def _gain(by_role: dict[str, list[Run]], field: str, domain: Domain) -> float | None:
    """Of the champion on the baseline, by one of the four scores of their runs."""
    means = []
    for role in ("baseline", "champion"):
        scores = [getattr(run, field) for run in by_role[role]]
        if None in scores:
            return None
        means.append(statistics.fmean(scores))
    return domain.gain(*means)


def _doubts_of_run(domain: Domain, run: Run, role: str) -> list[str]:
    name = f"{role}, run {run.number:04d}"
    doubts = []
    if broken := broken_floor(run, domain):
        doubts.append(f"{name}: {broken}")
    if run.clean_score is None:
        return [*doubts, f"{name} was not scored in a clean process: {run.problem or 'no network was exported'}"]
    pairs = [("validation", run.score, run.clean_score), ("held-out", run.test_score, run.clean_test_score)]
    for split, own, clean in pairs:
        if own is not None and not (clean is not None and abs(own - clean) <= domain.rescore_tolerance):  # NaN too
            clean_text = "nothing" if clean is None else domain.score_text(clean)
            scores = f"{domain.score_text(own)} in its own process and {clean_text} in a clean one"
            doubts.append(f"{name} scored {scores} ({split}): believe neither")
    return doubts


def _doubts_of_belief(ledger: Ledger, runs: list[Run], role: str, before: Ledger) -> list[str]:
    """A belief that its commit's fresh scores do not bear out. `before` knows sigma."""
    commit = runs[0].commit
    believed = ledger.believed(commit)
    scores = [run.score for run in runs]
    gain, error = before.difference(ledger.believed_scores(commit), scores)
    if error is None or abs(gain) <= FAR_ERRORS * error:
        return []
    fresh = statistics.fmean(scores)
    text = ledger.domain.score_text
    far = f"{abs(gain) / error:.1f} standard errors away: do not believe the ledger's score"
    return [f"{role}: believed {text(believed)}, its fresh runs give {text(fresh)}, {far}"]


def _doubts_of_gains(gains: list[float | None], error: float, domain: Domain) -> list[str]:
    """Gains on the two splits that disagree: what gained may have seen the validation text.

    `error`: the standard error of either; the difference has at most both.
    """
    if None in gains:
        return []
    gain, test_gain = gains
    allowed = 2 * math.sqrt(2) * error + SPLITS_DIFFER * max(abs(gain), abs(test_gain))
    if abs(gain - test_gain) <= allowed:
        return []
    words = f"{domain.score_text(gain)} on validation and {domain.score_text(test_gain)} on the held-out split"
    return [f"the gains disagree: {words}, beyond their errors: what gained may have seen the validation text"]
