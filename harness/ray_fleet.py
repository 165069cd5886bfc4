"""Where jobs run when there is more than one worker: submit(Job) -> Future of an Outcome, on Ray.

Ray is started on this machine, or a cluster is joined by its address. All of Ray is in a process of its own, the driver
(ray_driver.py). It ends when its cluster is gone, and is started again until the cluster is back.
"""

import contextlib
import importlib.util
import os
import pickle
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

from harness.bench import Crash, Job, Unavailable
from harness.contract import Description
from harness.environment import SECRET
from harness.processes import sweep
from harness.ray_node import Answer, Errand, installed_versions
from harness.screen import UserError, say
from harness.store import Store

OFF = "off"  # in place of an address: no Ray, but this machine's devices, a thread for each
DRIVER = Path(__file__).with_name("ray_driver.py")
START_SECONDS = 120  # for Ray to start, or to be joined
RETRY_SECONDS = 5  # between looks for a cluster that is gone
CLOSE_SECONDS = 20  # for every run to end
LOST_WORKERS = 3  # of one run: then it is the run's own fault
OWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # Ray sets them in its workers


def check_extra(workers: int, address: str) -> None:
    """Raises UserError where Ray is wanted and not installed."""
    is_wanted = address != OFF and (workers > 1 or address)
    if is_wanted and importlib.util.find_spec("ray") is None:
        flag = f"--workers {workers}" if workers > 1 else f"--ray {address}"
        command = f"uv run --extra ray loop.py {shlex.join(sys.argv[1:])}"
        raise UserError(f"{flag} needs Ray, which is not installed: '{command}'", 2)


