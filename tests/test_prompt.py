"""harness/prompt.py: what an agent is told of the experiments before its own.

uv run pytest tests/test_prompt.py
"""

import dataclasses
import re

import loop
from harness.ledger import parse_ledger
from harness.prompt import DEAD_ENDS, KEPT, PLATEAU, UNSETTLED, Background, memory, standing, write_prompt

HIGHER = dataclasses.replace(loop.DOMAIN, lower_is_better=False)


def memory_of(rows, busy=(), merged=(), domain=loop.DOMAIN) -> dict[str, list[str]]:
    """Heading, up to its first comma or colon -> its lines."""
    lines = "".join(["aaaaaaa\t1.0\t0\tkeep\tbaseline\n", *rows])
    background = Background(sigma=0.01, busy=set(busy), merged=set(merged), verdicts=[])
    parts = memory(parse_ledger(lines)[0], background, domain)
    return {re.split("[,:]", part)[0]: part.split("\n")[2:] for part in parts}


def test_memory_counts_an_experiment_once_and_calls_no_crash_or_busy_discard_a_dead_end():
    rows = [f"{n:07x}\t{1.1 + n / 1000}\t0\tdiscard\tidea {n}\n" for n in range(1, 14)]
    rows.insert(3, "ccccccc\t0.99\t0\tkeep\tgain\n")
    rows += ["0000001\t0.992\t0\tdiscard\tidea 1 (again)\n", "ddddddd\t0\t0\tcrash\tboom: idea\n"]
    rows += ["ccccccc\t0.994\t0\tkeep\tgain (again)\n"]  # the champion measured again: no new keep
    told = memory_of(rows, busy={"000000c"})
    assert [line.split("\t")[:2] for line in told["Kept so far"]] == [["ccccccc", "0.994000"]]  # fresh seeds
    near = [line.split("\t") for line in told["Near misses"]]
    assert [cells[4] for cells in near] == [f"idea {n}" for n in range(1, 11)]
    assert near[0][:2] == ["0000001", "0.992000"]
    assert told["Dead ends"] == ["- +0.117000 to the best of then: idea 11", "- +0.119000 to the best of then: idea 13"]
    assert told["Not settled"] == ["- the machine was busy: idea 12", "- it crashed: boom: idea"]
    assert not [heading for heading in told if heading.startswith("Nothing was kept")]

    # After the gain came ten ideas and idea 1 again, one on a busy machine; now seven more, one of them merged.
    rows += [f"{n:07x}\t1.2\t0\tdiscard\tidea {n}\n" for n in range(14, 21)]
    assert "Nothing was kept in the last 16 experiments" in str(memory_of(rows, {"000000c"}, {"000000e"}))


def test_memory_follows_the_direction_of_the_metric_and_spares_what_is_no_dead_end():
    rows = [f"{n:07x}\t{0.9 - n / 1000}\t0\tdiscard\tidea {n}\n" for n in range(1, 14)]
    rows.append("eeeeeee\t1.5\t0\tdiscard\tmerged by and by\n")  # a gain on a former champion
    told = memory_of(rows, merged={"000000d"}, domain=HIGHER)
    near = [line.split("\t")[4] for line in told["Near misses"]]
    assert near == ["merged by and by", *(f"idea {n}" for n in range(1, 10))]
    assert [line.rpartition(": ")[2] for line in told["Dead ends"]] == ["idea 10", "idea 11", "idea 12"]
    told = memory_of(rows, merged={"000000d"})
    assert [line.rpartition(": ")[2] for line in told["Dead ends"]] == ["merged by and by"]


def test_memory_keeps_the_newest_of_each_kind_and_tells_a_plateau_as_it_begins():
    """A commit that was discarded, and kept when it ran again, counts as kept."""
    rows = ["0000000\t1.1\t0\tdiscard\tlate bloomer\n", "0000000\t0.9999\t0\tkeep\tlate bloomer (again)\n"]
    rows += [f"a{n:06x}\t{0.99 - n / 1e6}\t0\tkeep\tkept {n}\n" for n in range(KEPT - 1)]
    told = memory_of(rows)
    assert [told["Kept so far"][line].rpartition("\t")[2] for line in (0, -1)] == ["late bloomer", f"kept {KEPT - 2}"]
    rows.append("b000000\t0.98\t0\tkeep\tlast\n")
    rows += [f"c{n:06x}\t{1.2 + n / 1e6}\t0\tdiscard\tworse {n}\n" for n in range(PLATEAU)]
    told = memory_of(rows)
    assert [told["Kept so far"][line].rpartition("\t")[2] for line in (0, -1)] == ["kept 0", "last"]
    assert any(heading.startswith(f"Nothing was kept in the last {PLATEAU} ") for heading in told)
    assert not any(heading.startswith("Nothing was kept") for heading in memory_of(rows[:-1]))
    rows += [f"d{n:06x}\t1.3\t0\tdiscard\tfar worse {n}\n" for n in range(DEAD_ENDS)]
    rows += [f"f{n:06x}\t0\t0\tcrash\tboom {n}\n" for n in range(UNSETTLED + 1)]
    told = memory_of(rows)
    assert [line.rpartition(" ")[2] for line in told["Dead ends"]] == [f"{n}" for n in range(DEAD_ENDS)]
    assert told["Dead ends"][0].endswith("far worse 0")
    assert [line.rpartition(" ")[2] for line in told["Not settled"]] == [f"{n}" for n in range(1, UNSETTLED + 1)]


def test_summary_of_a_ledger_without_a_keep_tells_its_first_score():
    rows, _ = parse_ledger("aaaaaaa\t0\t0\tcrash\tboom\nbbbbbbb\t1.25\t0\tdiscard\tidea\n")
    assert standing(rows, loop.DOMAIN) == "Best val_bpb 1.250000 (bbbbbbb); rows: 0 keep, 1 discard, 1 crash."


def test_prompt_has_every_part_in_order_and_none_that_is_empty():
    rows, _ = parse_ledger("aaaaaaa\t1.5\t0\tkeep\tbaseline\n")
    background = Background(sigma=0.01, busy=set(), merged=set(), verdicts=["first table", "second table"])
    whole = write_prompt("Do it.\n", rows, background, ["idea\none"], "it repeats", "Mend this.", loop.DOMAIN)
    parts = ["Do it.\n\n---", "Best val_bpb 1.5", "aaaaaaa\t1.5", "first table\n\nsecond table", "\n- idea one\n"]
    parts += ["The last proposal was refused: it repeats", "Mend this.", "Now: edit train.py once"]
    places = [whole.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    bare = write_prompt("Do it.\n", rows, dataclasses.replace(background, verdicts=[]), [], "", "", loop.DOMAIN)
    assert not [word for word in ("verdict", "Running", "refused") if word in bare] and "\n\n\n" not in bare
