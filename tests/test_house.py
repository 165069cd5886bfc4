"""The house in order: sizes that a reader can hold, documents that name only what exists, files that git ignores."""

import ast
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import loop

ROOT = Path(__file__).resolve().parents[1]
AGENT_READS = ("README.md", "program.md", "prepare.py", "train.py")


def count_code_lines(path: Path) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    source = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in skipped]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings)


def test_sizes_stay_within_what_a_reader_can_hold():
    tokens = {name: len((ROOT / name).read_text()) / 3.6 for name in AGENT_READS}
    print(*(f"\n{name}: {count:.0f} tokens" for name, count in tokens.items()), f"\nin all: {sum(tokens.values()):.0f}")
    for name in ("loop.py", "ledger.py", "plumbing.py", "report.py", "agents/clis.py"):
        print(f"{name}: {count_code_lines(ROOT / name)} lines of code")
    print(f"train.py: {len((ROOT / 'train.py').read_text().splitlines())} lines")
    assert sum(tokens.values()) < 24_000
    assert count_code_lines(ROOT / "loop.py") < 600
    assert len((ROOT / "train.py").read_text().splitlines()) <= 650


def test_loop_imports_neither_torch_nor_the_judge():
    """It would take seconds, and memory of the GPU; what it must know it asks in a child process."""
    code = "import sys, loop, report; print({'torch', 'numpy', 'prepare', 'train'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "set()\n"


def documented_commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "program.md")]
    return [line for text in texts for line in re.findall(r"uv run loop\.py[^\n`'#]*(?:\"[^\"]*\")?", text)]


@pytest.mark.parametrize("command", sorted(set(documented_commands())))
def test_documented_loop_command_is_accepted(command):
    words = shlex.split(command)[3:]
    if words == ["try"]:  # named in passing, without its description
        words.append("an idea")
    loop.parse_arguments(words)  # argparse ends the test with SystemExit where it is not


@pytest.mark.parametrize("name", ["results.tsv", "run.log", "runs", "experiment.txt", "STOP", "progress.png"])
def test_what_a_run_leaves_is_ignored_by_git(name):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


def test_no_file_names_a_registry_or_a_machine():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile("pypi" + r"\.org|registry\.npm" + "js|/ro" + "ot/|/wo" + "rk/")
    found = [n for n in names if n != "uv.lock" and not n.endswith(".png") and pattern.search((ROOT / n).read_text())]
    assert not found
