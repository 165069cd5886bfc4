"""The GPU day: everything that half an hour on a GPU can show of this repository, by one command.

    uv run python tests/gpu_day.py OUT                    # half an hour, the report is OUT/report.md
    uv run python tests/gpu_day.py OUT --minutes 9.5 --only budget
    python3 tests/gpu_day.py OUT                          # a machine without uv, with all packages in this Python

The stages, the most valuable first: `tests` (those marked gpu), `budget` (one whole run), `startup` (compile cache
empty, then filled), `attention` and `loader` (the benches), `loop` (four runs, in a repository of its own). A stage
that fails or hangs is reported, and the next one begins; one that no longer fits is skipped. Without a GPU the same
stages run on the CPU, without the gpu tests.

OUT gets report.md (one table, to be pasted), report.json (the same figures for programs) and one log a stage. Data is
prepared where it always is (AUTORESEARCH_CACHE); everything else is done in a scratch folder that is removed. Exit
codes: 0 no stage failed; 1 some did; 2 usage.

Without a network: the profile `code` needs none. Install wheels that were carried along into this Python itself, not
through PYTHONPATH: loop.py gives its runs none of Python's variables.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.files import read_end, read_tail, read_text, remove_folder, write_atomically
from harness.machine import OF_A_RUN
from harness.processes import find_processes, run_child
from loop import DOMAIN

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
FACTS_SECONDS = 180  # that reading the machine's facts may take: a cold import of torch is slow
LOG_BYTES = 400_000  # kept of one step's output, from its end: a log must be small enough to be sent back
LOG_END_LINES = 40  # of a failed stage, shown in the report
OVERHEAD_SECONDS = 60  # of a whole run beside its budget: start-up, evaluation, sample
LOOP_RUNS = 4  # the baseline and the experiments of the loop
LOOP_NEEDS = (".gitignore", "harness", "loop.py", "prepare.py", "program.md", "pyproject.toml", "train.py", "uv.lock")

# train.py up to its first step: everything that is compiled has been compiled by then.
START_UP = """
import time, train
def stop_here(*_):
    print(f"start-up took {time.perf_counter() - train.PROCESS_STARTED:.1f} s", flush=True)
    raise SystemExit(0)
