"""report.html and progress.png while a loop runs, rewritten by a child that can neither slow nor end the loop.

The child is a fork: it runs the code that this process has, whatever an agent does to the files of the checkout
meanwhile. Its priority is the lowest, it is a session of its own, and it ends by itself after LONGEST_WRITE.
"""

import contextlib
import os
import signal
import time

from harness import morning, page, picture
from harness.files import read_tail
from harness.report import compute
from harness.repository import Repository
from harness.screen import ERROR_CHARS, say
from harness.store import Store

PAGE_SECONDS = 60  # at least, before the first write and between two of them
REST = 20  # the pause after a write is at least so many times as long as the write: a long ledger costs no more
LONGEST_WRITE = 120  # seconds
MOST_FILES = 1024  # open files of the loop that a child lets go of


class LivePage:
    """Keeps the page of a session fresh."""

    def __init__(self, store: Store):
        self._store = store
        self._template = page.read_template()  # now, while no agent is at work in the checkout
        self._log = store.home / "page.log"
        self._rows = len(store.rows)
        self._child = 0  # process id; 0: none is writing
        self._began = time.monotonic()
        self._pause = float(PAGE_SECONDS)
        self._has_warned = False

    def keep_fresh(self, is_quiet: bool) -> None:
        """Begin to rewrite the page if rows came, at most once a minute. `is_quiet`: now it would disturb no run."""
        self._look_after_child()
        is_due = len(self._store.rows) != self._rows and time.monotonic() - self._began >= self._pause
        if is_due and is_quiet and not self._child:
            self._begin(is_live=True)

    def close(self) -> None:
        """Begin the session's last write, if there is a page: it reloads no more then. Nobody waits for the write."""
        if os.path.lexists(self._store.repository.checkout / morning.PAGE_NAME):
            self._begin(is_live=False)

    def _begin(self, is_live: bool) -> None:
        self._rows = len(self._store.rows)
        self._began = time.monotonic()
        try:
            child = os.fork()
        except OSError as error:
            self._warn(str(error))
            return
        if child:
            self._child = child
            return
        code = 1
        try:
            self._detach()
            self._write(is_live)
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
        finally:
            os._exit(code)

    def _look_after_child(self) -> None:
        if not self._child:
            return
        status = 1
        with contextlib.suppress(ChildProcessError):
            child, status = os.waitpid(self._child, os.WNOHANG)
            if not child:
                return
        self._child = 0
        self._pause = max(PAGE_SECONDS, REST * (time.monotonic() - self._began))
        if status:
            self._warn(read_tail(self._log, 1, ERROR_CHARS) or f"its process ended with status {status}")

    def _warn(self, reason: str) -> None:
        """Once a session."""
        if not self._has_warned:
            say(f"warning: {morning.PAGE_NAME} is not rewritten: {reason}")
        self._has_warned = True

    # In the child

    def _detach(self) -> None:
        """Let go of the loop's signal handlers, its open files and its priority."""
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST_WRITE)
        os.nice(19)
        nothing = os.open(os.devnull, os.O_RDWR)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        targets = {0: nothing, 1: log, 2: log}
        for number in range(MOST_FILES):
            # Replaced, not closed: a file object of the loop that closes its number later closes nothing of ours. The
            # tag's lock is among them: it must end with the loop.
            if number not in (nothing, log):
                with contextlib.suppress(OSError):
                    os.fstat(number)
                    os.dup2(targets.get(number, nothing), number)

    def _write(self, is_live: bool) -> None:
        """Picture and page, from the state on disk."""
        old = self._store
        repository = Repository(old.repository.checkout, old.domain.editable, old.domain.instructions)
        with morning.page_lock(old):
            store = Store(repository, old.tag, old.domain)
            findings = compute(store, store.rows, store.ledger, store.domain)
            picture.plot(store.rows, repository.checkout / picture.PICTURE_NAME, store.domain, findings.sigma)
            morning.write_page(store, findings, repository.checkout, store.domain, is_live, self._template)
