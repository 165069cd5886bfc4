"""The GPU day's machinery with stand-ins for its stages; and, slow, its loop on the CPU: from nothing to an audited
ledger on text of one's own, with the real prepare.py, train.py and loop.py.

Run: uv run pytest -n 0 -m 'slow or not slow' tests/test_gpu_day.py
"""

import json
import random
import re
import shutil
import subprocess
import sys

import gpu_day
import pytest
from gpu_day import ROOT, Day, Stage
from prepare_fixtures import copy_prepare, english, profile_row, write_jsonl

from harness.processes import find_processes

HIDES = """
import os, subprocess, sys, time
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.Popen(["sleep", "60"], start_new_session=True, env=os.environ | {"AUTORESEARCH_MARK": sys.argv[1]}, **quiet)
print("waits", flush=True)
time.sleep(60)
"""


def read_speed(text: str) -> dict:
    return gpu_day.find_numbers(text, {"speed_ms": r"^speed ([\d.]+)"})


def stand_in(name: str, *command: str, most_seconds: float = 30.0, least_seconds: float = 0.0) -> Stage:
    def run(day: Day) -> None:
        day.step(sys.executable, "-c", *command)

    return Stage(name, run, read_speed, lambda day: least_seconds, lambda day: most_seconds)


def raises(day: Day) -> None:
    raise KeyError("no such figure")


