"""The house in order: what stands where, which way imports run, what an agent must read, what documents promise."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

from harness.cli import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    ".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "README.md", "docs", "harness", "loop.py", "prepare.py",
    "program.md", "pyproject.toml", "tests", "train.py", "uv.lock",
}  # fmt: skip
CHARACTERS_PER_TOKEN = 3.6


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.split("\n")[:-1]


def test_top_level_holds_exactly_what_it_should():
    assert {name.split("/")[0] for name in tracked_files()} == TOP_LEVEL


def test_what_an_agent_must_read_stays_small():
    characters = sum(len((ROOT / name).read_text()) for name in ("program.md", "train.py"))
    assert characters / CHARACTERS_PER_TOKEN < 10_000  # tokens


def test_imports_of_harness_run_one_way_in_the_order_of_its_list():
    modules = {path.stem for path in (ROOT / "harness").glob("*.py")} - {"__init__"}
    listed = re.findall(r"^    ([a-z_]+)  +", (ROOT / "harness" / "__init__.py").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(modules), "the list in harness/__init__.py lacks modules, or has more"
    for number, name in enumerate(listed):
        source = (ROOT / "harness" / f"{name}.py").read_text()
        imports = "\n".join(re.findall(r"^ *(?:from|import) .*", source, re.MULTILINE))
        too_early = [other for other in listed[number:] if re.search(rf"\bharness(\.| import .*\b){other}\b", imports)]
        assert not too_early, f"{name} imports {too_early}: a circle, or listed too early"
        assert not re.search(r"(from|import) (loop|train|prepare)\b", imports), name


def test_loop_imports_neither_torch_nor_the_evaluator():
    """It would take seconds, and memory of the GPU; what it must know it asks in a child process."""
    code = "import sys, loop; print({'torch', 'numpy', 'matplotlib', 'jinja2', 'train'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "set()\n"


def test_documented_loop_commands_are_accepted():
    stand_ins = {"RUN": "12", "NAME": "claude"}
    texts = [(ROOT / name).read_text() for name in tracked_files() if name.endswith((".md", ".sbatch"))]
    texts.append(ast.get_docstring(ast.parse((ROOT / "loop.py").read_text())))
    pattern = r"uv run (?:--extra \w+ )?loop\.py([^\n`'#&]*)"
    commands = {command for text in texts for command in re.findall(pattern, text)}
    assert len(commands) > 10
    for command in commands:
        words = [stand_ins.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", "", command))]
        if words == ["try"]:  # named in passing, without its description
            words.append("an idea")
        parse_arguments(words)  # argparse ends the test with SystemExit where it is not


def test_what_a_run_leaves_is_ignored_by_git():
    leftovers = ["results.tsv", "run.log", "runs", "experiment.txt", "STOP", "report.html", ".autoresearch/nov20/1"]
    done = subprocess.run(["git", "check-ignore", *leftovers], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == leftovers


def test_no_file_names_a_registry_a_machine_or_what_a_clone_does_not_have():
    nowhere = re.compile("pypi" + r"\.org|registry\.npm" + "js|/ro" + "ot/|/wo" + "rk/")
    of_the_project = re.compile("MODEL" + r"\.md|DESIGN" + r"( \d|\.md)|STYLE" + r"\.md|\bissue " + r"#?\d")
    for name in tracked_files():
        if name == "uv.lock" or name.endswith(".png"):
            continue
        text = (ROOT / name).read_text()
        assert not nowhere.search(text), name
        assert name.startswith("tests/") or not of_the_project.search(text), name


def test_every_test_that_trust_names_is_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "trust.md").read_text())
    assert len(named) > 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), name
