"""train.py's CUDA path on a GPU of paper (see paper_gpu.py). Run: uv run pytest -n 0 -m slow tests/test_paper_gpu.py

A process each: what stands in for the driver cannot be taken back.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
GOAL_MB = 25_000  # peak memory with the climbmix knobs


def on_paper(cache: Path, *options: str) -> dict:
    env_command = ["env", f"TORCHINDUCTOR_CACHE_DIR={cache}", "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"]
    command = [*env_command, sys.executable, str(HERE / "paper_gpu.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    print(f"\n{' '.join(options) or 'climbmix'}: {result}")
    return result


def test_climbmix_run_compiles_once_without_a_break_and_stays_within_the_memory_goal(tmp_path):
    result = on_paper(tmp_path, "--weigh")
    assert result["attention"] == "flex_attention"
    # The compiler's trial, the probe of attention, training, evaluation, and Muon's update of four shapes: each once,
    # all before the first step.
    assert result["graphs_warm"] == result["graphs"] == 4 + 4
    assert result["graph_breaks"] == {}
    assert result["evaluation_mb"] < result["training_mb"] < GOAL_MB


def test_attention_kernels_fit_into_the_smallest_shared_memory_of_an_architecture(tmp_path):
    result = on_paper(tmp_path, "--attention", "--capability", "120")
    assert result["attention"] == "flex_attention"
    assert result["kernels"] >= 3  # forward, and two passes backward
    assert 0 < result["largest_shared"] <= result["shared_limit"]
