"""The GPU day's loop on the CPU: from nothing to an audited ledger on text of one's own, with the real prepare.py,
train.py and loop.py. Run: uv run pytest -n 0 -m slow tests/test_gpu_day.py"""

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
from gpu_day import ROOT
from prepare_fixtures import copy_prepare, english, write_jsonl


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
