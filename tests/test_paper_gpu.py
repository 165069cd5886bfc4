"""train.py's CUDA path on a GPU of paper (see paper_gpu.py). Run: uv run pytest -n 0 -m slow tests/test_paper_gpu.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOAL_MB = 25_000  # peak memory with the climbmix knobs


@pytest.mark.slow
def test_climbmix_run_compiles_once_without_a_break_and_stays_within_the_memory_goal(tmp_path):
    """A process of its own: what stands in for the driver cannot be taken back."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, str(Path(__file__).parent / "paper_gpu.py"), "--weigh"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    print(result)
    assert result["attention"] == "flex_attention"
    # The probe of attention, training, evaluation, and Muon's update of four shapes: each once, all before the first
    # step.
    assert result["graphs_warm"] == result["graphs"] == 3 + 4
    assert result["graph_breaks"] == {}
    assert result["evaluation_mb"] < result["training_mb"] < GOAL_MB
