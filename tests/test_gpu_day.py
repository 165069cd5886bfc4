"""The GPU day's machinery with stand-ins for its stages; and, slow, its loop on the CPU: from nothing to an audited
ledger on text of one's own, with the real prepare.py, train.py and loop.py.

Run: uv run pytest -n 0 -m 'slow or not slow' tests/test_gpu_day.py
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading

import gpu_day
import pytest
from gpu_day import ROOT, Stage
from prepare_fixtures import copy_prepare, english, write_jsonl

from harness.processes import find_processes


def test_day_goes_on_after_failures_and_reports_every_figure(tmp_path, monkeypatch, capsys):
    stand_ins = {
        "crashes": Stage(30, "speed", "echo speed 1.5; echo '``` what went wrong'; exit 3; echo speed 2"),
        "hangs": Stage(0.5, "speed", "setsid sleep 60 & wait"),
        "works": Stage(30, "speed", 'echo speed 3; test -d "$SCRATCH"; echo quiet'),
    }
    monkeypatch.setattr(gpu_day, "STAGES", stand_ins)
    monkeypatch.setattr(gpu_day.signal, "signal", lambda *_: None)  # they would stay in this process
    monkeypatch.setattr(gpu_day.tempfile, "tempdir", str(tmp_path))
    assert gpu_day.main([str(tmp_path / "out"), "--minutes", "1"]) == 1
    assert not find_processes("environ", re.escape(f"SCRATCH={tmp_path}").encode())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the scratch folder is gone

    report = capsys.readouterr().out
    for row in (r"crashes \| \d.\d \| exit code 3", r"hangs \| \d.\d \| timeout after 1 s", r"works \| \d.\d \| ok"):
        assert re.search(rf"^\| {row} \|$", report, re.MULTILINE), report
    assert "    speed 1.5\n" in report and "    ``` what went wrong\n" in report and "speed 2\n" not in report
    assert report.endswith("## works: ok\n\n    speed 3\n\n")

    assert gpu_day.main([str(tmp_path / "out"), "--minutes", "0", "--only", "works"]) == 1
    assert "| works | 0.0 | skipped: no time is left |" in capsys.readouterr().out
    stop = threading.Event()
    stop.set()
    assert not gpu_day.run_stages(["works"], tmp_path / "out", 1, {"SCRATCH": str(tmp_path)}, stop)
    assert "stopped by a signal" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_day_on_text_of_ones_own_goes_from_nothing_to_an_audited_ledger(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "loop.py", "program.md", "pyproject.toml", "train.py", "uv.lock"):
        shutil.copy(ROOT / name, tree / name)
    rng = random.Random(0)
    source = write_jsonl(tmp_path / "own.jsonl", [english(rng, 200) for _ in range(600)])
    copy_prepare(tree, "own", source, max_seq_len=64, time_budget=2, eval_tokens=2**13, vocab_size=512)
    for name, value in {"CACHE": tmp_path / "cache", "LOCKS": tmp_path / "locks", "PROFILE": "own"}.items():
        monkeypatch.setenv(f"AUTORESEARCH_{name}", str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_day, "ROOT", tree)
    env = os.environ | {"PY": sys.executable, "SCRATCH": str(tmp_path)}
    all_well = gpu_day.run_stages(["loop", "startup"], tmp_path, 9, env, threading.Event())
    report = (tmp_path / "report.md").read_text()
    assert all_well, report
    assert re.search(r"^    start-up took \d+\.\d s$", report, re.MULTILINE) and "runs an hour" in report
    assert "has no data yet: preparing it" in (tmp_path / "loop.log").read_text()

    clone = tmp_path / "repository"
    _, *rows = (clone / "results.tsv").read_text().splitlines()
    row = r"[0-9a-f]{7}\t\d\.\d{6}\t\d\.\d\t"
    assert re.fullmatch(row + "keep\tbaseline", rows[0])
    assert re.fullmatch(row + "(keep|discard|crash)\t.*[A-Z_]+ .* -> .*", rows[2])  # 1 is a second baseline
    assert "depth:            1\n" in (clone / "runs" / "0001" / "run.log").read_text()  # hyperparameters for a CPU
    assert (clone / "progress.png").stat().st_size > 10_000

    command = [sys.executable, "loop.py", "audit", "--replicates", "1"]
    audit = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=200)
    # 1 where a busy machine moved two seconds of training far: that is doubted.
    assert audit.returncode in (0, 1) and "Traceback" not in audit.stderr, audit.stderr
    lines = (clone / ".git" / "autoresearch" / "gpu-day" / "runs.jsonl").read_text().splitlines()
    audited = [run for run in map(json.loads, lines) if run["purpose"] == "audit"]
    assert audited
    for run in audited:  # rounding: each process may use another number of threads
        scores = run["score"], run["test_score"]
        assert (run["clean_score"], run["clean_test_score"]) == pytest.approx(scores, abs=2e-6)