def test_day_goes_on_after_failures_and_reports_every_figure(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    day = Day(out, 1, scratch, facts={"cpu": "a | b", "gpu": "", "cores": 2})
    stages = [
        stand_in("crashes", "print('speed 1.5'); print('``` what went wrong'); raise SystemExit(3)"),
        stand_in("hangs", HIDES, f"{scratch}/hidden", most_seconds=0.5),
        Stage("faulty", raises, read_speed, lambda day: 0, lambda day: 30),
        stand_in("long", "print('speed 9')", least_seconds=1000),
        Stage("elsewhere", raises, read_speed, lambda day: 0, lambda day: 30, lambda day: "no CUDA device here"),
        stand_in("works", "print('speed 1234.25')"),
    ]
    gpu_day.run_stages(day, stages)
    assert not find_processes("environ", re.escape(str(scratch)).encode())

    saved = json.loads((out / "report.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in saved["stages"]] == [
        ("crashes", "failed"),
        ("hangs", "timed out"),
        ("faulty", "failed"),
        ("long", "skipped"),
        ("elsewhere", "skipped"),
        ("works", "ok"),
    ]
    problems = [stage["problem"] for stage in saved["stages"]]
    assert problems[0] == "exit code 3"
    assert problems[1] == "timeout after 1 s"
    assert problems[2] == "KeyError: 'no such figure'"
    assert re.fullmatch(r"it needs about 1000 s, \d\d s are left", problems[3])
    assert problems[4:] == ["no CUDA device here", ""]
    assert saved["stages"][0]["figures"] == {"speed_ms": 1.5}  # what was printed before the failure counts
    assert saved["stages"][5]["figures"] == {"speed_ms": 1234.25}

    report = (out / "report.md").read_text()
    assert "No GPU was here" in report
    assert (
        "| cpu | a \\| b |\n| cores | 2 |\n| profile | smoke |\n| speed ms | 1.5 |\n| speed ms | 1,234.25 |" in report
    )
    assert "## Stages (3 failed, 1 minutes were given)" in report
    assert "| hangs | timed out | " in report
    assert "    ``` what went wrong\n    [exit code 3, " in report  # the end of its log, as a block that nothing ends
    assert sorted(path.name for path in out.iterdir()) == [
        "crashes.log", "faulty.log", "hangs.log", "report.json", "report.md", "works.log"
    ]  # fmt: skip


def test_stage_is_skipped_out_of_time_or_stopped_and_odd_output_harms_nothing(tmp_path):
    day = Day(tmp_path, 1, tmp_path)
    day.deadline -= 60
    assert gpu_day.run_stage(day, gpu_day.STAGES[-1]).problem == "it needs about 1440 s, 0 s are left"
    day.deadline += 60
    unreadable = Stage("odd", lambda day: None, lambda text: {"ms": float("x")}, lambda day: 0, lambda day: 30)
    result = gpu_day.run_stage(day, unreadable)
    assert result.figures["figures_of_odd"].startswith("could not be read: ValueError")
    assert result.status == "ok"
    day.stop.set()
    assert gpu_day.run_stage(day, gpu_day.STAGES[-1]).problem == "stopped by a signal"


def test_profile_is_the_largest_one_that_has_its_data_and_for_the_loop_one_whose_runs_fit(tmp_path):
    on_gpu = {"gpu": "NVIDIA H200", "climbmix_is_prepared": False}
    assert gpu_day.choose_profile(None, on_gpu) == "code"
    assert gpu_day.choose_profile(None, on_gpu | {"climbmix_is_prepared": True}) == "climbmix"
    assert gpu_day.choose_profile(None, {}) == "pocket"
    assert gpu_day.choose_profile("smoke", on_gpu) == "smoke"
    day = Day(tmp_path, 30, tmp_path, "code", {"profiles": {"code": 300, "pocket": 30, "smoke": 2}})
    assert gpu_day.loop_profile(day) == "code"
    day.deadline -= 600
    assert gpu_day.loop_profile(day) == "pocket"
    day.profile = "smoke"
    assert gpu_day.loop_profile(day) == "smoke"


def test_figures_are_read_from_what_the_benches_and_a_run_print():
    attention = """back-end              window  forward ms  + backward ms
sdpa                     128       21.68         140.79
flex                     128       32.45  none on a CPU
flash-attention-3       1024        0.50           1.25
"""
    assert gpu_day.read_attention(attention) == {
        "sdpa_window_128_forward_ms": 21.68,
        "sdpa_window_128_forward_backward_ms": 140.79,
        "flex_window_128_forward_ms": 32.45,
        "flash-attention-3_window_1024_forward_ms": 0.5,
        "flash-attention-3_window_1024_forward_backward_ms": 1.25,
    }
    loader = """\
loader, batch of 262,144 tokens: plain 127.6 ms, ours 1.02 ms: 125 times faster
make_dataloader on cpu, nothing else to do: 3.82 ms a batch, 69 M tokens/s
"""
    assert list(gpu_day.read_loader(loader).values()) == [127.6, 1.02, 3.82]
    run = """$ python prepare.py
digest: 6d9a8577d1f7

[ok, 13.6 s]

$ python train.py
attention: no flash-attention-3: ModuleNotFoundError: No module named 'kernels'
batch 524,288 tokens = 64 rows x 2048 x 4 micro-steps
---
val_bpb:          0.997913
training_seconds: 300.0
num_steps:        900
seed:             42
sample:           def read: 7
attention:        flex
"""
    assert gpu_day.read_budget(run) == {
        "prepare_seconds": 13.6,
        "val_bpb": 0.997913,
        "training_seconds": 300.0,
        "num_steps": 900.0,
        "attention": "flex",
        "rows_per_micro_step": 64.0,
        "tokens_per_second": 1_572_864,
        "why_not_flash-attention-3": "ModuleNotFoundError: No module named 'kernels'",
    }
    assert gpu_day.read_budget("Traceback\nRuntimeError: no kernel\n") == {}
    assert gpu_day.read_tests("SKIPPED [1] x: needs 2\n1 failed, 14 passed, 3 skipped in 3.39s\n") == {
        "tests_passed": 14, "tests_failed": 1, "tests_skipped": 3
    }  # fmt: skip


@pytest.mark.slow
def test_day_on_text_of_ones_own_goes_from_nothing_to_an_audited_ledger(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "loop.py", "program.md", "train.py"):
        shutil.copy(ROOT / name, tree / name)
    rng = random.Random(0)
    source = write_jsonl(tmp_path / "own.jsonl", [english(rng, 200) for _ in range(600)])
    sizes = {"max_seq_len": 64, "time_budget": 2, "eval_tokens": 2**13, "vocab_size": 512}
    copy_prepare(tree, profile_row("own", source, **sizes))
    own = {"AUTORESEARCH_PROFILE": "own", "CUDA_VISIBLE_DEVICES": "", "AUTORESEARCH_LOCKS": str(tmp_path / "locks")}
    for name, value in (own | {"AUTORESEARCH_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu_day, "ROOT", tree)
    monkeypatch.setattr(gpu_day, "LOOP_RUNS", 3)
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    day = Day(tmp_path / "out", 9, tmp_path / "scratch", "own", {"profiles": {"own": 2}})

    gpu_day.run_stages(day, [stage for stage in gpu_day.STAGES if stage.name in ("startup", "loop")][::-1])
    print((tmp_path / "out" / "loop.log").read_text())
    loop, startup = day.results
    assert (loop.problem, startup.problem) == ("", "")
    assert loop.figures["loop_profile"] == "own" and loop.figures["loop_runs_per_hour"] > 0
    assert startup.figures["startup_seconds_cache_filled"] > 0
    assert "has no data yet: preparing it" in (tmp_path / "out" / "loop.log").read_text()

    clone = tmp_path / "scratch" / "repository"
    header, *rows = (clone / "results.tsv").read_text().splitlines()
    assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    row = r"[0-9a-f]{7}\t\d\.\d{6}\t\d\.\d\t"
    assert re.fullmatch(row + "keep\tbaseline", rows[0])
    assert re.fullmatch(row + r"keep\tbaseline \(seed \d+\)", rows[1])  # nothing is known of this profile's noise
    assert re.fullmatch(row + "(keep|discard|crash)\t.*[A-Z_]+ .* -> .*", rows[2]) and len(rows) == 3
    assert (clone / "runs" / "0003" / "change.diff").read_text().startswith("diff --git a/train.py b/train.py")
    assert "depth:            1\n" in (clone / "runs" / "0001" / "run.log").read_text()  # hyperparameters for a CPU
    assert (clone / "progress.png").stat().st_size > 10_000

    command = [sys.executable, "loop.py", "audit", "--replicates", "1"]
    audit = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=200)
    assert "Traceback" not in audit.stderr  # 1 where a busy machine moved two seconds of training far: that is doubted
    assert audit.returncode in (0, 1), audit.stderr
    lines = (clone / ".git" / "autoresearch" / "gpu-day" / "runs.jsonl").read_text().splitlines()
    audited = [run for run in map(json.loads, lines) if run["purpose"] == "audit"]
    assert audited
    for run in audited:  # rounding: each process may use another number of threads
        assert run["clean_score"] == pytest.approx(run["score"], abs=2e-6)
        assert run["clean_test_score"] == pytest.approx(run["test_score"], abs=2e-6)


def test_command_reads_the_machine_skips_what_needs_a_gpu_and_prints_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "ask_facts", gpu_day.read_facts)  # without its child
    monkeypatch.setattr(gpu_day.signal, "signal", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_day.main([str(tmp_path / "out"), "--profile", "smoke", "--only", "tests"]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| tests | skipped | 0.0 | no CUDA device here |" in report and "| torch | " in report
    assert capsys.readouterr().out.strip() == report.strip()
    with pytest.raises(SystemExit):
        gpu_day.main([str(tmp_path / "out"), "--profile", "none"])
    assert "--profile 'none': use one of climbmix, code, pocket, smoke" in capsys.readouterr().err
