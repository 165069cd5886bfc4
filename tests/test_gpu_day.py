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
from prepare_fixtures import copy_prepare, english, write_jsonl

from harness.processes import find_processes

HIDES = """
import os, subprocess, sys, time
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.Popen(["sleep", "60"], start_new_session=True, env=os.environ | {"AUTORESEARCH_MARK": sys.argv[1]}, **quiet)
print("waits", flush=True)
time.sleep(60)
"""


def stand_in(name: str, *command: str, spare_seconds: float = 30.0, least_seconds: float = 0.0, **options) -> Stage:
    def run(day: Day) -> None:
        day.step(sys.executable, "-c", *command)

    def read(text: str) -> dict:
        return gpu_day.find_numbers(text, speed_ms=r"^speed (\S+)")

    return Stage(name, run, read, lambda day: least_seconds, spare_seconds, **options)


def test_day_goes_on_after_failures_and_reports_every_figure(tmp_path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    day = Day(out, 1, scratch, facts={"cpu": "a | b", "gpu": "", "cores": 2})
    stages = [
        stand_in("crashes", "print('speed 1.5'); print('``` what went wrong'); raise SystemExit(3)"),
        stand_in("hangs", HIDES, f"{scratch}/hidden", spare_seconds=0.5),
        Stage("faulty", lambda day: {}["no such figure"], dict, lambda day: 0),
        stand_in("long", "print('speed 9')", least_seconds=1000),
        stand_in("elsewhere", "print('speed 9')", why_not=lambda day: "no CUDA device here"),
        stand_in("odd", "print('speed ?')"),
        stand_in("works", "print('speed 1234.25')"),
    ]
    gpu_day.run_stages(day, stages)
    assert not find_processes("environ", re.escape(str(scratch)).encode())

    saved = {stage["name"]: stage for stage in json.loads((out / "report.json").read_text())["stages"]}
    assert {name: (stage["status"], stage["problem"]) for name, stage in saved.items()} == {
        "crashes": ("failed", "exit code 3"),
        "hangs": ("timed out", "timeout after 1 s"),
        "faulty": ("failed", "KeyError: 'no such figure'"),
        "long": ("skipped", saved["long"]["problem"]),
        "elsewhere": ("skipped", "no CUDA device here"),
        "odd": ("ok", ""),
        "works": ("ok", ""),
    }
    assert re.fullmatch(r"it needs about 1000 s, \d\d s are left", saved["long"]["problem"])
    assert saved["crashes"]["figures"] == {"speed_ms": 1.5}  # what was printed before the failure counts
    assert saved["odd"]["figures"]["figures_of_odd"].startswith("could not be read: ValueError")

    report = (out / "report.md").read_text()
    assert "No GPU was here" in report
    assert "| cpu | a \\| b |\n| cores | 2 |\n| profile | smoke |\n| speed ms | 1.5 |\n" in report
    assert "| speed ms | 1,234.25 |" in report and "| hangs | timed out | " in report
    assert "## Stages (3 failed, 1 minutes were given)" in report
    assert "    ``` what went wrong\n    [exit code 3, " in report  # the end of its log, as a block that nothing ends
    day.stop.set()
    assert gpu_day.run_stage(day, stages[-1]).problem == "stopped by a signal"


def test_profile_is_the_largest_one_that_has_its_data_and_for_the_loop_one_whose_runs_fit(tmp_path):
    on_gpu = {"gpu": "NVIDIA H200", "climbmix_is_prepared": False}
    assert gpu_day.choose_profile(on_gpu) == "code"
    assert gpu_day.choose_profile(on_gpu | {"climbmix_is_prepared": True}) == "climbmix"
    assert gpu_day.choose_profile({}) == "pocket"
    day = Day(tmp_path, 30, tmp_path, "code", {"profiles": {"code": 300, "pocket": 30}})
    assert gpu_day.loop_profile(day) == "code"
    day.deadline -= 600
    assert gpu_day.loop_profile(day) == "pocket"


ATTENTION = """back-end              window  forward ms  + backward ms
flex                     128       32.45  none on a CPU
flash-attention-3       1024        0.50           1.25
"""
LOADER = """loader, batch of 262,144 tokens: plain 127.6 ms, ours 1.02 ms: 125 times faster
make_dataloader on cpu, nothing else to do: 3.82 ms a batch, 69 M tokens/s
"""
BUDGET = """$ python prepare.py
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
FIGURES = [  # reader, text, figures
    (
        gpu_day.read_attention,
        ATTENTION,
        {
            "flex_window_128_forward_ms": 32.45,
            "flash-attention-3_window_1024_forward_ms": 0.5,
            "flash-attention-3_window_1024_forward_backward_ms": 1.25,
        },
    ),
    (gpu_day.read_loader, LOADER, {"pack_batch_plain_ms": 127.6, "pack_batch_ms": 1.02, "loader_batch_ms": 3.82}),
    (
        gpu_day.read_budget,
        BUDGET,
        {
            "prepare_seconds": 13.6,
            "val_bpb": 0.997913,
            "training_seconds": 300.0,
            "num_steps": 900.0,
            "attention": "flex",
            "rows_per_micro_step": 64.0,
            "tokens_per_second": 1_572_864,
            "why_not_flash-attention-3": "ModuleNotFoundError: No module named 'kernels'",
        },
    ),
    (gpu_day.read_budget, "Traceback\nRuntimeError: no kernel\n", {}),
    (gpu_day.read_tests, "SKIPPED [1] x: 2\n1 failed, 14 passed in 3.39s\n", {"tests_passed": 14, "tests_failed": 1}),
]


@pytest.mark.parametrize(("read", "text", "figures"), FIGURES)
def test_figures_are_read_from_what_benches_runs_and_tests_print(read, text, figures):
    assert read(text) == figures


@pytest.mark.slow
def test_day_on_text_of_ones_own_goes_from_nothing_to_an_audited_ledger(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "loop.py", "program.md", "train.py"):
        shutil.copy(ROOT / name, tree / name)
    rng = random.Random(0)
    source = write_jsonl(tmp_path / "own.jsonl", [english(rng, 200) for _ in range(600)])
    copy_prepare(tree, "own", source, max_seq_len=64, time_budget=2, eval_tokens=2**13, vocab_size=512)
    for name in ("CACHE", "LOCKS"):
        monkeypatch.setenv(f"AUTORESEARCH_{name}", str(tmp_path / name))
    monkeypatch.setenv("AUTORESEARCH_PROFILE", "own")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_day, "ROOT", tree)
    monkeypatch.setattr(gpu_day, "LOOP_RUNS", 3)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    day = Day(out, 9, scratch, "own", {"profiles": {"own": 2}})

    gpu_day.run_stages(day, [stage for stage in gpu_day.STAGES if stage.name in ("startup", "loop")][::-1])
    log = (out / "loop.log").read_text()
    loop, startup = day.results
    assert (loop.problem, startup.problem) == ("", ""), log
    assert loop.figures["loop_profile"] == "own" and loop.figures["loop_runs_per_hour"] > 0
    assert startup.figures["startup_seconds_cache_filled"] > 0
    assert "has no data yet: preparing it" in log

    clone = scratch / "repository"
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
        scores = run["score"], run["test_score"]
        assert (run["clean_score"], run["clean_test_score"]) == pytest.approx(scores, abs=2e-6)


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
