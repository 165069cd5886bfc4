"""The house in order: what stands where, which way imports run, what an agent must read, what documents promise.

uv run pytest tests/test_house.py
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness import commands

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    ".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "README.md", "docs", "harness", "loop.py", "prepare.py",
    "program.md", "pyproject.toml", "tests", "train.py", "uv.lock",
}  # fmt: skip
CHARACTERS_PER_TOKEN = 3.6
ROOMS = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "harness").glob("*.py") if path.stem != "__init__"}


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.split("\n")[:-1]


def test_top_level_holds_exactly_what_it_should():
    assert {name.split("/")[0] for name in tracked_files()} == TOP_LEVEL


def test_what_an_agent_must_read_stays_small():
    characters = sum(len((ROOT / name).read_text()) for name in ("program.md", "train.py"))
    print(f"\nprogram.md and train.py: {characters / CHARACTERS_PER_TOKEN:.0f} tokens")
    assert characters / CHARACTERS_PER_TOKEN < 10_000


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that a file imports, wherever in the file: "harness.page", "torch"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside harness/ name the package"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_imports_of_harness_run_one_way():
    """The rooms can be put in an order in which each imports only those before it."""
    imported = {}
    for room, tree in ROOMS.items():
        modules = imported_modules(tree)
        assert not {"loop", "train", "prepare"} & {module.split(".")[0] for module in modules}, room
        imported[room] = {other for other in ROOMS if f"harness.{other}" in modules}
    placed: set[str] = set()
    while len(placed) < len(ROOMS):
        ready = {room for room in ROOMS if room not in placed and imported[room] <= placed}
        circle = sorted(set(ROOMS) - placed)
        assert ready, f"a circle among {circle}"
        placed |= ready


def test_list_of_the_rooms_names_each_after_those_that_it_imports():
    listed = re.findall(r"^    ([a-z_]+)  +", (ROOT / "harness" / "__init__.py").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(ROOMS), "the list in harness/__init__.py lacks rooms, or has more"
    for number, room in enumerate(listed):
        modules = imported_modules(ROOMS[room])
        not_yet = {other for other in listed[number:] if f"harness.{other}" in modules}
        assert not not_yet, f"{room} imports {not_yet}: harness/__init__.py lists it too early"


def test_picture_of_the_rooms_is_as_the_imports_are():
    """In CONTRIBUTING.md each line of rooms imports only from the lines below it."""
    picture = (ROOT / "CONTRIBUTING.md").read_text().partition("```\nloop ")[2].partition("```")[0]
    lines = [re.match(r"[a-z_ ]*?(?=   )", line)[0].split() for line in picture.splitlines()[1:]]
    drawn = {room for line in lines for room in line}
    assert drawn == set(ROOMS) - {"random_search", "ray_driver", "device"}, (
        "the picture in CONTRIBUTING.md lacks rooms, or has more"
    )
    for number, line in enumerate(lines):
        below = {room for other in lines[number + 1 :] for room in other}
        for room in line:
            modules = imported_modules(ROOMS[room])
            above_or_beside = {other for other in drawn - below if f"harness.{other}" in modules}
            assert not above_or_beside, f"{room} imports {above_or_beside}: CONTRIBUTING.md draws it lower"


FORBIDDEN = {  # room -> what DESIGN has it know nothing of
    "ledger": {"files", "repository", "processes", "store"},
    "bench": {"store", "agents", "desk"},
    "desk": {"bench", "fleet", "ledger"},
    "repository": {"store", "ledger", "desk", "bench"},
    "processes": {"repository", "store", "ledger", "desk", "bench"},
    "page": {"agents", "store", "bench"},
    "picture": {"agents", "store", "bench"},
}


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_room_of_harness_knows_nothing_of_what_is_not_its_own(room):
    modules = imported_modules(ROOMS[room])
    assert not {other for other in FORBIDDEN[room] if f"harness.{other}" in modules}


# device.py sets variables that torch reads when it is imported, and starts the process's clock.
@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"device"}))
def test_file_of_harness_does_nothing_at_import(room):
    """At its top level stand imports, definitions and constants; no constant is read from files or the environment."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for node in ROOMS[room].body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if is_docstring or is_guard or isinstance(node, definitions):
            continue
        assert isinstance(node, ast.Assign | ast.AnnAssign), ast.unparse(node)
        called = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        harmless = {"Agent", "Path", "str", "re.compile", "frozenset"}
        assert {name for name in called if not name.endswith("with_name")} <= harmless, ast.unparse(node)


def test_loop_imports_neither_torch_nor_the_judge():
    """It would take seconds, and memory of the GPU; what it must know it asks in a child process."""
    code = "import sys, loop; print({'torch', 'numpy', 'matplotlib', 'prepare', 'train'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "set()\n"


def documented_commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "program.md", "docs/fork.md")]
    return [line for text in texts for line in re.findall(r"uv run loop\.py[^\n`'#]*(?:\"[^\"]*\")?", text)]


@pytest.mark.parametrize("command", sorted(set(documented_commands())))
def test_documented_loop_command_is_accepted(command):
    words = shlex.split(command)[3:]
    if words == ["try"]:  # named in passing, without its description
        words.append("an idea")
    commands.parse_arguments(words)  # argparse ends the test with SystemExit where it is not


LEFTOVERS = ["results.tsv", "run.log", "runs", "experiment.txt", "STOP", "progress.png", "report.html"]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_a_run_leaves_is_ignored_by_git(name):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


def test_no_file_names_a_registry_or_a_machine():
    pattern = re.compile("pypi" + r"\.org|registry\.npm" + "js|/ro" + "ot/|/wo" + "rk/")
    names = [name for name in tracked_files() if name != "uv.lock" and not name.endswith(".png")]
    assert not [name for name in names if pattern.search((ROOT / name).read_text())]


def test_no_file_cites_what_a_clone_does_not_have():
    pattern = re.compile("MODEL" + r"\.md|DESIGN" + r"\.md|STYLE" + r"\.md|\bissue " + r"#?\d")
    names = [name for name in tracked_files() if name.endswith((".py", ".md")) and not name.startswith("tests/")]
    assert not [name for name in names if pattern.search((ROOT / name).read_text())]
