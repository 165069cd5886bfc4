"""For the tests of agents: a tag in a scratch checkout, and agents that are real processes in a worktree of it."""

import threading
from dataclasses import replace
from pathlib import Path

from conftest import FAKE_TRAIN as TRAIN
from conftest import Checkout

import loop
from harness.agents import Agent, NoProposal, Worktree
from harness.edit import Edit
from harness.ledger import Run
from harness.repository import Repository
from harness.tag import Tag

DOMAIN = replace(loop.DOMAIN, assumed_sigma={"pocket": 0.01})


class Lab:
    """A person's checkout with a tag whose baseline has run, and the worktree of one agent."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.scratch = Checkout(folder / "a folder ü")
        self.checkout = self.scratch.path
        self.outside = self.scratch.outside
        self.git = self.scratch.git
        self.env = env
        self.tag = Tag(Repository(self.checkout, "train.py", "program.md"), "t", DOMAIN)
        self.champion = self.tag.repository.head()
        self.add_run(status="keep", purpose="baseline", description="baseline", score=1.5)
        self.worktree = Worktree(self.tag, 1)
        self.stop = threading.Event()

    def add_run(self, log: str = "a log\n", **values) -> Run:
        number = self.tag.new_folder()
        (self.tag.folder(number) / "run.log").write_text(log)
        run = Run(number, self.champion, **values)
        self.tag.append(run)
        return run

    def agent(self, body: str, **values) -> Agent:
        """An agent that runs this Python code in the worktree, as Checkout.agent."""
        return Agent(self.scratch.agent(body), **values)

    def propose(self, agent: Agent | str, start: str = TRAIN, prompt="Do it.\n", limit=60.0) -> Edit | NoProposal:
        agent = self.agent(agent) if isinstance(agent, str) else agent
        return self.worktree.propose(agent, self.champion, start.encode(), prompt, self.env, limit, self.stop)

    def file(self, name: str) -> Path:
        """A file of the worktree."""
        return self.worktree.folder / name

    def persons_state(self) -> tuple[str, ...]:
        """What no agent's proposal may change."""
        head = (self.checkout / ".git/HEAD").read_text()
        return (head, self.git("rev-parse", "main"), self.git("status", "--porcelain"))
