"""What befalls a night from outside: a full disk, changed data or packages, a busy device, locks that a crash left.

    uv run pytest tests/test_machine.py

Every case is waited for or ends the loop with one clear line; none costs a row that blames an idea.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import BASELINE, DEEPER, Desk, ended, errors, has_event, hear, wait_for

from harness import environment
from harness.environment import Packages
from harness.processes import find_processes

ONE = "--tag", "t", "--max-experiments", "1", "--agent-cmd"


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


def test_disk_too_full_is_waited_for(desk):
    desk.replace("harness/environment.py", "free_gb >= MIN_FREE_GB", "not os.path.exists(folder / '../../full')")
    desk.commit("a disk that is full on demand")
    (desk.home() / "full").parent.mkdir(parents=True)
    (desk.home() / "full").touch()
    process = desk.popen(*ONE, desk.agent(DEEPER))
    wait_for(has_event(desk, "waiting"))
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert desk.rows() == []
    assert re.search(r"^waiting: [\d.]+ GB free on the disk of .*, .* GB needed$", done.stderr, re.MULTILINE)
    (desk.home() / "full").unlink()
    desk.loop(*ONE, desk.agent(DEEPER))
    assert desk.statuses() == ["keep", "keep"]


@pytest.fixture
def small_disk(tmp_path, mount):
    """A desk on a disk of 8 MB of which 2 must be free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    desk = Desk(folder)
    desk.set_constant("harness/environment.py", "MIN_FREE_GB", "0.002")
    desk.commit("a small disk")
    yield desk
    desk.end()


def test_full_disk_is_waited_for_until_somebody_makes_room(small_disk):
    desk = small_disk
    desk.loop(*ONE, desk.agent(DEEPER))
    room = os.statvfs(desk.path).f_bavail * os.statvfs(desk.path).f_frsize
    (desk.outside / "filler").write_bytes(b"x" * (room - 10**6))
    process = desk.popen(*ONE, desk.agent(DEEPER))
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


@pytest.mark.slow
def test_ledger_on_a_full_disk_ends_with_one_line_and_resumes(small_disk):
    """The disk fills up while a run trains: its row cannot be written; no part of one may stay."""
    desk = small_disk
    agent = desk.agent(DEEPER)
    desk.set_constant("harness/environment.py", "MIN_FREE_GB", "0.0")
    desk.commit("no check")
    desk.loop(*ONE, agent)
    rows = desk.rows()
    with open(desk.outside / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"x" * size):
                    pass
    done = desk.loop(*ONE, agent, code=1)
    assert len(errors(done)) == 1 and "No space left" in errors(done)[0], done.stderr
    (desk.outside / "filler").unlink()
    desk.loop(*ONE, agent)
    assert desk.rows()[:2] == rows and desk.statuses() == ["keep"] * 3


