"""How long a person waits for what they read, of a ledger of 15,000 runs.

uv run python tests/bench_report.py
"""

import tempfile
import time
from pathlib import Path

from reading_fixtures import StandInTag
from test_page import long_night

from harness.compare import training_facts, verdict
from harness.page import draw_progress, write_page
from harness.report import report_text, status_text

RUNS = 15_000


def main() -> None:
    ledger = long_night(RUNS)
    print(f"{RUNS:,} runs, {len(ledger.changes()):,} kept changes")
    log = "step 00010 | 5.0% | loss 4.1234 | lr x1.00 | 60 ms\n" * 300_000
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tag = StandInTag(home, ledger)
        jobs = {
            "status": lambda: status_text(tag),
            "report": lambda: report_text(ledger),
            "verdict of the last run": lambda: verdict(ledger, ledger.runs[-1]),
            "progress.png (with the import of matplotlib)": lambda: draw_progress(ledger, home / "progress.png"),
            "report.html": lambda: write_page(ledger, home / "report.html", tag),
            f"facts of a log of {len(log) / 1e6:.0f} MB": lambda: training_facts(log, ledger.domain, 30.0),
        }
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            print(f"{time.perf_counter() - began:6.2f} s  {name}")
        print(f"{(home / 'report.html').stat().st_size / 1e6:6.2f} MB report.html")


if __name__ == "__main__":
    main()
