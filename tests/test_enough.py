"""What ends a night by itself, and who is told: --max-usd, --patience, --target, --notify.

uv run pytest tests/test_enough.py
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DEEPER, Desk, ended, has_event, hear, wait_for

import loop
from harness import notify
from harness.ledger import Row
from harness.notify import Notifier
from harness.processes import find_processes
from harness.watch import Watch

TOLD = 'f=$(mktemp "$HOME/told.XXXXXX") && cat > "$f"'  # a command for --notify
PAY = """
import json

def pay(usd):
    usage = {"inputTokens": 1000, "cacheReadInputTokens": 0, "cacheCreationInputTokens": 0, "outputTokens": 10}
    said = {"type": "result", "result": "I did it.", "total_cost_usd": usd, "modelUsage": {"m": usage}}
    print(json.dumps(said))
"""


def told(desk: Desk) -> list[str]:
    """What --notify told, in order."""
    files = sorted(Path(desk.env["HOME"]).glob("told.*"), key=lambda path: path.stat().st_mtime_ns)
    return [path.read_text() for path in files]


def test_night_ends_when_its_agents_have_cost_enough_and_says_what_they_cost(desk):
    """A failed call costs too; what was paid for is still trained; a long wait is told once."""
    desk.set_constant("harness/watch.py", "LONG_WAIT", "0")
    desk.commit("tell a wait at once")
    body = f"""
n = count()
if n == 2:
    sys.exit("no JSON")
