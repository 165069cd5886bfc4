"""A fork for another problem, made as docs/fork.md says: the page's own code, another metric, higher is better."""

import re

from conftest import ROOT, Checkout

PAGE = (ROOT / "docs" / "fork.md").read_text()
BLOCKS = dict(re.findall(r"```\w+ ([\w.]+)\n(.*?)```", PAGE, re.DOTALL))  # file -> its code
BANNER = "# What a fork for another domain changes"
BLOCK_OF_LOOP = re.compile(rf"({BANNER}.*?\n\n).*?^DOMAIN = Domain\(\n.*?^\)\n", re.DOTALL | re.MULTILINE)


def test_fork_checks_keeps_discards_crashes_reports_and_audits(checkout: Checkout):
    checkout.git("rm", "-q", "train.py", "prepare.py")
    for name in ("evaluate.py", "solve.py", "program.md"):
        checkout.write(name, BLOCKS[name])
    source, count = BLOCK_OF_LOOP.subn(lambda found: found[1] + BLOCKS["loop.py"], (ROOT / "loop.py").read_text())
    assert count == 1
    checkout.write("loop.py", source)
    checkout.commit("another problem")
    assert "run: distance 0.2500" in checkout.loop("check").stdout

    agent = checkout.agent("""
        BORDER = '''
        def solve(n, seed):
            along = [4 * i / n for i in range(n)]
            sides = [lambda t: (t, 0.0), lambda t: (1.0, t), lambda t: (1 - t, 1.0), lambda t: (0.0, 1 - t)]
            return [sides[int(t)](t % 1) for t in along]
        '''
        path = pathlib.Path("solve.py")
        n = count()
        columns = {2: 3, 3: 4, 4: 2, 5: 1}.get(n)  # a gain, another, worse, division by zero
        path.write_text(re.sub(r"COLUMNS = \\d+", f"COLUMNS = {columns}", path.read_text()) if columns else BORDER)
        say(f"{columns} columns" if columns else "on the border")
    """)
    approve = """grep -q '"description": "4 columns"' && test -s "$AUTORESEARCH_DIFF" """
    checkout.loop("--agent-cmd", agent, "--tag", "t", "--max-experiments", "5", "--approve", approve)
    lines = (checkout.path / "results.tsv").read_text().splitlines()
    assert lines[0] == "commit\tdistance\tmemory_gb\tstatus\tdescription"
    cells = [line.split("\t") for line in lines[1:]]
    assert [(row[1], row[3]) for row in cells] == [
        ("0.2500", "keep"),
        ("0.2500", "keep"),  # nothing was known of the noise
        ("0.3333", "discard"),
        ("0.3333", "discard"),
        ("0.3333", "keep"),
        ("0.2000", "discard"),
        ("0.0000", "crash"),
    ]
    assert cells[2][4] == "middle 0.0 is below its floor 0.1: on the border"
    assert cells[3][4] == "not approved: 3 columns"
    assert cells[6][4] == "ZeroDivisionError: division by zero (exit code 1): 1 columns"
    assert (checkout.path / "solve.py").read_text() == BLOCKS["solve.py"].replace("COLUMNS = 5", "COLUMNS = 4")

    report = checkout.loop("report").stdout
    assert "baseline 0.2500, 0.0833 side lengths (33.32%) better" in report
    assert re.search(r"0\.3333 +0\.0833 +0\.0000 +significant +4 columns", report)

    # The evaluator of the clean process sees the points and not solve.py: the two scores agree.
    audit = checkout.loop("audit", "--replicates", "1").stdout.splitlines()
    assert [line.split()[-2:] for line in audit[1:3]] == [["0.2500", "0.2500"]] * 2
    assert [line.split()[-2:] for line in audit[4:6]] == [["0.3333", "0.3333"]] * 2
    assert "in a clean process" in audit[2] and "in a clean process" in audit[5]

    assert "the file has no hyperparameter to turn" in checkout.loop("--agent", "random", code=1).stderr
