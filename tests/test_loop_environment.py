"""What befalls a night from outside: a full disk, changed data, a busy device, locks that a crash left; and resuming.

Every case is waited for or ends the loop with one clear line; none costs a row that blames an idea.
"""

import contextlib
import copy
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import BASELINE, DEEPER, Desk, ended, errors, has_event, wait_for


@pytest.fixture
def mount():
    """Mount, where the tests may: mount("-t", "tmpfs", …, folder)."""
    mounted = []

    def mount(*arguments: str) -> None:
        if shutil.which("mount") is None or subprocess.run(["mount", *arguments], capture_output=True).returncode:
            pytest.skip("may not mount here")
        if "remount,bind,ro" not in arguments:
            mounted.append(arguments[-1])

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# The environment fails


def test_disk_too_full_is_waited_for(desk):
    desk.set_constant("loop.py", "MIN_FREE_GB", '1e9 if Path(__file__).with_name("full").exists() else 0')
    desk.commit("a disk that is full on demand")
    (desk.path / "full").touch()
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "1")
    wait_for(has_event(desk, "waiting"))
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert desk.rows() == []
    assert re.search(r"^waiting: [\d.]+ GB free on the disk of .*, .* GB needed$", done.stderr, re.MULTILINE)
    (desk.path / "full").unlink()
    desk.loop("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "1")
    assert desk.statuses() == ["keep", "keep"]


@pytest.fixture
def small_disk(tmp_path, mount):
    """A desk on a disk of 8 MB of which 2 must be free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    desk = Desk(folder)
    desk.set_constant("loop.py", "MIN_FREE_GB", "0.002")
    desk.commit("a small disk")
    yield desk
    desk.end()


def test_full_disk_is_waited_for_until_somebody_makes_room(small_disk):
    desk = small_disk
    desk.loop("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "1")
    room = os.statvfs(desk.path).f_bavail * os.statvfs(desk.path).f_frsize
    (desk.outside / "filler").write_bytes(b"x" * (room - 10**6))
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "1")
    wait_for(has_event(desk, "waiting"))
    (desk.outside / "filler").unlink()
    done = ended(process)
    assert errors(done) == []
    assert desk.statuses() == ["keep"] * 3


def test_run_that_fills_the_disk_itself_is_a_crash_and_the_night_goes_on(small_disk):
    desk = small_disk
    agent = desk.agent(f"""
        if count() == 1:
            with open("train.py", "a") as file:
                file.write("open('checkpoint', 'wb').write(b'x' * 10**8)")
        else:
            pathlib.Path("train.py").write_text(subprocess.check_output(["git", "show", "HEAD:train.py"], text=True))
            {DEEPER}
    """)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert desk.statuses() == ["keep", "crash", "keep"]


def test_ledger_on_a_full_disk_ends_with_one_line_and_resumes(small_disk):
    """The disk fills up while a run trains: its row cannot be written; no part of one may stay."""
    desk = small_disk
    agent = desk.agent(DEEPER)
    desk.set_constant("loop.py", "MIN_FREE_GB", "0.0")
    desk.commit("no check")
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    rows = desk.rows()
    with open(desk.outside / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"x" * size):
                    pass
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", code=1)
    assert len(errors(done)) == 1 and "No space left" in errors(done)[0], done.stderr
    (desk.outside / "filler").unlink()
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert desk.rows()[:2] == rows and desk.statuses() == ["keep"] * 3


@pytest.mark.parametrize("change", ["deleted", "edited"])
@pytest.mark.parametrize("when", [("measured", 2), ("training", 3)])  # between two runs, under a run
def test_changed_data_ends_the_night_and_blames_nobody(desk, change, when):
    seconds = 'knob("SECONDS", 1 if count() > 1 else 0)'
    process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(f"{DEEPER}; {seconds}"))
    wait_for(has_event(desk, *when))
    path = desk.cache / "val.bin"
    if change == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"other")
    done = ended(process, code=1)
    assert errors(done) == [f"error: {path} is not as it was prepared: look with 'uv run prepare.py --verify'"]
    assert "crash" not in desk.statuses() and desk.orphans() == []


def test_busy_device_is_waited_for(desk):
    with open(desk.cache / "cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = desk.popen("--tag", "t", "--agent-cmd", desk.agent(DEEPER), "--max-experiments", "1")
        wait_for(has_event(desk, "waiting"))
    done = ended(process)
    assert desk.statuses() == ["keep", "keep"]
    assert done.stderr.count("waiting: another run holds the device cpu") == 1


def test_crash_while_another_run_took_the_device_is_the_ideas_own(desk):
    agent = desk.agent('HOLD.touch()\nwith open("train.py", "a") as file:\n    file.write("raise ValueError(1)\\n")')
    process = desk.popen("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    wait_for(has_event(desk, "training", 2))
    with open(desk.cache / "cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        desk.hold.unlink()
        wait_for(lambda: desk.statuses() == ["keep", "crash"])
    ended(process)


GPU = '''
import pathlib
cuda_describe = describe
def describe():
    gone, taken = (pathlib.Path(CACHE, name).exists() for name in ("gone", "taken"))
    return cuda_describe() | {"device": "cpu" if gone else "cuda", "free_gb": 0.0 if gone else 10.0 if taken else 139.0}
'''


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("gone", "waiting: the GPU has 0.0 GB free, at the start it had 139.0"),
        ("taken", "waiting: the GPU has 10.0 GB free, at the start it had 139.0"),
    ],
)
def test_crash_while_the_gpu_is_lost_is_run_again(desk, trouble, told):
    """The device fails under a run; the run is repeated once it is back, and no row tells of it."""
    desk.replace("prepare.py", "\nif __name__", f"{GPU}\nif __name__")
    head = f"import os, sys, pathlib\nif pathlib.Path(os.environ['AUTORESEARCH_CACHE'], {trouble!r}).exists():\n"
    head += "    sys.exit('CUDA error: device lost')\n"
    (desk.path / "train.py").write_text(head + (desk.path / "train.py").read_text())
    desk.commit("a GPU")
    agent = desk.agent(f'count(); {DEEPER}; pathlib.Path({str(desk.cache)!r}, {trouble!r}).touch()')
    process = desk.popen("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", "--no-ahead")
    wait_for(has_event(desk, "waiting"))
    (desk.cache / trouble).unlink()
    done = ended(process)
    assert told in done.stderr, done.stderr
    assert "not the idea's fault, it runs again" in done.stderr
    assert desk.statuses() == ["keep", "keep"]


def test_git_lock_left_by_a_crash_is_removed_at_the_start(desk):
    desk.set_constant("plumbing.py", "LOCK_PATIENCE", "0.3")
    desk.commit("short patience")
    agent = desk.agent(DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    for name in ("index.lock", "HEAD.lock", "refs/heads/autoresearch/t.lock", "refs/autoresearch/t/3.lock"):
        (desk.path / ".git" / name).touch()
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert desk.statuses() == ["keep"] * 4, done.stderr
    assert done.stderr.count("left by a git that was killed") == 4


def test_agent_that_leaves_a_git_lock_does_not_end_the_night(desk):
    desk.set_constant("plumbing.py", "LOCK_PATIENCE", "0.3")
    desk.commit("short patience")
    agent = desk.agent(f'{DEEPER}; pathlib.Path(".git/index.lock").touch()')
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert desk.statuses() == ["keep"] * 3


def test_read_only_checkout_is_one_line(desk, mount):
    mount("--bind", str(desk.path), str(desk.path))
    mount("-o", "remount,bind,ro", str(desk.path))
    done = desk.loop("--tag", "t", "--agent-cmd", desk.agent(DEEPER), code=1)
    assert len(errors(done)) == 1 and "Read-only file system" in errors(done)[0]


def test_clock_that_jumps_hurts_nothing(desk):
    """The wall clock jumps a day ahead and two back at every look; limits are kept by another clock."""
    (desk.outside / "sitecustomize.py").write_text(
        "import itertools, time\nreal, days = time.time, itertools.cycle([0, 1, -1])\n"
        "time.time = lambda: real() + 86400 * next(days)\n"
    )
    agent, env = desk.agent(DEEPER), {"PYTHONPATH": str(desk.outside)}
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "3", "--hours", "1", **env)
    assert desk.statuses() == ["keep"] * 4
    for command in ("status", "report"):
        done = desk.loop(command, "--tag", "t", **env)
        assert errors(done) == []


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_baseline_that_crashes_ends_with_one_line_and_is_mended(desk):
    good = (desk.path / "train.py").read_text()
    (desk.path / "train.py").write_text(good + "raise RuntimeError('no kernel')\n")
    desk.commit("broken")
    agent = desk.agent(DEEPER)
    for _ in range(2):  # a restart without a mend tells the same
        done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", code=1)
        assert len(errors(done)) == 1
        told = "error: the baseline crashed: RuntimeError: no kernel (exit code 1) (log runs/"
        assert errors(done)[0].startswith(told)
        assert desk.rows() == []
    (desk.path / "train.py").write_text(good)
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", code=1)
    assert errors(done) == ["error: train.py has uncommitted changes: commit them or run 'git stash', then start again"]
    mended = desk.commit("mended")
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert desk.statuses() == ["keep", "keep"], done.stderr
    assert desk.git("rev-parse", "refs/autoresearch/t/0^") == mended


def test_edit_that_a_killed_loop_left_is_saved_and_the_desk_is_clean(desk):
    names = "prepare.py", "train.py"
    desk.loop(*BASELINE)
    for name in (*names, "program.md"):  # the last is a person's
        with open(desk.path / name, "a") as file:
            file.write("# half an edit\n")
    edited = [(desk.path / name).read_bytes() for name in names]
    done = desk.loop(*BASELINE)
    saved = desk.home() / "experiments" / "0001" / "interrupted.diff"
    told = f"note: prepare.py, train.py differed from the champion; the difference is saved in {saved}"
    assert told in done.stderr.splitlines()
    assert desk.git("status", "--porcelain") == "M program.md"
    desk.git("apply", str(saved))
    assert [(desk.path / name).read_bytes() for name in names] == edited


def test_every_start_restores_the_ledgers_copy_and_the_link_to_the_runs(desk):
    table, link = desk.path / "results.tsv", desk.path / "runs"
    desk.loop(*BASELINE)
    for harm in ("missing", "wrong"):
        table.unlink()
        link.unlink()
        if harm == "wrong":
            table.write_text("an agent's own\n")
            link.symlink_to(desk.outside)
        desk.loop(*BASELINE)
        assert table.read_text() == (desk.home() / "results.tsv").read_text() and len(desk.rows()) == 1, harm
        assert link.readlink() == desk.home() / "experiments", harm


@pytest.mark.parametrize("command", [["--agent-cmd", "true"], ["status"], ["audit"]])
def test_ledger_whose_champion_is_in_no_ref_is_refused(desk, command):
    desk.loop(*BASELINE)
    with open(desk.home() / "results.tsv", "a") as file:
        file.write("fffffff\t0.900000\t1.0\tkeep\tof another clone\n")
    done = desk.loop(*command, "--tag", "t", code=1)
    told = "error: the ledger's last kept commit fffffff is not in refs/autoresearch/t/: choose another --tag"
    assert errors(done) == [told] and len(desk.rows()) == 2


@pytest.mark.parametrize(
    ("what", "told"), [("profile", "profile fake, this is other"), ("data", "digest dddddddddddd, this is eeee")]
)
def test_resume_under_another_profile_or_other_data_is_refused(desk, what, told):
    desk.replace("prepare.py", '"d" * 64', 'os.environ.get("FAKE_DIGEST", "d" * 64)')
    desk.commit("data of any digest")
    agent = desk.agent(DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    before = (desk.home() / "results.tsv").read_bytes(), desk.git("for-each-ref")
    env = {"AUTORESEARCH_PROFILE": "other"} if what == "profile" else {"FAKE_DIGEST": "e" * 64}
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1", **env, code=1)
    assert len(errors(done)) == 1 and f"tag t was begun under {told}" in errors(done)[0]
    assert before == ((desk.home() / "results.tsv").read_bytes(), desk.git("for-each-ref"))


@pytest.mark.parametrize("torn", ["abcdef0", "abcdef0\t0.9", "abcdef0\t0.900000\t1.0\tkeep\thalf a σ"])
def test_torn_last_line_is_cut_at_the_next_start(desk, torn):
    agent = desk.agent(DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    rows = desk.rows()
    with open(desk.home() / "results.tsv", "ab") as file:
        file.write(torn.encode()[:-1])
    desk.loop("status", "--tag", "t")
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert desk.rows()[:2] == rows and desk.statuses() == ["keep"] * 3


def test_torn_timeline_hides_no_other_line(desk):
    agent = desk.agent(DEEPER)
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    with open(desk.home() / "timeline.jsonl", "a") as file:
        file.write('{"at": 1.0, "ev')
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "1")
    assert "runs an hour" in desk.loop("report", "--tag", "t").stdout


# ---------------------------------------------------------------------------------------------------------------------
# What a run finds around it


def test_training_sees_no_secret_and_a_fresh_place(desk):
    """Each run tells what it finds, and leaves what the next one must not find; the agent tells what it finds, too."""
    spy = f"""
import json, os, pathlib, tempfile
found = {{"env": dict(os.environ), "tmp": os.listdir(tempfile.gettempdir()), "here": sorted(os.listdir())}}
with open({str(desk.outside / "found")!r}, "a") as file:
    file.write(json.dumps(found) + "\\n")
pathlib.Path(tempfile.gettempdir(), "left").touch()
pathlib.Path("checkpoint.pt").touch()
pathlib.Path("__pycache__").mkdir(exist_ok=True)
pathlib.Path("__pycache__", "planted.pyc").touch()
"""
    (desk.path / "train.py").write_text(spy + (desk.path / "train.py").read_text())
    desk.commit("a spy")
    names = "ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_PAT", "BASIC_AUTH"
    secrets = {name: f"secret of {name}" for name in (*names, "GOOGLE_APPLICATION_CREDENTIALS", "my_token")}
    kept = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2", "PATIENCE": "1"}
    agent = desk.agent(f'import json; {DEEPER}; (OUTSIDE / "agent").write_text(json.dumps(dict(os.environ)))')
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2", **secrets, **kept)
    assert desk.statuses() == ["keep"] * 3
    env = json.loads((desk.outside / "agent").read_text())
    assert (secrets | kept | {"AUTORESEARCH_PROFILE": "fake"}).items() <= env.items()  # the agent needs its own
    own = {
        "AUTORESEARCH_MARK": f"{desk.home()}:train", "AUTORESEARCH_PROFILE": "fake", "PWD": str(desk.home() / "bench"),
        "TMPDIR": str(desk.home() / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(desk.home("compile_cache") / "inductor"),
        "TRITON_CACHE_DIR": str(desk.home("compile_cache") / "triton"),
    }  # fmt: skip
    runs = [json.loads(line) for line in (desk.outside / "found").read_text().splitlines()]
    assert len(runs) == 3
    for run in runs:
        env = run["env"]
        assert not set(secrets) & set(env) and not set(secrets.values()) & set(env.values())
        assert (kept | own).items() <= env.items()
        assert run["tmp"] == []
        assert set(run["here"]) == {".git", *desk.git("ls-tree", "--name-only", "HEAD").split()}
    written = [path for path in desk.home().rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if b"secret of" in path.read_bytes()]


def test_second_checkout_with_a_tag_of_its_own_runs_beside_the_first(desk):
    """As on a machine with two GPUs: both train at the same time, in one repository."""
    second, tags = copy.copy(desk), ("t", "u")
    second.path = desk.path.parent / "second"
    desk.git("worktree", "add", "-q", "--detach", str(second.path))
    subprocess.run([sys.executable, "prepare.py"], cwd=desk.path, env=desk.env, check=True)
    desk.hold.touch()
    agents = desk.agent(DEEPER), desk.agent('knob("DEPTH", knob("DEPTH") + 2)')
    loops = [
        checkout.popen("--tag", tag, "--agent-cmd", agent, "--max-experiments", "2")
        for checkout, tag, agent in zip((desk, second), tags, agents, strict=True)
    ]
    for tag in tags:
        wait_for(has_event(desk, "training", tag=tag))
    desk.hold.unlink()
    for process in loops:
        ended(process)
    assert [[row[1] for row in desk.rows(tag)] for tag in tags] == [
        ["1.080000", "1.070000", "1.060000"], ["1.080000", "1.060000", "1.040000"],
    ]  # fmt: skip
    for checkout, tag in zip((desk, second), tags, strict=True):
        assert (checkout.path / "results.tsv").read_text() == (desk.home(tag) / "results.tsv").read_text()
        assert checkout.git("symbolic-ref", "--short", "HEAD") == f"autoresearch/{tag}"
        assert checkout.git("rev-parse", "HEAD").startswith(desk.rows(tag)[-1][0])
        assert checkout.git("status", "--porcelain") == ""
    assert desk.orphans() == []
