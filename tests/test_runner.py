"""One run, through the loop: what it prints and leaves decides what is believed, and whose fault it is."""

import fcntl
import json
import re
import signal

from conftest import BASELINE, FAKE_TRAIN, Checkout, ended, errors, hear, wait_for

GOOD = "prepare.finish(1.5)"
RESULT = "prepare.pathlib.Path(os.environ['AUTORESEARCH_RESULT'])"
ENDINGS = [  # the last lines of train.py, and how its crash's reason begins; "": it is scored all the same
    ("print('---\\nval_bpb: 1.5\\npeak_vram_mb: 1.0')", "printed val_bpb 1.5, but the evaluator left no record"),
    ("prepare.finish(1.5, profile='other')", "the record's profile is 'other', not 'fake'"),
    ("prepare.finish(1.5, prepare_sha256='a')", "the record's prepare_sha256 is 'a'"),
    ("prepare.finish(1.5, val_bpb=1.50003)", "printed val_bpb 1.500000, the evaluator measured 1.500030"),
    ("prepare.finish(1.5, val_bpb=True)", "the evaluator's record: val_bpb is True, not a finite number"),
    ("prepare.finish(1.5, training_seconds=4.0)", "trained for 4.0 s, the budget is 1 s"),
    ("prepare.finish(1.5, device_name='tpu')", "it ran on a tpu, the baseline on a cpu"),
    (f"{GOOD}; {RESULT}.write_text('[]')", "the evaluator's record is not a JSON object"),
    ("prepare.finish(-1)", "val_bpb -1 is outside of 0.01 to 100"),
    ("prepare.finish(float('nan'))", "val_bpb is 'nan', not a finite number"),
    ("prepare.finish(1.5, 4.8e91)", "peak_vram_mb 4.8e+91 cannot be"),
    ("pass", "no val_bpb printed"),
    (f"{GOOD}; print('val_bpb: 0.4')", "val_bpb printed 2 times"),
    ("raise FloatingPointError('loss is nan at step 3')", "FloatingPointError: loss is nan at step 3 (exit code 1)"),
    ("print('error: bad'); print('For C++ stack trace'); os._exit(3)", "error: bad (exit code 3)"),
    ("os._exit(1)", "no output (exit code 1)"),
    ("print('torch.OutOfMemoryError: CUDA\\nends'); os._exit(1)", "torch.OutOfMemoryError: CUDA (exit code 1)"),
    ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ("os.kill(os.getpid(), 9)", "out of memory: killed by the kernel (SIGKILL)"),
    (f"{GOOD}; {RESULT}.unlink(); os.mkfifo({RESULT})", "printed val_bpb 1.5, but the evaluator left no record"),
    (f"{GOOD}; {RESULT}.unlink(); {RESULT}.symlink_to('/dev/zero')", "printed val_bpb 1.5, but the evaluator left no"),
    (f"time.sleep(3.2); {GOOD}", "trained for 3."),  # by the loop's own clock
    ("time.sleep(600)", "timeout after "),
    (f"{GOOD}; raise ValueError('the sample failed')", ""),
    (f"{GOOD}; import threading; threading.Thread(target=time.sleep, args=(600,)).start()", ""),
    (f"print('99% |####', end='', file=__import__('sys').stderr, flush=True); {GOOD}; print(); print('---')", ""),
]  # fmt: skip
HEAD = FAKE_TRAIN[: FAKE_TRAIN.index("prepare.finish(")]


def test_run_is_believed_only_if_it_agrees_with_its_evaluator_and_else_a_crash_with_its_reason(checkout: Checkout):
    checkout.replace("loop.py", "startup_allowance=60", "startup_allowance=3")
    checkout.commit("short runs")
    endings = [ending for ending, _ in ENDINGS]
    agent = checkout.agent(f"""
        n = count() - 1
        pathlib.Path("train.py").write_text({HEAD!r} + {endings}[n])
        say(str(n))
    """)
    count = str(len(ENDINGS))
    checkout.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", count, "--workers", "3", timeout=150)
    runs = {run.description: run for run in checkout.runs()}
    for number, (ending, reason) in enumerate(ENDINGS):
        run = runs[str(number)]
        assert run.reason.startswith(reason) and len(run.reason) < 160, (ending, run.reason)
        assert (run.status == "crash") == bool(reason) and run.score == (None if reason else 1.5), ending
        assert run.seconds < 30
    assert checkout.orphans() == []


