"""A small night for the tests of what a person reads."""

import time

from harness.ledger import Ledger, Run
from loop import DOMAIN

BASELINE, WIDER, WARMER, SLOWER = (letter * 40 for letter in "abcd")
STARTED = 1_700_000_000.0
RECORD = {"profile": "pocket", "tokens": 1000, "bytes": 3000, "device_name": "a CPU"}
SUMMARY = {"val_bpb": "1.72", "num_steps": "500", "num_params_M": "11.5", "depth": "4", "sample": "def main():"}


def made(number: int, commit: str, score: float | None, status: str, description: str, **changes) -> Run:
    """A run of 40 seconds, a minute after the one before it."""
    facts = {
        "memory_mb": 2048.0, "started_at": STARTED + 60 * number, "seconds": 40.0, "startup_seconds": 5.0,
        "training_seconds": 30.0, "evaluation_seconds": 4.0, "steps": 500.0, "tokens_per_second": 20_000.0,
        "loss_half": 4.0, "loss_end": 3.5, "busy_others": 0.02, "is_isolated": True, "record": RECORD,
    }  # fmt: skip
    if score is None:
        facts = {"started_at": STARTED + 60 * number, "seconds": 10.0}
    return Run(number, commit, status=status, description=description, score=score, **facts | changes)


def small_ledger(*more: Run) -> Ledger:
    """The baseline twice; a gain, kept; a slower and worse edit; a crash; the gain again, less good; then others."""
    cost = {"calls": 1, "tokens_in": 9000, "tokens_out": 1000, "usd": 0.25}
    unknown = {"calls": 2, "tokens_in": None, "tokens_out": None, "usd": None}
    faster = {"steps": 540.0, "tokens_per_second": 21_600.0, "loss_half": 3.9, "loss_end": 3.3}
    slower = {"steps": 480.0, "tokens_per_second": 19_200.0, "loss_half": 4.2, "loss_end": 3.6, "busy_others": 0.3}
    night = [
        made(1, BASELINE, 1.72, "keep", "baseline", purpose="baseline", summary=SUMMARY),
        made(2, BASELINE, 1.74, "keep", "baseline (seed 7)", purpose="replicate", tokens_per_second=20_400.0),
        made(3, WIDER, 1.65, "keep", "raise width to 384", base=BASELINE, cost=cost, **faster),
        made(4, SLOWER, 1.69, "discard", "value embeddings", base=WIDER, cost=unknown, **slower),
        made(5, WARMER, None, "crash", "warm up longer", base=WIDER, reason="NameError: name 'WARM' is not defined"),
        made(6, WIDER, 1.68, "keep", "raise width to 384 (again, seed 9)", purpose="replicate", **faster),
    ]
    return Ledger(DOMAIN, [*night, *more])


def live_status(*workers: dict, **changes) -> dict:
    """What a loop that began two hours ago writes."""
    status = {"since": time.time() - 7300, "waiting": "", "devices": 2, "usual_seconds": 40.0, "others": None}
    return status | {"workers": list(workers)} | changes
