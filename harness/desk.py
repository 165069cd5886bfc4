"""A checkout that one agent edits: asked for a proposal, it gives an edit of the one file, or says why there is none.

An agent may leave anything behind. Its exit code is not trusted: if the file has changed, there is a proposal.
"""

import contextlib
import os
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.agents import Agent
from harness.costs import Answer, Cost, read_answer
from harness.files import open_regular, open_to_append, read_tail, write_atomically
from harness.processes import Ending, run_child
from harness.repository import Repository
from harness.screen import one_line

DESCRIPTION_FILE = "experiment.txt"  # one line by the agent
MAX_EDIT_BYTES = 4 * 2**20
MAX_LOG_BYTES = 16 * 2**20  # that are read of an agent's log; what is kept of its output is less


@dataclass(frozen=True)
class Assignment:
    """What an agent starts from: the champion's file, or an edit that crashed; and what it is told beyond the usual."""

    base: str  # the commit that its edit changes
    start: bytes  # the editable file as the agent finds it
    text: str = ""  # of a crash or a conflict; "": nothing beyond the usual
    failures: int = 0  # agents that got it and failed


@dataclass(frozen=True)
class Proposal:
    """An edit that an agent made, and what it is for."""

    source: bytes  # the editable file as the agent left it
    base: str
    description: str
    again_of: int = 0  # the run whose gain on a former champion is to be run again
    cost: Cost = field(default_factory=Cost)  # of the call that gave it


@dataclass(frozen=True)
class NoProposal:
    """Why an agent gave none."""

    reason: str
    is_refusal: bool = False  # there was an edit, and it did not pass: the next agent is told
    is_failure: bool = False  # the agent did not work at all, of a rate limit say
    cost: Cost = field(default_factory=Cost)


class Desk:
    """A checkout or worktree. `branch` is set where it is the checkout in which the loop was started."""

    def __init__(self, repository: Repository, place: Path, notes: Path, mark: str, branch: str = ""):
        self.repository = repository
        self.place = place
        self.notes = notes  # folder of the prompt and the agent's output
        self.mark = mark
        self.branch = branch
        notes.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        return self.notes / "agent.log"

    @property
    def editable(self) -> Path:
        return self.place / self.repository.editable

    def clear(self, champion: str) -> None:
        """Put tracked files, index and HEAD back to the champion, whatever an agent did to them."""
        self.repository.reset(self.place, champion, self.branch)

    def lay_out(self, champion: str, assignment: Assignment, prompt: str) -> None:
        """Make the desk ready for the next proposal."""
        self.clear(champion)
        self.editable.write_bytes(assignment.start)
        write_atomically(self.notes / "prompt.md", prompt)
        with contextlib.suppress(OSError):
            (self.place / DESCRIPTION_FILE).unlink()

    def ask(
        self, agent: Agent, assignment: Assignment, variables: dict, limit: float, stop: threading.Event
    ) -> Proposal | NoProposal:
        """Run the agent once, headless. Takes minutes; runs in a thread of its own and writes only on this desk."""
        prompt = self.notes / "prompt.md"
        command = [word.replace("{prompt_file}", str(prompt)) for word in agent.command]
        takes_file = command != list(agent.command)
        try:
            ending = run_child(
                command,
                cwd=self.place,
                env=variables,
                mark=self.mark,
                log=self.log,
                limit=limit,
                stop=stop,
                stdin=os.devnull if takes_file else prompt,
            )
        except OSError as error:  # while it updates itself, say
            return NoProposal(f"the agent does not start: {error}", is_failure=True)
        said = self._read_log()
        answer = self._look(assignment, ending, said, limit)
        return replace(answer, cost=said.cost)

    def _look(self, assignment: Assignment, ending: Ending, said: Answer, limit: float) -> Proposal | NoProposal:
        """What the agent made of the editable file."""
        name = self.repository.editable
        try:
            with open_regular(self.editable) as file:
                source = file.read(MAX_EDIT_BYTES + 1)
        except OSError:
            return NoProposal(f"{name} is not a regular file", is_refusal=True)
        if len(source) > MAX_EDIT_BYTES:
            return NoProposal(f"{name} is over {MAX_EDIT_BYTES // 2**20} MiB", is_refusal=True)
        if source != assignment.start:
            return Proposal(source, assignment.base, self._description(assignment.start, source))
        if ending.problem:
            last_words = one_line(said.words[-1] if said.words else read_tail(self.log, 1), 90)
            has_used_its_time = ending.seconds >= limit
            return NoProposal(f"the agent ended with {ending.problem}: {last_words}", is_failure=not has_used_its_time)
        return NoProposal(f"the agent left {name} as it was")

    def _read_log(self) -> Answer:
        """What the agent printed. Where that is JSON, it stands at the end of its log in plain words too."""
        with contextlib.suppress(OSError):
            with open_regular(self.log) as file:
                said = read_answer(file.read(MAX_LOG_BYTES).decode(errors="replace"))
            if said.words:
                words = "\n".join(said.words)
                with open_to_append(self.log) as file:
                    file.write(f"\n--- In plain words ({said.cost}):\n\n{words}\n")
            return said
        return Answer()

    def _description(self, start: bytes, source: bytes) -> str:
        with contextlib.suppress(OSError), open_regular(self.place / DESCRIPTION_FILE) as file:
            text = one_line(file.read(2000).decode(errors="replace"))
            if text:
                return text
        return describe_edit(start, source, self.repository.editable)


def describe_edit(start: bytes, source: bytes, editable: str) -> str:
    """`DEPTH 8 -> 10, MATRIX_LR 0.04 -> 0.05`: the description of an edit whose author wrote none."""
    before = _knobs(start)
    after = _knobs(source)
    changes = []
    for (name, old), (same_name, new) in zip(before, after, strict=False):
        if name == same_name and old != new:
            changes.append(f"{name} {old} -> {new}")
    return one_line(", ".join(changes)) or f"edit of {editable}"


def _knobs(source: bytes) -> list[tuple[str, str]]:
    """The lines `NAME = value`, in their order: a name may stand in two blocks."""
    return re.findall(r"^ *([A-Z][A-Z0-9_]*) = (.+?) *(?:#.*)?$", source.decode(errors="replace"), re.MULTILINE)


def compile_problem(source: bytes, name: str) -> str:
    """Why a Python file does not compile, "" if it does; anything else than Python passes."""
    if not name.endswith(".py"):
        return ""
    try:
        compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"{name} does not compile: {one_line(str(error))}"
    return ""