@pytest.mark.parametrize("change", [pytest.param("deleted", marks=pytest.mark.slow), "edited"])
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
    with open(desk.cache / "cpu0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = desk.popen(*ONE, desk.agent(DEEPER))
        wait_for(has_event(desk, "waiting"))
    done = ended(process)
    assert desk.statuses() == ["keep", "keep"]
    assert done.stderr.count("waiting: another run holds the device cpu") == 1


GPU = '''
import pathlib
cuda_describe = describe
def describe():
    gone, taken = (pathlib.Path(CACHE, name).exists() for name in ("gone", "taken"))
    free_gb = 10.0 if taken else 139.0
    devices = {} if gone else {"0": {"lock": str(CACHE / "0.lock"), "free_gb": free_gb}}
    return cuda_describe() | {"device": "cpu" if gone else "cuda", "devices": devices}
'''


@pytest.mark.parametrize(("trouble", "free_gb"), [("gone", "0.0"), ("taken", "10.0")])
def test_crash_while_the_gpu_is_lost_is_run_again(desk, trouble, free_gb):
    """The device fails under a run; the run is repeated once it is back, and no row tells of it."""
    desk.replace("prepare.py", "\nif __name__", f"{GPU}\nif __name__")
    head = f"import os, sys, pathlib\nif pathlib.Path(os.environ['AUTORESEARCH_CACHE'], {trouble!r}).exists():\n"
    head += "    sys.exit('CUDA error: device lost')\n"
    (desk.path / "train.py").write_text(head + (desk.path / "train.py").read_text())
    desk.commit("a GPU")
    agent = desk.agent(f'count(); {DEEPER}; pathlib.Path({str(desk.cache)!r}, {trouble!r}).touch()')
    process = desk.popen(*ONE, agent, "--ahead", "0")
    wait_for(has_event(desk, "waiting"))
    (desk.cache / trouble).unlink()
    done = ended(process)
    assert f"waiting: GPU 0 has {free_gb} GB free, at the start it had 139.0" in done.stderr, done.stderr
    assert desk.statuses() == ["keep", "keep"]


def test_lost_kernel_is_run_again_once_and_then_the_ideas_own(desk):
    """Another attention back-end than the baseline's: the hub had a hiccup, or the edit brought it about."""
    agent = desk.agent('''
        n = count()
        path = pathlib.Path("train.py")
        lost = "True" if n == 1 else "not os.path.exists(flag)"
        flag = f"import os; flag = {str(OUTSIDE / 'flag')!r}; kernel = 'flex' if {lost} else 'sdpa'; open(flag, 'w')"
        text = subprocess.check_output(["git", "show", "HEAD:train.py"], text=True)
        text = text.replace("NOISE * (seed - 42))", "NOISE * (seed - 42), attention=kernel)")
        path.write_text(flag + "\\n" + text)
        say(f"idea {n}")
        (OUTSIDE / "flag").unlink(missing_ok=True)
    ''')
    done = desk.loop("--tag", "t", "--max-experiments", "2", "--agent-cmd", agent)
    assert done.stderr.count("waiting: attention is flex, the baseline's is sdpa") == 2
    assert [event["run"] for event in desk.events() if event["event"] == "training"] == [1, 2, 2, 3, 3]
    described = [(row[1], row[3], row[4]) for row in desk.rows()[1:]]
    assert described == [
        ("0.000000", "crash", "attention is flex, the baseline's is sdpa: idea 1"),
        ("1.080000", "discard", "idea 2"),
    ]


@pytest.mark.slow
def test_run_that_was_stopped_is_told_and_made_again(desk):
    process = desk.popen(*ONE, desk.agent(f'HOLD.touch(); {DEEPER}'))
    wait_for(has_event(desk, "training", 2))
    of_run = f"AUTORESEARCH_MARK={desk.path}"
    pid = wait_for(lambda: find_processes("cmdline", b"run_path") & set(desk.processes(of_run)))
    os.kill(*pid, signal.SIGSTOP)
    time.sleep(1.6)  # nothing tells that the loop saw it
    os.kill(*pid, signal.SIGCONT)
    hear(process, "waiting: the run stood still for ")
    desk.hold.unlink()
    ended(process)
    assert desk.statuses() == ["keep", "keep"]


# ---------------------------------------------------------------------------------------------------------------------
# The installed packages


@pytest.fixture
def packaged(desk) -> Desk:
    """A desk with a package and a module installed."""
    (desk.site / "torch" / "__pycache__").mkdir(parents=True)
    (desk.site / "torch" / "nn.py").write_text("softmax = 1\n")
    (desk.site / "old.py").write_text("")
    return desk


@pytest.mark.slow
def test_packages_that_changed_between_sessions_refuse_a_start_with_their_names(packaged):
    packaged.loop(*BASELINE)
    (packaged.site / "torch" / "__pycache__" / "nn.pyc").write_text("Python's own cache changes all the time")
    packaged.loop(*BASELINE)
    (packaged.site / "evil.pth").write_text("import evil\n")
    (packaged.site / "torch" / "nn.py").write_text("softmax = 2\n")  # of the same size
    (packaged.site / "old.py").unlink()
    names = ", ".join(str(packaged.site / name) for name in ("evil.pth", "old.py", "torch/nn.py"))
    told = f"error: the installed packages changed since tag t began ({names}): undo that, choose another --tag, or "
    for command in (BASELINE, ["audit"]):
        done = packaged.loop(*command, code=1)
        assert len(errors(done)) == 1 and errors(done)[0].startswith(told)
    packaged.set_knob(DEPTH=5)
    assert packaged.loop("try", "x", code=1).stdout.startswith(told)
    (packaged.home() / "packages.json").unlink()
    packaged.loop(*BASELINE)


def test_packages_that_a_run_changes_end_the_loop_with_their_names_and_leave_no_row(packaged):
    harm = f"open({str(packaged.site / 'evil.pth')!r}, 'w').write('import evil')\n"
    add = f'pathlib.Path("train.py").write_text({harm!r} + pathlib.Path("train.py").read_text())\n'
    done = packaged.loop(*ONE, packaged.agent(add + DEEPER), code=1)
    told = f"error: the installed packages changed: {packaged.site / 'evil.pth'}. Scores from now on do not compare"
    assert len(errors(done)) == 1 and errors(done)[0].startswith(told)
    assert packaged.statuses() == ["keep"] and packaged.orphans() == []


def test_archive_before_the_library_and_a_users_own_packages_are_looked_at(tmp_path, monkeypatch):
    library = tmp_path / "lib" / "python3"
    library.mkdir(parents=True)
    paths = dict.fromkeys(("purelib", "platlib", "stdlib"), str(library))
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: paths)
    before = Packages.installed()
    assert before.difference(Packages.installed()) == ""
    assert Packages({}).difference(before) == ""  # a tag that an older loop began
    archive = library.with_name(f"python{sys.version_info.major}{sys.version_info.minor}.zip")
    archive.touch()
    assert before.difference(Packages.installed()) == str(archive)
    (tmp_path / "evil.pth").touch()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(environment.site, "ENABLE_USER_SITE", False)  # as PYTHONNOUSERSITE has it, but not for a run
    monkeypatch.setattr(environment.site, "getusersitepackages", lambda: str(tmp_path))
    assert str(tmp_path / "evil.pth") in Packages.installed().files