train.train = stop_here
raise SystemExit(train.main())
"""

# ---------------------------------------------------------------------------------------------------------------------
# Stages: what they are, and how one runs


class StageFailed(Exception):
    """The message says how: "exit code 1", "timeout after 60 s", "stopped"."""


@dataclass(frozen=True)
class Stage:
    name: str  # of its log too
    run: Callable[["Day"], None]  # raises StageFailed
    read: Callable[[str], dict]  # figures, as far as they are in its log
    least_seconds: Callable[["Day"], float]  # it is not begun with less
    spare_seconds: float = 260  # beyond those: then it is ended, even if more are left
    why_not: Callable[["Day"], str] = lambda day: ""  # why it cannot run on this machine, "" if it can


@dataclass
class StageResult:
    name: str
    status: str = "ok"  # ok, failed, timed out, stopped, skipped
    problem: str = ""  # of every status but ok
    seconds: float = 0.0
    figures: dict[str, float | str] = field(default_factory=dict)
    log_end: str = ""  # where it failed


class Day:
    """One run of this program: the time that is left, the folders, what every step is told."""

    def __init__(self, out: Path, minutes: float, scratch: Path, profile: str = "smoke", facts: dict | None = None):
        self.out = out
        self.minutes = minutes
        self.scratch = scratch
        self.profile = profile
        self.facts = facts or {}
        self.deadline = time.monotonic() + 60 * minutes
        self.stop = threading.Event()  # Ctrl-C, SIGTERM
        self.stage_deadline = self.deadline
        self.log = out / "machine.log"
        self.results: list[StageResult] = []

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def run_seconds(self, profile: str = "") -> float:
        """What a whole run takes, about; a small profile starts faster than a large one."""
        budget = self.facts.get("profiles", {}).get(profile or self.profile, 300.0)
        return budget + min(OVERHEAD_SECONDS, budget + 10)

    def failed(self) -> list[StageResult]:
        return [result for result in self.results if result.status not in ("ok", "skipped")]

    def variables(self) -> dict[str, str]:
        """The environment of every step. Compile caches and temporary files go to the scratch folder."""
        left_out = (*OF_A_RUN, "TRITON_CACHE_DIR")
        kept = {key: value for key, value in os.environ.items() if key not in left_out and not key.startswith("GIT_")}
        own = {"TMPDIR": self.scratch, "TORCHINDUCTOR_CACHE_DIR": self.scratch / "compile"}
        own |= {"AUTORESEARCH_PROFILE": self.profile, "PYTHONUNBUFFERED": "1"}
        return kept | {key: str(value) for key, value in own.items()}

    def write(self, text: str) -> None:
        """Append to the log of the stage."""
        with open(self.log, "a") as log:
            log.write(text)

    def step(self, *command: str, cwd: Path | None = None, **variables: object) -> None:
        """Run a command, its output into the stage's log. Raises StageFailed unless it ends well and in time."""
        limit = self.stage_deadline - time.monotonic()
        if limit <= 0:
            raise StageFailed("timeout before the next step")
        shown = ["'...'" if "\n" in word else word for word in command]
        self.write(f"$ {' '.join(shown)}\n")
        running = self.out / "running.log"
        ending = run_child(
            list(command),
            cwd=cwd or ROOT,
            env=self.variables() | {key: str(value) for key, value in variables.items()},
            mark=f"{self.scratch}:step",
            log=running,
            limit=limit,
            stop=self.stop,
        )
        self.end_stragglers()
        self.write(f"{read_end(running, LOG_BYTES)}\n[{ending.problem or 'ok'}, {ending.seconds:.1f} s]\n\n")
        running.unlink(missing_ok=True)
        if ending.problem:
            raise StageFailed(ending.problem)

    def end_stragglers(self) -> None:
        """Kill what a step left: runs of the loop carry a mark of the loop's, with a path inside the scratch folder."""
        for pid in find_processes("environ", re.escape(str(self.scratch)).encode()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def run_stage(day: Day, stage: Stage) -> StageResult:
    """Run one stage, whatever happens in it."""
    result = StageResult(stage.name)
    needed = stage.least_seconds(day)
    result.problem = "stopped by a signal" if day.stop.is_set() else stage.why_not(day)
    if not result.problem and day.seconds_left() < needed:
        result.problem = f"it needs about {needed:.0f} s, {day.seconds_left():.0f} s are left"
    if result.problem:
        result.status = "skipped"
        return result
    day.log = day.out / f"{stage.name}.log"
    day.log.write_text("")
    began = time.monotonic()
    day.stage_deadline = min(day.deadline, began + needed + stage.spare_seconds)
    try:
        stage.run(day)
    except StageFailed as error:
        result.problem = str(error)
        result.status = {"timeout": "timed out", "stopped": "stopped"}.get(result.problem.split()[0], "failed")
    except Exception as error:  # a fault of this program must not end the day
        result.problem = f"{type(error).__name__}: {error}"
        result.status = "failed"
        day.write(f"{result.problem}\n")
    result.seconds = time.monotonic() - began
    try:
        result.figures = stage.read(read_text(day.log))
    except Exception as error:  # output of another form: the log is still there
        result.figures = {f"figures_of_{stage.name}": f"could not be read: {type(error).__name__}: {error}"}
    if result.problem:
        result.log_end = read_tail(day.log, LOG_END_LINES)
    return result


def run_stages(day: Day, stages: list[Stage]) -> None:
    """Run all stages; the report is written again after each, so that a day cut short leaves one."""
    for stage in stages:
        print(f"{stage.name}: begins, {day.seconds_left() / 60:.1f} min left", file=sys.stderr, flush=True)
        result = run_stage(day, stage)
        day.results.append(result)
        print(f"{stage.name}: {result.status} {result.problem} {result.seconds:.0f} s", file=sys.stderr, flush=True)
        data = {"profile": day.profile, "minutes": day.minutes, "facts": day.facts}
        data["stages"] = [asdict(result) for result in day.results]
        write_atomically(day.out / "report.json", json.dumps(data, indent=1) + "\n")
        write_atomically(day.out / "report.md", report_text(day))


# ---------------------------------------------------------------------------------------------------------------------
# The stages themselves


def find_numbers(text: str, **patterns: str) -> dict[str, float]:
    """The first group of each pattern's last match, as a number, under the pattern's name."""
    matches = {name: re.findall(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: float(found[-1].replace(",", "")) for name, found in matches.items() if found}


def run_tests(day: Day) -> None:
    """Only the files that hold gpu tests: a package that other tests need may be missing here."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    options = ["-n", "0", "-m", "gpu and not slow", "-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    day.step(PYTHON, "-m", "pytest", *options, *[str(path.relative_to(ROOT)) for path in files])


def read_tests(text: str) -> dict:
    words = ("passed", "failed", "skipped", "error")
    return find_numbers(text, **{f"tests_{word}": rf"\b(\d+) {word}" for word in words})


def run_budget(day: Day) -> None:
    day.step(PYTHON, "prepare.py")
    if day.seconds_left() < day.run_seconds():
        raise StageFailed("timeout: the data is prepared, and a whole run no longer fits: give more --minutes")
    day.step(PYTHON, "train.py")


def read_budget(text: str) -> dict:
    """The summary; what follows from it; why a faster attention back-end did not run."""
    figures = find_numbers(text, prepare_seconds=r"\A\$ .* prepare\.py\n(?:.*\n)*?\[ok, ([\d.]+) s\]")
    for key, value in re.findall(r"^(\w+): +(.*)$", text.partition("\n---\n")[2], re.MULTILINE):
        if key not in ("sample", "seed"):
            figures[key] = float(value) if re.fullmatch(r"[\d.]+", value) else value
    figures |= find_numbers(text, rows_per_micro_step=r"^batch .* = (\d+) rows x")
    per_step = find_numbers(text, tokens=r"^batch ([\d,]+) tokens = ")
    if per_step and "num_steps" in figures:
        figures["tokens_per_second"] = round(per_step["tokens"] * figures["num_steps"] / figures["training_seconds"])
    for name, why in re.findall(r"^attention: no ([\w-]+): (.*)$", text, re.MULTILINE):
        figures[f"why_not_{name}"] = why
    return figures


def run_startup(day: Day) -> None:
    for _ in ("cache empty", "cache filled"):
        day.step(PYTHON, "-c", START_UP, TORCHINDUCTOR_CACHE_DIR=day.scratch / "compile-of-startup")


def read_startup(text: str) -> dict:
    seconds = [float(value) for value in re.findall(r"^start-up took ([\d.]+) s$", text, re.MULTILINE)]
    figures = dict(zip(("startup_seconds_cache_empty", "startup_seconds_cache_filled"), seconds, strict=False))
    if re.search(r"^attention .*, compiled False$", text, re.MULTILINE):
        figures["startup_compiles"] = "nothing: this profile's knobs do not compile"
    return figures


def run_attention(day: Day) -> None:
    day.step(PYTHON, "tests/bench_attention.py")


def read_attention(text: str) -> dict:
    figures = {}
    for name, window, forward, both in re.findall(r"^([\w-]+) +(\d+) +([\d.]+) +([\d.]+|none.*)$", text, re.MULTILINE):
        figures[f"{name}_window_{window}_forward_ms"] = float(forward)
        if not both.startswith("none"):
            figures[f"{name}_window_{window}_forward_backward_ms"] = float(both)
    return figures


def run_loader(day: Day) -> None:
    day.step(PYTHON, "tests/bench_loader.py", AUTORESEARCH_PROFILE="climbmix")  # its row length; no data is needed


def read_loader(text: str) -> dict:
    return find_numbers(
        text,
        pack_batch_plain_ms=r"^loader, .*: plain ([\d.,]+) ms",
        pack_batch_ms=r"^loader, .* ours ([\d.,]+) ms",
        loader_batch_ms=r"^make_dataloader .*: ([\d.,]+) ms a batch",
    )


def loop_profile(day: Day) -> str:
    """The profile of the day where four of its runs fit into what is left, else pocket."""
    fits = LOOP_RUNS * day.run_seconds() <= day.seconds_left()
    return day.profile if fits or day.profile == "smoke" else "pocket"


def run_loop(day: Day) -> None:
    """A repository of its own, whose one commit is what the loop needs of this working tree."""
    profile = loop_profile(day)
    clone = day.scratch / "repository"
    clone.mkdir()
    for source in (ROOT / name for name in LOOP_NEEDS):
        if source.is_dir():
            shutil.copytree(source, clone / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, clone)
    git = ("git", "-c", "user.name=gpu-day", "-c", "user.email=gpu-day@localhost", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "what the GPU day runs"]):
        day.step(*git, *command, cwd=clone)
    baseline_runs = 1 if profile in DOMAIN.assumed_sigma else 2  # two where nothing is known of the noise
    experiments = str(LOOP_RUNS - baseline_runs)
    asked = ["--tag", "gpu-day", "--agent", "random", "--ahead", "1", "--max-experiments", experiments]
    try:
        day.step(PYTHON, "loop.py", *asked, cwd=clone, AUTORESEARCH_PROFILE=profile)
    finally:
        rows = read_text(clone / "results.tsv").splitlines()[1:]
        day.write("".join(f"row\t{row}\n" for row in rows) + f"loop of profile {profile}\n")
    day.step(PYTHON, "loop.py", "report", cwd=clone, AUTORESEARCH_PROFILE=profile)
    if len(rows) < LOOP_RUNS:  # a gain on a former champion runs once more
        raise StageFailed(f"the ledger has {len(rows)} rows, {LOOP_RUNS} are right")


def read_loop(text: str) -> dict:
    figures = {}
    if profile := re.search(r"^loop of profile (\w+)$", text, re.MULTILINE):
        figures["loop_profile"] = profile[1]
    counts = Counter(re.findall(r"^row\t(?:[^\t]*\t){3}(\w+)", text, re.MULTILINE))
    if counts:
        figures["loop_rows"] = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    rates = {"loop_runs_per_hour": r"([\d.]+) runs an hour", "loop_devices_busy": r"([\d.]+) devices busy"}
    return figures | find_numbers(text, **rates)


def why_no_gpu(day: Day) -> str:
    return "" if day.facts.get("gpu") else "no CUDA device here"


def why_no_loop(day: Day) -> str:
    return "" if shutil.which("git") else "git is not installed"


def loop_seconds(day: Day) -> float:
    return LOOP_RUNS * day.run_seconds(loop_profile(day))


STAGES = [
    Stage("tests", run_tests, read_tests, lambda day: 60, 540, why_no_gpu),
    Stage("budget", run_budget, read_budget, Day.run_seconds, 860),
    Stage("startup", run_startup, read_startup, lambda day: 30, 390),
    Stage("attention", run_attention, read_attention, lambda day: 20),
    Stage("loader", run_loader, read_loader, lambda day: 40),
    Stage("loop", run_loop, read_loop, loop_seconds, 2160, why_no_loop),
]

# ---------------------------------------------------------------------------------------------------------------------
# The machine


def read_facts() -> dict:
    """What figures depend on. Runs in a child: a broken driver or torch must not end the day."""
    import torch

    import train

    cpu = re.findall(r"^model name\s*: (.*)$", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    facts = {
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "commit": output_of("git", "describe", "--always", "--dirty") or "unknown: no git repository here",
        "gpu": "",
        "profiles": {name: row.time_budget for name, row in train.prepare.PROFILES.items()},
        "climbmix_is_prepared": (train.prepare.CACHE_ROOT / "climbmix" / "manifest.json").exists(),
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_mb": round(properties.total_memory / 2**20),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "peak_bf16_tflops": train.peak_flops(name) / 1e12 or "not in train.py's table: MFU reads 0",
        }
    return facts


def output_of(*command: str) -> str:
    """What a command prints, "" where it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=FACTS_SECONDS, check=True)
        return run.stdout.strip()
    return ""


def ask_facts() -> dict:
    """The facts; where they cannot be read, that they cannot."""
    try:
        return json.loads(output_of(PYTHON, __file__, "--facts").splitlines()[-1])
    except (ValueError, IndexError):
        return {"machine": "its facts could not be read: 'gpu_day.py --facts' says why"}


def choose_profile(facts: dict) -> str:
    if not facts.get("gpu"):
        return "pocket"
    return "climbmix" if facts["climbmix_is_prepared"] else "code"


# ---------------------------------------------------------------------------------------------------------------------
# The report, and the command


def cell(value: object) -> str:
    """A value in a cell of a table."""
    if isinstance(value, float):
        value = f"{value:,.0f}" if value == int(value) else f"{value:,.7g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def report_text(day: Day) -> str:
    figures = {key: value for key, value in day.facts.items() if key not in ("profiles", "climbmix_is_prepared")}
    figures["profile"] = day.profile
    where = day.facts.get("gpu") or f"a CPU, {day.facts.get('cpu', 'unknown')}"
    lines = [f"# The GPU day: profile {day.profile} on {where}", ""]
    if not day.facts.get("gpu"):
        lines += ["**No GPU was here: these figures say nothing about one.**", ""]
    lines += ["| figure | value |", "| --- | --- |"]
    for group in (figures, *(result.figures for result in day.results)):
        lines += [f"| {key.replace('_', ' ')} | {cell(value)} |" for key, value in group.items() if value != ""]
    lines += ["", f"## Stages ({len(day.failed())} failed, {day.minutes:g} minutes were given)", ""]
    lines += ["| stage | status | seconds | why |", "| --- | --- | --- | --- |"]
    for result in day.results:
        lines.append(f"| {result.name} | {result.status} | {result.seconds:.1f} | {cell(result.problem)} |")
    for result in day.failed():
        lines += ["", f"## {result.name}: {result.problem}", "", "The end of its log:", ""]
        lines += [f"    {line}" for line in result.log_end.splitlines()]  # indented: a log may hold ``` itself
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    if argv == ["--facts"]:
        print(json.dumps(read_facts()))
        return 0
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu_day.py", description=__doc__, formatter_class=layout)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the report and the logs")
    what = "climbmix where its data is there, else code; on a CPU pocket"
    parser.add_argument("--profile", default=os.environ.get("AUTORESEARCH_PROFILE"), metavar="NAME", help=what)
    parser.add_argument("--minutes", type=float, default=30.0, help="for everything (default 30)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 10_000:
        parser.error(f"--minutes {args.minutes}: give a number over 0")
    began = time.monotonic()
    facts = ask_facts()
    profiles = facts.get("profiles", {args.profile: 300.0})
    if args.profile and args.profile not in profiles:
        parser.error(f"--profile {args.profile!r}: use one of {', '.join(profiles)}")
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-day-"))
    day = Day(out, args.minutes, scratch, args.profile or choose_profile(facts), facts)
    day.deadline -= time.monotonic() - began
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: day.stop.set())  # the step that runs is ended, the report is written
    try:
        run_stages(day, [stage for stage in STAGES if stage.name in args.only])
    finally:
        day.end_stragglers()
        remove_folder(scratch)
    print(report_text(day))
    print(f"written to {out / 'report.md'}", file=sys.stderr)
    return 1 if day.failed() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
