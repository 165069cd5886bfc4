"""The GPU day: everything that half an hour on a GPU can show of this repository, by one command.

    uv run tests/gpu_day.py OUT                      # half an hour, the report is OUT/report.md
    uv run tests/gpu_day.py OUT --minutes 9.5 --only budget startup
    python3 tests/gpu_day.py OUT --profile code      # without uv (all packages in this Python) and without a network

The stages, the most valuable first: `machine` (what it is), `tests` (those marked gpu), `budget` (one whole run, the
compile cache empty), `startup` (a run up to its first step, with what the whole run compiled), `loop` (a loop without a
model in a repository of its own, with pocket in place of a large profile). A stage that fails or hangs is reported, and
the next one begins. Without a GPU the gpu tests are skipped, and the rest runs on the CPU.

OUT gets report.md (to send or to paste) and the whole log of each stage. Data is prepared where it always is
(AUTORESEARCH_CACHE); everything else is done in a scratch folder that is removed. Exit codes: 0 every stage ended well;
1 some did not; 2 usage. Wheels that were carried along must be installed into this Python, not come through PYTHONPATH:
loop.py gives its runs none of Python's variables.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.processes import run_child

ROOT = Path(__file__).resolve().parents[1]
LOG_END_LINES = 40  # of a stage that did not end well, shown in the report


class Stage(NamedTuple):
    seconds: float  # after which it is ended
    figures: str  # regular expression: the lines of its log that the report shows
    script: str  # for the shell, in the repository; ends with the first command that fails


# Up to the first step of train.py everything that is compiled has been compiled.
START_UP = """
import sys, time, train
def stop_here(*_):
    print(f"start-up took {time.perf_counter() - train.PROCESS_STARTED:.1f} s", flush=True)
    sys.exit()
train.train = stop_here
sys.exit(train.main())
"""

LOOP = """
mkdir "$SCRATCH/repository"
cp -r .gitignore harness loop.py prepare.py program.md pyproject.toml train.py uv.lock "$SCRATCH/repository"
cd "$SCRATCH/repository"
git init -q
git add -A
git -c user.name=gpu-day -c user.email=gpu-day@localhost -c commit.gpgsign=false commit -q -m "what the GPU day runs"
case "$AUTORESEARCH_PROFILE" in ""|climbmix|code) export AUTORESEARCH_PROFILE=pocket;; esac
"$PY" loop.py --tag gpu-day --agent random --ahead 1 --max-experiments 2
"$PY" loop.py report
cat results.tsv
"""

GPU_TESTS = '"$PY" -m pytest -n 0 -m "gpu and not slow" -rs -p no:cacheprovider --continue-on-collection-errors'
STAGES = {
    "machine": Stage(
        180,
        r"(PyTorch|Python|CUDA runtime|Nvidia driver) version|CUDA used to build|GPU \w|OS:|Model name|CPU\(s\)",
        '"$PY" -m torch.utils.collect_env',
    ),
    "tests": Stage(
        600,
        r"FAILED|ERROR|SKIPPED|\d+ (passed|failed|skipped)",
        # Only the files that hold gpu tests: a package that other tests need may be missing here.
        f'{GPU_TESTS} $(grep -l "pytest.mark.gpu" tests/test_*.py)',
    ),
    "budget": Stage(
        1200,
        r"digest|attention|batch |milliseconds|val_bpb|\w+_seconds|peak_vram_mb|mfu_percent|total_tokens_M|num_steps",
        '"$PY" prepare.py\n"$PY" train.py',
    ),
    "startup": Stage(420, "start-up took", f"\"$PY\" -c '{START_UP}'"),
    "loop": Stage(1200, r"[0-9a-f]{7}\t|.*runs an hour", LOOP),
}


def run_stages(names: list[str], out: Path, minutes: float, env: dict[str, str], stop: threading.Event) -> bool:
    """Run the stages and write the report anew after each; whether all ended well."""
    deadline = time.monotonic() + 60 * minutes
    table = ["# The GPU day", "", f"| stage | of {minutes:g} minutes: seconds | how it ended |", "| --- | --- | --- |"]
    details = []
    all_well = True
    for name in names:
        stage = STAGES[name]
        seconds_left = deadline - time.monotonic()
        problem = "skipped: stopped by a signal" if stop.is_set() else "skipped: no time is left"
        seconds = 0.0
        log = out / f"{name}.log"
        log.write_text("")
        if seconds_left > 0 and not stop.is_set():
            print(f"{name}: begins, {seconds_left / 60:.1f} min left", file=sys.stderr, flush=True)
            command = ["sh", "-exc", stage.script]
            limit = min(stage.seconds, seconds_left)
            ending = run_child(command, cwd=ROOT, env=env, mark=env["SCRATCH"], log=log, limit=limit, stop=stop)
            problem = ending.problem
            seconds = ending.seconds
        all_well = all_well and not problem
        table.append(f"| {name} | {seconds:.1f} | {problem or 'ok'} |")
        lines = log.read_text(errors="replace").splitlines()
        shown = [line for line in lines if re.match(rf"({stage.figures})", line)]
        if problem:
            shown += ["", "The end of its log:", *lines[-LOG_END_LINES:]]
        # Indented: a log may hold the marks of a block itself.
        details += ["", f"## {name}: {problem or 'ok'}", "", *[f"    {line}" for line in shown]]
        (out / "report.md").write_text("\n".join(table + details) + "\n")
    return all_well


def main(argv: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu_day.py", description=__doc__, formatter_class=layout)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the report and the logs")
    parser.add_argument("--profile", metavar="NAME", help="default: prepare.py's own for this machine")
    parser.add_argument("--minutes", type=float, default=30.0, help="for everything (default 30)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=str([*STAGES]))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix="gpu-day-")
    env = os.environ | {"PY": sys.executable, "SCRATCH": scratch, "TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}
    env["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compile"
    if args.profile:
        env["AUTORESEARCH_PROFILE"] = args.profile
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())  # the stage that runs is ended, the report is written
    try:
        all_well = run_stages(args.only, args.out.absolute(), args.minutes, env, stop)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print((args.out / "report.md").read_text())
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
