"""From a clone to a ledger, with nothing faked: the real prepare.py, train.py and loop.py on the smoke profile."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_fixtures import copy_prepare, english, profile_row, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository with the files of this tree as they are now, and no data anywhere."""
    path = tmp_path_factory.mktemp("whole") / "autoresearch"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=person", "-c", "user.email=person@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
        subprocess.run(["git", *identity, *command], cwd=path, check=True)
    return path


def run(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    own = {"AUTORESEARCH_PROFILE": "smoke"}
    for name in ("cache", "locks"):
        own[f"AUTORESEARCH_{name.upper()}"] = str(checkout.parent / name)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=kept | own | env, capture_output=True, text=True, timeout=150
    )


@pytest.mark.slow
def test_loop_goes_from_nothing_to_a_ledger(checkout):
    told = run(checkout, "train.py")
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("error: profile 'smoke' is not prepared")

    told = run(checkout, "loop.py", "--tag", "whole", "--agent", "random", "--max-experiments", "1")
    assert told.returncode == 0, told.stderr
    assert "has no data yet: preparing it" in told.stderr
    header, *rows = (checkout / "results.tsv").read_text().splitlines()
    assert header == "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
    row = r"[0-9a-f]{7}\t\d\.\d{6}\t\d\.\d\t"
    assert re.fullmatch(row + "keep\tbaseline", rows[0])
    assert re.fullmatch(row + r"keep\tbaseline \(seed \d+\)", rows[1])  # nothing is known of this profile's noise
    assert re.fullmatch(row + "(keep|discard|crash)\t.*[A-Z_]+ .* -> .*", rows[2])
    assert len(rows) == 3
    assert (checkout / "runs" / "0003" / "change.diff").read_text().startswith("diff --git a/train.py b/train.py")
    summary = (checkout / "runs" / "0001" / "run.log").read_text()
    keys = "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth"
    keys += " startup_seconds eval_seconds seed sample attention"
    assert [line.split(":")[0] for line in summary.partition("---\n")[2].splitlines()] == keys.split()

    told = run(checkout, "loop.py", "report")
    assert told.returncode == 0, told.stderr
    assert (checkout / "progress.png").stat().st_size > 10_000

    told = run(checkout, "loop.py", "audit", "--replicates", "1")
    assert "Traceback" not in told.stderr  # 1 where a busy machine moved two seconds of training far: that is doubted
    assert told.returncode in (0, 1), told.stderr
    lines = (checkout / ".git" / "autoresearch" / "whole" / "runs.jsonl").read_text().splitlines()
    audited = [json.loads(line) for line in lines]
    audited = [one for one in audited if one["purpose"] == "audit"]
    assert audited
    for one in audited:  # rounding: each process may use another number of threads
        assert one["clean_score"] == pytest.approx(one["score"], abs=2e-6)
        assert one["clean_test_score"] == pytest.approx(one["test_score"], abs=2e-6)


@pytest.mark.slow
def test_text_of_ones_own_is_trained_on_with_cpu_sized_knobs(checkout, tmp_path):
    rng = random.Random(0)
    source = write_jsonl(tmp_path / "own.jsonl", [english(rng, 200) for _ in range(600)])
    sizes = {"max_seq_len": 64, "time_budget": 2, "eval_tokens": 2**13, "vocab_size": 512}
    copy_prepare(tmp_path, profile_row("own", source, **sizes))
    (tmp_path / "train.py").write_text((checkout / "train.py").read_text())
    (tmp_path / "harness").mkdir()
    for name in ("__init__.py", "device.py"):
        (tmp_path / "harness" / name).write_text((checkout / "harness" / name).read_text())
    own = {"AUTORESEARCH_PROFILE": "own", "AUTORESEARCH_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    told = run(tmp_path, "prepare.py", **own)
    assert told.returncode == 0, told.stderr
    told = run(tmp_path, "train.py", **own)
    assert told.returncode == 0, told.stderr
    assert "depth:            1\n" in told.stdout
