"""harness/prompt.py: what an agent is told of the experiments before its own."""

import dataclasses
import re

from agent_fixtures import DOMAIN

from harness.ledger import Ledger, Run
from harness.prompt import DEAD_ENDS, KEPT, PLATEAU, SECOND_LOOK_EVERY, TASK_CHARS, UNSETTLED, write_prompt


class Night:
    """A ledger that is written one run after another; sigma is 0.01."""

    def __init__(self, domain=DOMAIN, profile="pocket"):
        self.ledger = Ledger(domain)
        self.add("keep", 1.0, "baseline", purpose="baseline", base="", record={"profile": profile})

    def add(self, status: str, score: float | None, description: str, commit: str = "", **values) -> str:
        number = len(self.ledger.runs) + 1
        commit = commit or f"{number:07x}"
        values = {"base": self.ledger.champion} | values
        run = Run(number, commit, status=status, score=score, description=description, **values)
        self.ledger = Ledger(self.ledger.domain, [*self.ledger.runs, run])
        return commit

    def prompt(self, **values) -> str:
        values = {"running": [], "verdicts": [], "refusal": "", "crash_log": ""} | values
        values = {"suggestions": [], "read": lambda commit: commit.encode()} | values
        return write_prompt("Do it.\n", self.ledger, **values)

    def told(self) -> dict[str, list[str]]:
        """Heading of a part, up to its first comma or colon -> its lines."""
        parts = self.prompt().split("\n\n")
        return {re.split("[,:]", head)[0]: body.split("\n") for head, body in zip(parts, [*parts[1:], ""], strict=True)}


def test_memory_counts_an_experiment_once_and_calls_no_crash_or_busy_discard_a_dead_end():
    night = Night()
    first = night.add("discard", 1.001, "idea 1")
    for n in range(2, 14):
        night.add("discard", 1.1 + n / 1000, f"idea {n}", busy_others=0.5 if n == 12 else 0.05)
    gain = night.add("keep", 0.99, "gain", base=night.ledger.baseline)
    night.add("discard", 0.992, "idea 1", commit=first, purpose="replicate")
    night.add("crash", None, "idea", reason="boom")
    night.add("keep", 0.994, "gain", commit=gain, purpose="replicate")  # the champion measured again: no new keep
    night.add("discard", 1.5, "ran again on a later champion", is_stale=True)
    told = night.told()
    assert [line.split("\t")[:2] for line in told["Kept so far"]] == [[gain, "0.994000"]]  # fresh seeds
    near = [line.split("\t") for line in told["Near misses"]]
    assert [cells[4] for cells in near] == [f"idea {n}" for n in range(1, 11)]
    assert near[0][:2] == [first, "0.992000"]
    against = "worse than 0000001 (baseline)"
    assert told["Dead ends"] == [f"- idea 11: 0.111000 {against}", f"- idea 13: 0.113000 {against}"]
    assert told["Not settled"] == ["- the machine was busy: idea 12", "- it crashed: boom: idea"]


def test_dead_end_names_the_champion_of_its_time_and_none_is_told_while_the_noise_is_unknown():
    higher = dataclasses.replace(DOMAIN, lower_is_better=False)
    for domain, profile, count in ((DOMAIN, "pocket", 1), (higher, "pocket", 1), (DOMAIN, "of their own", 0)):
        sign = 1 if domain.lower_is_better else -1
        night = Night(domain, profile)
        for n in range(10):
            night.add("discard", 1.0 + sign * n / 1000, f"near {n}")
        base = night.add("keep", 1.0 - sign * 0.1, "a deeper model")
        night.add("discard", 1.0 + sign * 0.2, "no warm-up", reason="sensitivity 0.7 is below 0.9")
        told = night.told()
        assert [line.split("\t")[4] for line in told["Near misses"]] == [f"near {n}" for n in range(10)]
        end = f"- sensitivity 0.7 is below 0.9: no warm-up: 0.300000 worse than {base} (a deeper model)"
        assert told.get("Dead ends", []) == [end] * count