pay(n / 4)
if n == 1:
    sys.exit(1)
{DEEPER}
"""
    agent = desk.agent(PAY + body)
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-usd", "1", "--notify", TOLD)
    assert desk.statuses() == ["keep", "keep"]
    assert "no proposal: the agent ended with exit code 1: I did it.; again" in done.stderr
    assert done.stderr.count("note: this agent did not say what a call cost: --max-usd 1 cannot count it") == 1
    costs = [event for event in desk.events() if event["event"] == "proposal"]
    assert [(cost["tokens_in"], cost["tokens_out"], cost["usd"]) for cost in costs] == [
        (1000, 10, 0.25), (None, None, None), (1000, 10, 0.75)
    ]  # fmt: skip
    assert [cost["description"] for cost in costs][2] == "DEPTH 4 -> 5.0"
    log = (desk.home() / "agent.log").read_text()
    assert log.startswith("{") and log.endswith("--- In plain words ($0.75, 1,000 tokens in, 10 out):\n\nI did it.\n")
    bill = "3 agent calls: $1.00 ($0.50 a call, $1.00 a kept gain), 1 call unknown; 2,020 tokens"
    assert bill in desk.loop("status", "--tag", "t").stdout

    waiting, kept, end = (text.partition(": autoresearch/t: ")[2] for text in told(desk))
    assert waiting.startswith("waiting for 0 s for a proposal: the agents give none\nBest val_bpb 1.080000")
    assert kept.startswith("kept val_bpb 1.070000 (gain 0.010000 bpb, run 0002): DEPTH 4 -> 5.0\nBest val_bpb 1.07")
    assert end.startswith("the loop ended: --max-usd 1 is spent\nBest val_bpb 1.070000")


def test_night_without_a_keep_ends_and_a_target_that_is_reached_begins_none(desk):
    agent = desk.agent('n = count()\nknob("DEPTH", [0, 5, 3, 2, 1][n])')
    fails = 'read -r line; echo "$line"; exit 3'
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--patience", "2", "--notify", fails)
    assert desk.statuses() == ["keep", "keep", "discard", "discard"]
    assert "enough: no keep in 2 experiments (--patience); finishing what runs, then stopping" in done.stderr
    assert desk.events()[-1]["description"] == "no keep in 2 experiments (--patience)"
    lines = (desk.home() / "notify.log").read_text().splitlines()
    assert len(lines) == 2 and all(f"{fails}: exit code 3: {os.uname().nodename}: " in line for line in lines)

    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--target", "1.07", "--notify", TOLD)
    assert "enough: the champion's 1.070000 reaches --target 1.07" in done.stderr
    assert len(desk.rows()) == 4 and "run 0005" not in done.stderr
    assert "ended: the champion's 1.070000 reaches --target 1.07\n" in told(desk)[0] and len(told(desk)) == 1


@pytest.mark.slow
def test_target_ends_a_night_and_ctrl_c_does_not_reach_who_is_told(desk):
    desk.set_constant("harness/notify.py", "LAST_WAIT", "0.3")
    desk.commit("wait shortly at the end")
    slowly = f'touch "$HOME/telling"; while [ -e "$HOME/wait" ]; do sleep 0.05; done; {TOLD}'
    home = Path(desk.env["HOME"])
    (home / "wait").touch()
    agent = desk.agent(f"if count() == 3: HOLD.touch()\n{DEEPER}")
    process = desk.popen("--tag", "t", "--agent-cmd", agent, "--target", "1.055", "--notify", slowly)
    wait_for(has_event(desk, "training", 4))
    wait_for((home / "telling").exists)
    wait_for(lambda: any("train.py" in command for command in desk.orphans()))  # it has a session of its own by then
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    hear(process, "Ctrl-C again: stop now")
    desk.hold.unlink()
    begin = time.monotonic()
    done = ended(process)  # after it waited a few seconds for those who are told
    assert "enough: the champion's 1.050000 reaches --target 1.055" in done.stderr
    assert 0.3 <= time.monotonic() - begin < 4
    assert desk.statuses() == ["keep"] * 4 and told(desk) == []
    (home / "wait").unlink()
    wait_for(lambda: len(told(desk)) == 4 and all(told(desk)))


def test_notification_that_hangs_or_floods_is_ended_and_logged(tmp_path, monkeypatch):
    log = tmp_path / "notify.log"
    watcher = [sys.executable, "-I", "-S", notify.__file__, "0.3", str(log)]
    begin = time.monotonic()
    nap = f"60.{os.getpid()}"  # seconds, by which its processes are known
    hangs = f"sleep {nap} & setsid sleep 61; sleep {nap}"
    hanging = subprocess.Popen([*watcher, hangs], stdin=subprocess.DEVNULL)
    flooding = subprocess.Popen([*watcher[:-2], "10", str(log), "yes | head -c 3000000"], stdin=subprocess.DEVNULL)
    assert hanging.wait(10) == 1 and flooding.wait(10) == 0
    assert time.monotonic() - begin < 10
    text = log.read_text()
    assert f"sleep {nap}: ended after 0.3 s\n" in text
    wait_for(lambda: not find_processes("cmdline", f"^sleep\0{nap}\0".encode()), 5)
    assert text.count("\n") == 2 and len(text) < 5000
    monkeypatch.setattr(notify, "LOG_CAP", 10)
    notify.write_line(log, "too long a log")
    assert log.read_text().count("\n") == 1 and log.read_text().endswith(" too long a log\n")
    log.unlink()
    os.mkfifo(log)  # by an agent: nobody reads it
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    notifier = Notifier("true", log)
    notifier.tell("news")
    notifier.close()


@pytest.mark.parametrize("better", [-1, +1])
def test_watch_counts_losses_since_the_last_keep_and_ends_at_the_target(store, monkeypatch, better):
    store.domain = replace(loop.DOMAIN, lower_is_better=better < 0)
    store.rows = [Row("a" * 7, 5.0, 1.0, "keep", "baseline"), Row("b" * 7, 5 + better * 0.5, 1.0, "keep", "idea")]
    watch = Watch(store, 2, None, "")
    told = []
    watch._notifier.tell = told.append
    watch.take_no_keep()
    watch.take_keep("b" * 40, "a" * 40, 7, "idea")
    watch.look_for_target()
    watch.take_no_keep()
    assert watch.enough == "" and told[0].startswith(
        f"autoresearch/t: kept val_bpb {5 + better * 0.5:.6f} (gain 0.500000 bpb, run 0007): idea\n"
    )
    watch.take_no_keep()
    assert watch.enough == "no keep in 2 experiments (--patience)"
    for target, is_reached in ((5 + better * 0.5, True), (5 + better * 0.4, True), (5 + better * 0.6, False)):
        watch = Watch(store, 2, target, "")
        watch.look_for_target()
        assert bool(watch.enough) == is_reached, target
    watch.take_no_keep()
    watch.enough = "another reason"
    watch.take_no_keep()
    assert watch.enough == "another reason"


def test_watch_tells_the_longest_wait_once_and_the_next_one_again(store):
    store.rows = [Row("a" * 7, 5.0, 1.0, "keep", "baseline")]
    watch = Watch(store, 2, None, "")
    told = []
    watch._notifier.tell = lambda text: told.append(text.split("\n")[0])
    now = time.monotonic()
    watch.look_for_long_wait({"for A": now - 1700})
    watch.look_for_long_wait({"for A": now - 7200, "for B": now})
    assert told == ["autoresearch/t: waiting for 2.0 h for A"]
    for waits in ({"for A": now - 7200}, {}):
        watch.look_for_long_wait(waits)
    watch.look_for_long_wait({"for B": now - 3600})
    assert told[1:] == ["autoresearch/t: waiting for 60 min for B"]
