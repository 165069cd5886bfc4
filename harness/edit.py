"""An edit of the one file: whether it compiles, repeats another or says less, and its name; not whether it is good.

Pure functions of sources. Where a source is not Python, its lines and words stand in for the syntax tree.
"""

import ast
import hashlib
import re
from dataclasses import dataclass

from harness.console import one_line

CANNOT_PARSE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


@dataclass(frozen=True)
class Edit:
    """The edited file on its way to a verdict."""

    source: bytes
    base: str  # the commit that it edits and is compared with
    description: str
    again_of: int = 0  # the run whose gain on a former champion runs again here
    touched: tuple[str, ...] = ()  # other files that the agent changed: undone
    cost: dict | None = None  # of the agent's calls
    pairs: int = 0  # fresh runs of both sides that decide on a removal, whatever its length and its first run
    overrides: bool = False  # it changes values alone: where they conflict with a new champion's, they replace them


class Dropped(Exception):
    """An edit that is not worth a run; the message says why."""


def compile_problem(source: bytes, name: str) -> str:
    """Why a Python file does not compile, "" if it does; anything else than Python passes."""
    if not name.endswith(".py"):
        return ""
    try:
        compile(source, name, "exec", dont_inherit=True)
    except CANNOT_PARSE as error:
        return f"{name} does not compile: {one_line(str(error))}"
    return ""


def fingerprint(source: bytes) -> str:
    """The same for two sources that differ in comments, docstrings, layout or a seed alone: no new experiment."""
    tree = _parse(source)
    if tree is None:
        said = b"\n".join(line.strip() for line in source.splitlines())
        return hashlib.sha256(said).hexdigest()[:16]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "seed" in _name_of(node.func):
            node.args = [_without_value(argument) for argument in node.args]
        elif isinstance(node, ast.Assign) and "seed" in _name_of(node.targets[0]):
            node.value = _without_value(node.value)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _without_value(node: ast.AST) -> ast.AST:
    return ast.Constant(0) if isinstance(node, ast.Constant) else node


def syntax_size(source: bytes) -> int:
    """How much a source says, however its lines are wrapped: nodes of its syntax tree, docstrings left out. A string
    counts by its length: code can hide in one."""
    tree = _parse(source)
    if tree is None:
        return len(source.split())
    size = 0
    for node in ast.walk(tree):
        size += 1
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            size += len(node.value) // 4
    return size


def _parse(source: bytes) -> ast.Module | None:
    """The syntax tree without text that stands alone; None for what is not Python."""
    try:
        tree = ast.parse(source)
    except CANNOT_PARSE:
        return None
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [entry for entry in body if not _is_text_alone(entry)]
    return tree


def _is_text_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _name_of(node: ast.AST) -> str:
    """`torch.manual_seed` -> manual_seed, in lower case; "" for what has no name."""
    return getattr(node, "attr", getattr(node, "id", "")).lower()


def describe_edit(start: bytes, source: bytes, name: str) -> str:
    """`DEPTH 8 -> 10, MATRIX_LR 0.04 -> 0.05`: the description of an edit whose author wrote none."""
    changes = []
    for (old_name, old), (new_name, new) in zip(_constants(start), _constants(source), strict=False):
        if old_name == new_name and old != new:
            changes.append(f"{old_name} {old} -> {new}")
    return one_line(", ".join(changes)) or f"edit of {name}"


def _constants(source: bytes) -> list[tuple[str, str]]:
    """The lines `NAME = value`, in their order: a name may stand in two blocks."""
    return re.findall(r"^ *([A-Z][A-Z0-9_]*) = (.+?) *(?:#.*)?$", source.decode(errors="replace"), re.MULTILINE)