def test_training_data_that_a_run_rewrites_ends_the_loop_with_its_name_and_leaves_no_row(desk):
    """The validation rows in place of a training shard would serve every later run."""
    shard = desk.cache / "tokens" / "train.bin"
    harm = "import shutil; shutil.copy(prepare.CACHE / 'val.bin', prepare.CACHE / 'tokens' / 'train.bin')"
    add = f'path = pathlib.Path("train.py"); path.write_text(path.read_text() + {harm!r} + "\\n")'
    done = desk.loop(*ONE, desk.agent(add), code=1)
    assert len(errors(done)) == 1
    assert errors(done)[0].startswith(f"error: the training data changed: {shard}. Scores from now on do not compare")
    assert desk.statuses() == ["keep"]
    done = desk.loop(*BASELINE, code=1)
    told = f"error: the training data changed since tag t began ({shard}): put it back as it was"
    assert errors(done)[0].startswith(told)


# ---------------------------------------------------------------------------------------------------------------------
# Git, the disk's rights, the clock


@pytest.mark.slow
def test_git_lock_left_by_a_crash_is_removed_at_the_start(desk):
    desk.set_constant("harness/repository.py", "LOCK_PATIENCE", "0.3")
    desk.commit("short patience")
    agent = desk.agent(DEEPER)
    desk.loop(*ONE, agent)
    for name in ("index.lock", "HEAD.lock", "refs/heads/autoresearch/t.lock", "refs/autoresearch/t/3.lock"):
        (desk.path / ".git" / name).touch()
    done = desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert desk.statuses() == ["keep"] * 4, done.stderr
    assert done.stderr.count("left by a git that was killed") == 4


def test_agent_that_leaves_a_git_lock_does_not_end_the_night(desk):
    desk.set_constant("harness/repository.py", "LOCK_PATIENCE", "0.3")
    desk.commit("short patience")
    agent = desk.agent(f'{DEEPER}; pathlib.Path(".git/index.lock").touch()')
    desk.loop("--tag", "t", "--agent-cmd", agent, "--max-experiments", "2")
    assert desk.statuses() == ["keep"] * 3


def test_read_only_checkout_is_one_line(desk, mount):
    mount("--bind", str(desk.path), str(desk.path))
    mount("-o", "remount,bind,ro", str(desk.path))
    done = desk.loop("--tag", "t", "--agent-cmd", desk.agent(DEEPER), code=1)
    assert len(errors(done)) == 1 and "Read-only file system" in errors(done)[0]


@pytest.mark.slow
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
