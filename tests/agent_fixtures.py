"""For the tests of agents: a tag in a scratch repository, and agents that are real processes in its worktree."""

import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import loop
from harness.agents import Agent, NoProposal, Proposal, Worktree
from harness.ledger import Run
from harness.repository import Repository
from harness.tag import Tag

DOMAIN = replace(loop.DOMAIN, assumed_sigma={"pocket": 0.01})
TRAIN = "# ---- Knobs ----\nDEPTH = 4  # layers\nLR = 0.1\n# ---- Model ----\nprint(DEPTH)\n"
FILES = {
    "train.py": TRAIN,
    "prepare.py": "print('the evaluator')\n",
    "program.md": "# Instructions\n",
    ".gitignore": "results.tsv\nruns\nexperiment.txt\n/.autoresearch/\n/prompt.md\n",
}
HEAD = """
import os, pathlib, re, subprocess, sys, time
def knob(name, value):
    path = pathlib.Path("train.py")
    path.write_text(re.sub(rf"(?m)^{name} = [^ \\n]+", f"{name} = {value}", path.read_text()))
def say(text):
    pathlib.Path("experiment.txt").write_text(text)
def git(command):
    subprocess.run(f"git -c user.name=a -c user.email=a@a {command}", shell=True, check=True, capture_output=True)
"""


class Lab:
    """A person's checkout with a tag whose baseline has run, and the worktree of one agent."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.checkout = folder / "check out ü"
        self.outside = folder / "outside"
        self.env = env
        self.outside.mkdir()
        self.checkout.mkdir()
        for name, text in FILES.items():
            (self.checkout / name).write_text(text)
        self.git("init", "-q", "-b", "main")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.tag = Tag(Repository(self.checkout, "train.py", "program.md"), "t", DOMAIN)
        self.champion = self.tag.repository.head()
        self.add_run(status="keep", purpose="baseline", description="baseline", score=1.5)
        self.worktree = Worktree(self.tag, self.tag.worktrees / "1", f"{self.tag.mark}:agent:1")
        self.stop = threading.Event()

    def git(self, *args: str) -> str:
        command = ["git", "-c", "user.name=person", "-c", "user.email=person@localhost", *args]
        return subprocess.run(command, cwd=self.checkout, check=True, capture_output=True, text=True).stdout.strip()

    def add_run(self, log: str = "a log\n", **values) -> Run:
        number = self.tag.new_folder()
        (self.tag.folder(number) / "run.log").write_text(log)
        run = Run(number, self.champion, **values)
        self.tag.append(run)
        return run

    def agent(self, body: str, **values) -> Agent:
        """An agent that runs this Python code in the worktree: knob(NAME, value), say(description), git(command)."""
        path = self.outside / "agent.py"
        path.write_text(HEAD + f"OUTSIDE = pathlib.Path({str(self.outside)!r})\n" + textwrap.dedent(body))
        return Agent(f"{sys.executable} '{path}'", **values)

    def propose(self, agent: Agent | str, start: str = TRAIN, prompt="Do it.\n", limit=60.0) -> Proposal | NoProposal:
        agent = self.agent(agent) if isinstance(agent, str) else agent
        return self.worktree.propose(agent, self.champion, start.encode(), prompt, self.env, limit, self.stop)

    def file(self, name: str) -> Path:
        """A file of the worktree."""
        return self.worktree.folder / name

    def persons_state(self) -> tuple[str, ...]:
        """What no agent's proposal may change."""
        head = (self.checkout / ".git/HEAD").read_text()
        tracked = [(self.checkout / name).read_text() for name in FILES]
        return (head, self.git("rev-parse", "main"), self.git("diff", "--cached", "--name-only"), *tracked)
