"""harness/prompt.py: what an agent is told of the experiments before its own.

uv run pytest tests/test_prompt.py
"""

import re

import loop
from harness.ledger import parse_ledger
from harness.prompt import Background, memory


def memory_of(rows, busy=(), merged=()) -> dict[str, list[str]]:
    """Heading, up to its first comma or colon -> its lines."""
    lines = "".join(["aaaaaaa\t1.0\t0\tkeep\tbaseline\n", *rows])
    background = Background(sigma=0.01, busy=set(busy), merged=set(merged), verdicts=[])
    parts = memory(parse_ledger(lines)[0], background, loop.DOMAIN)
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
