"""A fork for another problem, made as docs/fork.md says: the page's own code, another metric, higher is better.

    uv run pytest tests/test_fork.py
"""

import json
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "fork.md").read_text()
BLOCKS = dict(re.findall(r"```\w+ ([\w.]+)\n(.*?)```", PAGE, re.DOTALL))  # file -> its code
FORK_BEGINS = "# What a fork for another domain changes"


def split_loop(source: str) -> tuple[str, str, str]:
    """loop.py up to the fork's block, the block, and the rest."""
    head, block = source.split(FORK_BEGINS, 1)
    banner, block = block.split("\n\n", 1)
    block, rest = block.split("\nSTARTUP_ALLOWANCE", 1)
    return f"{head}{FORK_BEGINS}{banner}\n\n", block, f"\nSTARTUP_ALLOWANCE{rest}"


def test_nothing_but_the_fork_block_names_the_metric():
    head, _, rest = split_loop((ROOT / "loop.py").read_text())
    texts = {"loop.py": head + rest}
    for path in (ROOT / "harness").glob("*.py"):
        texts[path.name] = path.read_text()
    for name, text in texts.items():
        assert not re.search(r"val_bpb|test_bpb|num_steps|peak_vram_mb|[\"']val[\"']", text), name


def test_fork_keeps_discards_crashes_reports_and_audits(desk):
    assert len(BLOCKS["judge.py"].splitlines()) < 40
    desk.git("rm", "-q", "train.py", "prepare.py")
    for name in ("judge.py", "solve.py", "program.md"):
        (desk.path / name).write_text(BLOCKS[name])
    head, _, rest = split_loop((desk.path / "loop.py").read_text())
    (desk.path / "loop.py").write_text(head + BLOCKS["loop.py"] + rest)
    desk.commit("another problem")
    agent = desk.agent(
        """
        n = count()
        columns = {1: 4, 2: 5, 3: 1}[n]  # better, worse than that, division by zero
        path = pathlib.Path("solve.py")
        path.write_text(re.sub(r"COLUMNS = \\d+", f"COLUMNS = {columns}", path.read_text()))
        say(f"{columns} columns")
        """
    )
    done = desk.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "3")
    assert "Best distance 0.333333" in done.stderr

    lines = (desk.path / "results.tsv").read_text().splitlines()
    assert lines[0] == "commit\tdistance\tmemory_gb\tstatus\tdescription"
    cells = [line.split("\t") for line in lines[1:]]
    assert [(row[1], row[3]) for row in cells] == [
        ("0.200000", "keep"),
        ("0.333333", "keep"),
        ("0.250000", "discard"),
        ("0.000000", "crash"),
    ]
    assert cells[3][4] == "ZeroDivisionError: division by zero (exit code 1): 1 columns"
    assert (desk.path / "solve.py").read_text() == BLOCKS["solve.py"].replace("COLUMNS = 6", "COLUMNS = 4")
    prompt = (desk.home() / "prompt.md").read_text()
    assert BLOCKS["program.md"].strip() in prompt
    assert "+0.133333 to the baseline" in prompt
    assert "edit solve.py once" in prompt

    report = desk.loop("report").stdout
    assert f"best 0.333333 ({cells[1][0]}), baseline 0.200000, gain 0.133333 side lengths (66.67%)" in report
    assert re.search(r"0\.333333 +0\.133333 +resolved +4 columns", report)
    assert (desk.path / "progress.png").read_bytes().startswith(b"\x89PNG")

    # The judge of the clean process sees the points and not solve.py: the two scores agree.
    audit = desk.loop("audit", "--replicates", "1").stdout.splitlines()
    assert audit[1].split()[-2:] == ["0.200000", "0.200000"]
    assert audit[4].split()[-2:] == ["0.333333", "0.250000"]
    assert [line.split()[:4] for line in (audit[2], audit[5])] == [["in", "a", "clean", "process"]] * 2
    assert audit[7].split() == ["gain", "0.133333", "0.050000"]
    records = [json.loads(path.read_text()) for path in sorted((desk.home() / "runs").glob("*/result.json"))]
    assert ["test_distance" in record for record in records] == [False] * 3 + [True] * 2