def test_run_finds_the_tree_and_a_fresh_place_and_neither_secrets_nor_variables_of_python(checkout: Checkout):
    names = "ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "PYTHONPATH", "my_key"
    kept = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2", "PATIENCE": "1"}
    spy = """
import json, sys, tempfile
folders = {"here": os.getcwd(), "tmp": tempfile.gettempdir()}
found = {name: os.listdir(folder) for name, folder in folders.items()}
print("found:", json.dumps(found | {"env": dict(os.environ), "path": sys.path}))
for folder in folders.values():
    open(os.path.join(folder, "left"), "w")
prepare.finish(1.5, exported=None, export_problem="it has a lock")
"""
    checkout.write("train.py", HEAD + spy)
    checkout.commit("a spy")
    tree = set(checkout.git("ls-tree", "--name-only", "HEAD").split())
    env = dict.fromkeys(names, "/withheld") | kept
    checkout.loop(*BASELINE, **env)
    # An audit's run has no network to be scored in a clean process: that makes it doubtful.
    (doubt,) = errors(checkout.loop("audit", "--tag", "t", "--replicates", "1", code=1, **env))
    assert doubt == "error: baseline, run 0002 was not scored in a clean process: it has a lock"
    for number in ("0001", "0002"):
        log = (checkout.home() / "runs" / number / "run.log").read_text()
        found = json.loads(re.search("^found: (.*)$", log, re.MULTILINE)[1])
        variables = found["env"]
        assert "/withheld" not in variables.values() and kept.items() <= variables.items()
        assert variables["AUTORESEARCH_PROFILE"] == "fake"
        assert (variables["AUTORESEARCH_SEED"] == "42") == (number == "0001")
        assert set(found["here"]) == tree and found["tmp"] == []
        assert found["path"][-1] == variables["PWD"]  # what is installed goes before the tree


def test_machines_faults_are_waited_for_and_never_an_ideas(checkout: Checkout):
    """Another run holds the device; the data is gone when a run crashes; the disk is full."""
    checkout.replace("train.py", "start_clock()", "start_clock()\nassert prepare.text('fail', '') == ''")
    checkout.commit("it can fail")
    (checkout.cache / "manifest.json").write_text("{}")
    (checkout.cache / "fail").write_text("yes")
    checkout.hold.touch()
    with open(checkout.cache / "cpu0.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = checkout.popen(*BASELINE)
        hear(process, "waiting: another run holds the device cpu")
    wait_for(lambda: checkout.processes(f"AUTORESEARCH_MARK={checkout.home()}:run"))
    (checkout.cache / "manifest.json").unlink()
    checkout.hold.unlink()
    hear(process, "waiting: the data is not as it was: no manifest")
    (checkout.cache / "fail").unlink()
    (checkout.cache / "manifest.json").write_text("{}")
    said = ended(process).stderr
    assert checkout.statuses() == ["keep"] and said.count("waiting: another run holds the device cpu") == 1

    # A disk that a run alone has filled is its own fault.
    left = "list(folder.parents[1].glob('scratch/*/tree/big'))"
    checkout.replace("harness/machine.py", "free_gb = ", f"free_gb = 0 if {left} else ")
    fill = checkout.agent("""
        path = pathlib.Path("train.py")
        path.write_text(path.read_text().replace("start_clock()", "start_clock(); open('big', 'w'); 1 / 0"))
    """)
    checkout.loop("--tag", "t", "--agent-cmd", fill, "--max-experiments", "1")
    assert checkout.statuses() == ["keep", "crash"]

    checkout.set_constant("harness/machine.py", "MIN_FREE_GB", "1e9")
    process = checkout.popen("--tag", "t", "--agent-cmd", checkout.agent('knob("DEPTH", 5)'))
    hear(process, "GB free on the disk")
    process.send_signal(signal.SIGINT)
    ended(process)
    assert checkout.statuses() == ["keep", "crash"]