class RayFleet:
    """Devices of one or many machines. `capacity` follows the nodes that come and go."""

    def __init__(self, store: Store, facts: Description, workers: int, address: str, mark: str):
        self._store = store
        self._facts = facts
        self._workers = workers
        self._address = address
        self._mark = mark
        self._where = address or "this machine"
        self._session = secrets.token_hex(4)
        self._versions = installed_versions()
        self._slots = 0
        self._flying: dict[int, Future] = {}
        self._places: dict[int, str] = {}
        self._losses: dict[int, int] = {}  # run -> workers that it lost
        self._is_closing = threading.Event()
        self._lock = threading.Lock()  # of the driver's input and what flies
        shutil.rmtree(self._folder, ignore_errors=True)  # Ray's logs of an earlier session
        nodes, slots = self._start()
        say(f"Ray on {self._where}: {counted(nodes, 'node')}, {counted(slots, 'device')}")
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def _folder(self) -> Path:
        return self._store.home / "ray"

    @property
    def capacity(self) -> int:
        """How many jobs can run now; 0 while the cluster is gone or no node can run any."""
        return min(self._workers, self._slots)

    def place(self, number: int) -> str:
        """The node on which a run is, "" if it is on none."""
        return self._places.get(number, "")

    def submit(self, job: Job) -> Future:
        """Measure a job on the next free device of any node; the run's folder exists. The future gives an Outcome."""
        mark = f"{self._mark}:{self._session}:{job.number}"
        errand = Errand(
            job=job,
            mark=mark,
            session=self._session,
            python=sys.executable,
            versions=self._versions,
            variables={name: os.environ.get(name) for name in OWN_VARIABLES},
            compile_cache=None if self._address else self._store.compile_cache,
        )
        future: Future = Future()
        with self._lock:
            self._flying[job.number] = future
            try:
                self._send({"number": job.number, "errand": pickle.dumps(errand), "mark": mark})
            except OSError:
                self._settle(job.number, Unavailable(self._is_gone()))
        return future

    def close(self) -> None:
        """End what runs, on every node, and Ray where it was started here."""
        self._is_closing.set()
        with contextlib.suppress(OSError):
            self._driver.stdin.close()
        try:
            self._driver.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()
        sweep(f"{self._mark}:{self._session}")

    # The process that has Ray

    def _start(self) -> tuple[int, int]:
        """Start the driver; the numbers of nodes and devices. UserError with Ray's reason if there is no cluster."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "driver.log", "ab") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-P", str(DRIVER)],
                cwd=self._folder,
                env=_variables(self._address),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the loop's alone
            )
        package = DRIVER.parent
        # A node of a cluster may have another device or another cache than the loop, so that its own judge is asked.
        # This machine was asked already.
        known = {} if self._address else {name: pickle.dumps(self._facts) for name in self._facts.devices}
        self._send(
            {
                "address": self._address,
                "workers": self._workers,
                "folder": str(self._folder),
                "takes_gpu": self._facts.device == "cuda",
                "known": known,
                "source": {path.name: path.read_bytes() for path in package.glob("*.py")},
            }
        )
        alarm = threading.Timer(START_SECONDS, self._driver.kill)
        alarm.start()
        try:
            kind, *values = pickle.load(self._driver.stdout)
        except (EOFError, pickle.UnpicklingError):
            was_slow = not alarm.is_alive()
            what = f"did not start within {START_SECONDS} s" if was_slow else "gave up"
            kind, values = "error", [f"Ray {what} (log {self._folder / 'driver.log'})"]
        finally:
            alarm.cancel()
        if kind == "error":
            self._driver.wait()
            raise UserError(self._remedy(values[0]))
        self._slots = values[1]
        return values[0], values[1]

    def _remedy(self, reason: str) -> str:
        if not self._address:
            return f"Ray does not start on this machine: {reason}; '--ray {OFF}' runs without it"
        remedy = f"'ray start --address={self._address}' makes this machine one of its nodes"
        return f"no Ray cluster at {self._address}: {reason}; {remedy}"

    def _send(self, message: dict) -> None:
        pickle.dump(message, self._driver.stdin)
        self._driver.stdin.flush()

    def _serve(self) -> None:
        """Take the driver's messages; when it ends, start it again."""
        while not self._is_closing.is_set():
            self._take_messages()
            self._slots = 0
            is_closing = self._is_closing.is_set()
            with self._lock:
                if not is_closing and not self._flying:  # else the loop says it, of the runs that are to be made again
                    say(f"waiting: {self._is_gone()}")
                for number in list(self._flying):
                    self._settle(number, Unavailable("stopped" if is_closing else self._is_gone()))
            if not is_closing:
                self._driver.kill()
                self._driver.wait()
                self._find_again()

    def _take_messages(self) -> None:
        """Act on the driver's messages until it ends."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                kind, *values = pickle.load(self._driver.stdout)
                if kind == "say":
                    say(values[0])
                elif kind == "slots":
                    self._slots = values[0]
                elif kind == "placed":
                    self._places[values[0]] = values[1]
                elif kind == "done":
                    self._take_answer(*values)
                elif kind == "lost":
                    self._take_loss(*values)

    def _find_again(self) -> None:
        """Start the driver anew until the cluster is back, or the session closes."""
        while not self._is_closing.wait(RETRY_SECONDS):
            with contextlib.suppress(UserError, OSError):
                nodes, slots = self._start()
                say(f"Ray on {self._where} is back: {counted(nodes, 'node')}, {counted(slots, 'device')}")
                return

    def _is_gone(self) -> str:
        return f"Ray on {self._where} is gone"

    # What came of a job

    def _take_answer(self, number: int, data: bytes) -> None:
        answer: Answer = pickle.loads(data)
        folder = self._store.folder(number)
        outcome = answer.outcome
        try:
            for name, content in answer.files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            outcome = Unavailable(f"the run's files could not be written: {error}")
        with self._lock:
            self._settle(number, outcome)

    def _take_loss(self, number: int, reason: str, is_worker: bool) -> None:
        """A run whose worker was lost, or that no node could make."""
        outcome = Unavailable(reason)
        if is_worker:
            self._losses[number] = self._losses.get(number, 0) + 1
            if self._losses[number] >= LOST_WORKERS:
                outcome = Crash(f"{reason}, the {LOST_WORKERS}rd time", "", 0.0)
        with self._lock:
            self._settle(number, outcome)

    def _settle(self, number: int, outcome) -> None:
        """Fulfil a job's future. Called with the lock held."""
        self._places.pop(number, None)
        future = self._flying.pop(number, None)
        if future is not None:
            future.set_result(outcome)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _variables(address: str) -> dict[str, str]:
    """The environment of Ray's processes: without the person's keys and tokens, but with Ray's own."""
    kept = {}
    for name, value in os.environ.items():
        is_rays = name.startswith("RAY_")
        if is_rays or not (SECRET.search(name) or name.startswith("PYTHON")):
            kept[name] = value
    kept |= {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray makes an environment anew for every worker
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # the run that fills the memory is the one to end, not Ray's worker
        "RAY_enable_worker_prestart": "0",  # no idle Python for every processor
        "RAY_prestart_worker_first_driver": "0",
    }
    kept.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # then the cluster counts as gone
    if not address:
        kept["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # off, as on those, Ray listens on the loopback only
        kept.setdefault("RAY_AUTH_MODE", "token")
        kept.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of this session; else Ray leaves one in the home
    return kept
