"""Many workers on one ratchet: whatever the order in which results arrive, no gain is lost and none is assumed."""

import fcntl
import signal

from conftest import BASELINE, Checkout, ended, hear, wait_for


def test_gains_that_meet_are_not_added_and_edits_that_conflict_or_repeat_are_dropped(checkout: Checkout):
    """Two workers edit the same champion. A and B gain alone and not together: the later one runs again, and loses."""
    checkout.replace("train.py", "LR = 0.1", "A = 0\n\n\nB = 0\n\n\nLR = 0.5")
    checkout.replace("train.py", "finish(1.0", "finish(1.5 - 0.1 * (A + B) + 0.5 * A * B")
    checkout.commit("gains that do not go together")
    checkout.loop(*BASELINE)
    edits = [("A", 1), ("B", 1), ("LR", 0.4), ("LR", 0.3), ("DEPTH", 6), ("DEPTH", 6)]
    agent = checkout.agent(f"""
        n = count()
        (OUTSIDE / f"prompt{{n}}").write_text(prompt)
        knob(*({edits} + [("DEPTH", n)] * n)[n - 1])
    """)
    told = "runs again on the present one", "conflicts with the new champion", "repeats an experiment that runs now"
    for words in told:
        checkout.hold.touch()
        process = checkout.popen("--tag", "t", "--agent-cmd", agent, "--workers", "2", "--max-experiments", "2")
        if "repeats" in words:
            hear(process, words)
        else:
            hear(process, "run 00")
            hear(process, "run 00")
        checkout.hold.unlink()
        assert words in ended(process).stderr
    runs = checkout.runs()
    experiments = {run.number for run in runs if run.purpose == "experiment" and not run.again_of}
    assert len(experiments) == 6  # what was dropped does not count
    stale = runs[2]
    assert stale.is_stale and stale.status == "discard" and stale.base == runs[1].base == runs[0].commit
    assert runs[3].again_of == stale.number and runs[3].status == "discard" and runs[3].base == runs[1].commit
    dropped = [run for run in runs if run.reason.startswith("gained on a former champion; it conflicts with the new")]
    assert dropped and not any(run.is_stale for run in dropped)  # no later session runs it again
    assert "conflict" in (checkout.outside / "prompt5").read_text()
    kept = [run for run in runs if run.status == "keep"]
    champions = [run.commit for run in kept]
    assert [run.base for run in kept] == ["", *champions[:-1]]  # each was measured on the one that it replaced
    assert checkout.git("rev-parse", "autoresearch/t") == champions[-1]


def test_four_workers_fill_four_devices_and_stop_as_one(checkout: Checkout):
    checkout.loop(*BASELINE)
    checkout.hold.touch()
    agent = checkout.agent('knob("LR", 0.2 + count() / 100)')
    process = checkout.popen("--tag", "t", "--agent-cmd", agent, "--workers", "4")
    for _ in range(4):
        hear(process, "run 000")
    status = wait_for(lambda: (text := checkout.loop("status", "--tag", "t").stdout).count("training") >= 4 and text)
    assert all(f"{number:04d}" in status for number in (2, 3, 4, 5))
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert checkout.orphans() == [] and checkout.statuses() == ["keep"]


def test_run_that_meets_another_ones_device_is_made_on_a_free_one(checkout: Checkout):
    with open(checkout.cache / "cpu0.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        agent = checkout.agent('knob("DEPTH", 4 + count())')
        done = checkout.loop("--tag", "t", "--agent-cmd", agent, "--workers", "2", "--max-experiments", "2")
    assert "waiting: another run holds the device" in done.stderr and len(checkout.rows()) >= 3


def test_workers_beyond_the_devices_propose_ahead_and_rest_alone_where_their_agent_fails(checkout: Checkout):
    """Three workers for one device; each edit is merged onto the champion of its moment. The agent of one fails."""
    checkout.replace("train.py", "LR = 0.1", "\n\n\nLR = 0.5")
    (checkout.cache / "devices").write_text("1")
    checkout.set_constant("harness/agents.py", "FIRST_REST", "60")
    checkout.set_constant("harness/agents.py", "LAST_REST", "60")
    checkout.commit("lines between the knobs, long rests")
    agent = checkout.agent("""
        if os.getcwd().endswith("/1"):
            sys.exit("worker one fell over")
        if "Running or waiting now" in prompt:
            (OUTSIDE / "told").touch()
        n = count()
        if n % 2:
            knob("DEPTH", 4 + n)
        else:
            knob("LR", 0.5 - n / 100)
    """)
    process = checkout.popen("--tag", "t", "--agent-cmd", agent, "--workers", "2", "--ahead", "1")
    hear(process, "note: 2 workers, 1 device here")
    hear(process, "worker one fell over")
    wait_for(lambda: len(checkout.rows()) >= 7, seconds=60)
    process.send_signal(signal.SIGINT)
    ended(process)
    best = [float(row[1]) for row in checkout.rows() if row[3] == "keep"]
    assert best == sorted(best, reverse=True) and len(best) > 2 and (checkout.outside / "told").exists()
    again = {run.again_of for run in checkout.runs()}
    assert all(run.number in again for run in checkout.runs() if run.is_stale)