def test_memory_keeps_the_newest_of_each_kind_and_tells_a_plateau_as_it_begins():
    night = Night()
    for n in range(KEPT + 1):
        night.add("keep", 0.99 - n / 1e6, f"kept {n}")
    for n in range(PLATEAU):
        assert "Nothing was kept" not in night.prompt()
        night.add("discard", 1.2 + n / 1e6, f"worse {n}")
    assert f"Nothing was kept in the last {PLATEAU} experiments: leave this neighbourhood" in night.prompt()
    for n in range(DEAD_ENDS):
        night.add("discard", 1.3, f"far worse {n}")
    for n in range(UNSETTLED + 1):
        night.add("crash", None, f"boom {n}")
    told = night.told()
    assert [told["Kept so far"][line].rpartition("\t")[2] for line in (0, -1)] == ["kept 1", f"kept {KEPT}"]
    assert [line.split(":")[0] for line in told["Dead ends"]] == [f"- far worse {n}" for n in range(DEAD_ENDS)]
    assert [line.rpartition(" ")[2] for line in told["Not settled"]] == [f"{n}" for n in range(1, UNSETTLED + 1)]


def test_nearest_discards_in_lines_that_the_champion_left_alone_are_told_after_a_large_keep_and_now_and_then():
    night = Night()
    lines = [b"line %d" % number for number in range(10)]
    files = {night.ledger.baseline: b"\n".join(lines)}

    def looks(changed: int, status: str, score: float, description: str) -> list[str]:
        commit = night.add(status, score, description)
        files[commit] = b"\n".join([*lines[:changed], b"another", *lines[changed + 1 :]])
        told = night.prompt(read=files.__getitem__).partition("Worth another look")[2]
        return told.split("\n\n")[1].split("\n") if told else []

    for changed, score in ((8, 1.004), (2, 1.001), (5, 1.0005), (9, 1.003), (0, 1.002)):
        assert looks(changed, "discard", score, f"line {changed}") == []  # the champion is their base
    worth = []
    for number, changed, loss in ((3, 2, "0.001000"), (6, 0, "0.002000"), (5, 9, "0.003000")):
        worth.append(f"- {number:07x} line {changed}: {loss} worse than 0000001 (baseline)")
    assert looks(5, "keep", 0.9, "large") == worth  # by 10 sigma; line 5 is the champion's now
    assert looks(5, "keep", 0.89, "small") == []
    for number in range(len(night.ledger.runs), SECOND_LOOK_EVERY):
        assert looks(7, "discard", 1.5, f"idea {number}") == []
    assert looks(7, "discard", 1.5, "the 20th") == worth


def test_prompt_has_every_part_in_order_and_none_that_is_empty_and_stays_short_however_long_the_night():
    night = Night()
    for n in range(30):
        night.add("discard", 1.5 + n, f"idea {n}")
    told = {"verdicts": ["first table", "second table"], "suggestions": ["LR 0.1 -> 0.2"]}
    whole = night.prompt(running=["idea\none"], refusal="it\nrepeats", crash_log="x" * 10**6 + "boom", **told)
    assert len(whole) < TASK_CHARS + 20_000
    parts = ["Do it.\n\n---", "Best val_bpb 1.0", "commit\tval_bpb\tmemory_gb", "idea 10\n", "idea 29\n", "Near misses"]
    parts += ["Dead ends", "Nothing was kept", "\n- LR 0.1 -> 0.2\n", "first table\n\nsecond table", "\n- idea one\n"]
    parts += ["The last proposal was no experiment: it repeats", "crashed: mend it", "boom", "Now: edit train.py once"]
    places = [whole.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    bare = Night().prompt()
    assert not re.search("verdict|Running|refused|Kept|Near|Dead|settled|\n\n\n", bare)
    for n in range(1000):
        night.add(("discard", "crash", "keep")[n % 3], 2.0 - n / 1e5, "long " * 100, reason="why " * 200)
    assert len(night.prompt(running=["wide " * 100] * 3000, refusal="r" * 10**5)) < 60_000
