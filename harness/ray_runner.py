"""Runs on the nodes of a Ray cluster: one actor a worker, and a Run comes back as from runner.py. It adds no nodes.

Ray places the actors, starts lost ones again, and uses nodes that join late. An actor asks its node's own evaluator
first: a node whose scores would not compare is left out for a minute. Ray, an optional extra, is imported where it is
used.
"""

import contextlib
import os
import platform
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from harness import machine
from harness.console import UserError, one_line, say
from harness.domain import Description, Domain
from harness.files import open_regular, remove_folder
from harness.ledger import Run
from harness.processes import LOG_LIMIT
from harness.runner import MAX_RECORD_BYTES, Job, MachineFault, Place, Runner, Stopped, measure, unpack

FILES = {  # of a run's folder on the node, and the bytes of each that come back
    "run.log": LOG_LIMIT,
    "result.json": MAX_RECORD_BYTES,
    "score.log": 2**20,
}
LEFT_OUT_SECONDS = 60  # that a node which refused gets no actor
LEFT_SECONDS = 86400  # age of a run's folder from which on nobody works there
LOOK_SECONDS = 1.0  # between looks at the cluster
PLACE_SECONDS = 30  # for the first actor to be placed, before that is said
STOP_SECONDS = 6  # for a run to end that is stopped
CONNECT_SECONDS = 2  # for a port to answer
CONNECT_TRIES = 3
MAX_JOB_BYTES = 256 * 2**20  # a job carries the commit's files
RAY_ENVIRONMENT = {  # of the loop
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray makes an environment anew for every worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray would print on the loop's standard output
    # A job goes straight to its actor, not through the node's object store: Ray ends a process whose store is gone.
    "RAY_max_direct_call_object_size": str(MAX_JOB_BYTES),
    "RAY_task_rpc_inlined_bytes_limit": str(MAX_JOB_BYTES),
}


# ---------------------------------------------------------------------------------------------------------------------
# On a node


@dataclass(frozen=True)
class Terms:
    """What an actor must know of the loop."""

    facts: Description  # what the evaluator said on the loop's machine
    domain: Domain
    mark: str
    python: str  # the loop's: in the domain's commands it stands for the node's
    versions: dict[str, str]
    threads: str | None  # OMP_NUM_THREADS, which Ray sets to 1


@dataclass(frozen=True)
class NodeAnswer:
    """What an actor says of its node."""

    node_id: str
    name: str
    refusal: str  # why no run can be made there now, "" if one can


class Actor:
    """One device of a node. Ray runs its methods one after another in the main thread of a process of its own: if the
    actor or the loop is killed, the run's processes die with that thread."""

    def __init__(self):
        self.facts: Description | None = None  # of this node, once it is fit

    def look(self, terms: Terms, archive: bytes) -> NodeAnswer:
        """Ask the node's evaluator, which is the same in every commit of the tag; once if the node is fit."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        name = f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, {node_id[:6]})"
        refusal = ""
        if self.facts is None:
            try:
                self._set_up(terms, node_id)
                facts = self._describe(archive)
                refusal = _misfit(terms, facts) or machine.busy_device(facts, self._device(facts))
                if not refusal:
                    self.facts = facts
            except (UserError, OSError) as error:
                refusal = one_line(str(error), 500)
        return NodeAnswer(node_id, name, refusal)

    def _set_up(self, terms: Terms, node_id: str) -> None:
        import ray

        self.terms = terms
        self.gpus = ray.get_gpu_ids()
        # The next run on this device of this node ends what an earlier one hid: nobody else could tell whose it is.
        self.mark = f"{terms.mark}:{node_id}"
        self.folder = _own_folder()
        os.environ.pop("OMP_NUM_THREADS", None)
        if terms.threads is not None:
            os.environ["OMP_NUM_THREADS"] = terms.threads
        commands = {}
        for name in ("describe_command", "train_command", "score_command"):
            words = getattr(terms.domain, name)
            commands[name] = tuple(sys.executable if word == terms.python else word for word in words)
        self.domain = replace(terms.domain, **commands)
        for left in self.folder.glob("tmp*"):  # by actors that were killed
            with contextlib.suppress(OSError):  # another actor does the same
                if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                    remove_folder(left)

    def _describe(self, archive: bytes) -> Description:
        variables = machine.variables_for_training(self.terms.facts.profile)
        if self.terms.facts.device == "cuda":
            variables["CUDA_VISIBLE_DEVICES"] = str(self.gpus[0])
        if problem := machine.lacking_disk(self.folder):
            raise UserError(problem)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            tree = Path(folder, "tree")
            unpack(archive, tree)
            facts = machine.describe(self.domain, tree, variables)
            machine.try_isolation(self.domain, tree, variables, facts)
            return facts

    def _device(self, facts: Description) -> str:
        return str(self.gpus[0]) if facts.device == "cuda" else next(iter(facts.devices))

    def measure(self, job: Job, terms: Terms) -> tuple[Run | MachineFault, dict[str, bytes]]:
        """The run or the MachineFault, and the files of its folder."""
        import ray

        if refusal := self.look(terms, job.archive).refusal:  # asks where this actor was started again
            return MachineFault(refusal), {}
        cancellation = SimpleNamespace(is_set=ray.get_runtime_context().is_canceled)  # in place of an event
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                return self._measure_in(Path(folder), job, cancellation)
        except OSError as error:  # a full disk, say
            return MachineFault(one_line(str(error), 500)), {}

    def _measure_in(self, folder: Path, job: Job, cancellation) -> tuple[Run | MachineFault, dict[str, bytes]]:
        place = Place(
            output=folder,
            scratch=folder / "scratch",
            compile_cache=self.folder / "compiled",
            mark=self.mark,
            device=self._device(self.facts),
        )
        try:
            outcome = measure(replace(job, facts=self.facts, domain=self.domain), place, cancellation)
        except MachineFault as fault:
            # Without this run's folder the same reason reads the same from run to run, and is said once.
            outcome = MachineFault(str(fault).replace(str(folder), str(folder.parent)), fault.is_suspect)
        except Stopped:
            outcome = MachineFault("stopped")  # nobody reads it
        return outcome, _read_files(folder)


def _misfit(terms: Terms, facts: Description) -> str:
    """Why scores of a node would not compare with the baseline's, "" if they would."""
    baseline = terms.facts
    if not facts.prepared:
        remedy = f"run 'AUTORESEARCH_PROFILE={baseline.profile} uv run prepare.py' there"
        return f"no data in {facts.cache} ({facts.problem}): {remedy}"
    if facts.device_name != baseline.device_name:
        return f"its device is {facts.device_name}, the baseline's {baseline.device_name}: leave it out of this cluster"
    if facts.digest != baseline.digest:
        digests = f"digest {str(facts.digest)[:12]}, the loop's is {str(baseline.digest)[:12]}"
        remedy = f"copy {baseline.cache} of the loop's machine there, or prepare it there from the same data"
        return f"other data in {facts.cache}: {digests}: {remedy}"
    own = installed_versions()
    names = [name for name, version in terms.versions.items() if own.get(name) != version]
    if names:
        listed = ", ".join(f"{name} {own.get(name)} (the loop has {terms.versions[name]})" for name in names[:3])
        return f"other packages: {listed}: run 'uv sync --extra ray' of the same commit there"
    return ""


def installed_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **machine.installed_packages()}


def _own_folder() -> Path:
    """This user's folder on the node. OSError if it is somebody else's."""
    path = Path(tempfile.gettempdir(), f"autoresearch-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid() or path.is_symlink():
        raise OSError(f"{path} belongs to somebody else: remove it, or set another TMPDIR for 'ray start'")
    return path


def _read_files(folder: Path) -> dict[str, bytes]:
    files = {}
    for name, cap in FILES.items():
        with contextlib.suppress(OSError), open_regular(folder / name) as file:
            files[name] = file.read(cap)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# In the loop


@dataclass
class Seat:
    """A worker's actor, and where Ray has placed it."""

    number: int
    actor: object = None  # Ray's handle; None: to be made
    asked_at: float = 0.0  # time.monotonic()
    answer: NodeAnswer | None = None  # the last one
    port: tuple[str, int] = ("", 0)  # at which the node's Ray answers


class RayRunner(Runner):
    """The devices of a cluster."""

    def __init__(self, tag, facts: Description, workers: int, address: str, stop: threading.Event):
        super().__init__(stop)
        self._tag = tag
        self._address = address
        self._folder = tag.home / "scratch" / "ray"  # a killed loop's is removed at the next start
        self._ray = self._join_cluster()
        nodes = self._alive_nodes()
        context = self._ray.get_runtime_context()
        host, port = context.gcs_address.rsplit(":", 1)
        self._ports = [(host, int(port)), _port_of(nodes, context.get_node_id())]  # of the cluster, of Ray on this node
        self._is_gone = False
        self._closing = threading.Event()
        self._seats: queue.Queue = queue.Queue()  # whose actors are placed, fit and idle
        self._unseated: queue.SimpleQueue = queue.SimpleQueue()  # (seat, why its node is to be left out or "")
        self._asked: dict = {}  # Ray's reference of an answer -> seat
        self._left_out: dict[str, tuple[str, float]] = {}  # node's id -> why, until when (time.monotonic())
        self._archive = tag.repository.archive(tag.champion)
        self._terms = Terms(
            facts=facts,
            domain=tag.domain,
            mark=tag.mark,
            python=sys.executable,
            versions=installed_versions(),
            threads=os.environ.get("OMP_NUM_THREADS"),
        )
        share = {"num_gpus": 1, "num_cpus": 0}
        if facts.device != "cuda":  # a whole node like this one: two runs on one would end each other
            cpus = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in nodes}
            own = cpus.get(self._ray.get_runtime_context().get_node_id())
            share = {"num_cpus": own or max(cpus.values(), default=0) or 1}
        self._actor = self._ray.remote(max_restarts=-1, max_task_retries=0, **share)(Actor)
        gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
        say(f"Ray on {address}: nodes {len(nodes)}, GPUs {gpus}")
        for number in range(workers):
            self._unseated.put((Seat(number), ""))
        self._thread = threading.Thread(target=self._tend, daemon=True)
        self._thread.start()

    def _join_cluster(self):
        """Ray's module, connected. UserError if that fails."""
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # A working folder that holds nothing else: Ray would put the checkout on the workers' path.
        package = Path(__file__).parent
        shutil.copytree(package, self._folder / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        working_dir = {"working_dir": str(self._folder / "code")}
        import ray

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            host, _, port = self._address.rpartition(":")
            if not _answers(host, port):
                raise ConnectionError("nobody answers there")
            ray.init(self._address, runtime_env=working_dir, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises all kinds
            shutil.rmtree(self._folder, ignore_errors=True)
            reason = one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
            remedy = f"'ray start --address={self._address}' makes this machine one of its nodes"
            raise UserError(f"no Ray cluster at {self._address}: {reason}; {remedy}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray took SIGTERM
        return ray

    def attempt(self, job: Job, device: int) -> Run:
        """Make the run on whichever actor is free. (A device is only the right to run: actors come and go.)"""
        seat = self._next_seat()
        try:
            outcome, files = self._wait_for(seat, seat.actor.measure.remote(job, self._terms))
        except self._ray.exceptions.RayError as error:
            self._check_cluster()
            self._unseated.put((seat, ""))
            # A run may kill the process that measures it; that a whole node goes is not its fault.
            reason = f"the worker on node {seat.answer.name} was lost ({type(error).__name__})"
            if isinstance(error, self._ray.exceptions.RayTaskError):  # a fault of our own, or of the node's Python
                reason = f"the worker on node {seat.answer.name} failed: {one_line(str(error).splitlines()[-1])}"
            raise MachineFault(reason, is_suspect=_answers(*seat.port)) from error
        if isinstance(outcome, MachineFault):
            if outcome.is_suspect:
                self._seats.put(seat)
            else:
                self._unseated.put((seat, str(outcome)))
            raise MachineFault(f"node {seat.answer.name}: {outcome}", outcome.is_suspect)
        self._seats.put(seat)
        try:
            for name, content in files.items():
                (self._tag.folder(job.run.number) / name).write_bytes(content)
        except OSError as error:
            raise MachineFault(f"the run's files could not be written: {error}") from error
        return replace(outcome, node=seat.answer.name)

    def _next_seat(self) -> Seat:
        while True:
            if self._is_gone:
                raise self._gone()
            if self.stop.is_set():
                raise Stopped
            with contextlib.suppress(queue.Empty):
                return self._seats.get(timeout=0.2)
            if self.is_stopping():  # not before: what has begun is finished
                raise Stopped

    def _wait_for(self, seat: Seat, reference):
        """What an actor returns."""
        while not self._ray.wait([reference], timeout=0.5)[0]:
            if self._is_gone:
                raise self._gone()
            if self.stop.is_set():
                self._ray.cancel(reference)
                answer = seat.actor.look.remote(self._terms, self._archive)  # it comes when the run has ended
                self._ray.wait([answer], timeout=STOP_SECONDS)
                raise Stopped
        return self._ray.get(reference)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(STOP_SECONDS)  # a cluster that is gone may hold it
        self._ray.shutdown()  # ends the actors
        shutil.rmtree(self._folder, ignore_errors=True)

    # Actors and nodes: a thread of its own

    def _tend(self) -> None:
        """Make actors, ask their nodes, and watch whether the cluster is there."""
        began = time.monotonic()
        while not self._closing.wait(LOOK_SECONDS):
            try:
                self._check_cluster()
                self._fill_seats()
            except UserError:
                self._is_gone = True
                self._free.put(-1)  # who waits for a device gets one, and learns it
                return
            except self._ray.exceptions.RayError:  # the next look tells whether the cluster is gone
                continue
            if not self.devices and not self.waiting and time.monotonic() - began > PLACE_SECONDS:
                self.waiting_since = time.time()
                self.waiting = "no fit node of the cluster has a free device"
                say(f"waiting: {self.waiting}")

    def _fill_seats(self) -> None:
        while not self._unseated.empty():
            seat, refusal = self._unseated.get()
            if refusal:
                self._left_out[seat.answer.node_id] = (refusal, time.monotonic() + LEFT_OUT_SECONDS)
                self._drop_actor(seat)
            self._ask(seat)
        if self._asked:
            self._take_answers()

    def _ask(self, seat: Seat) -> None:
        now = time.monotonic()
        if seat.actor is None:
            left_out = [node_id for node_id, (_, until) in self._left_out.items() if now < until]
            options = {"label_selector": {"ray.io/node-id": f"!in({','.join(left_out)})"}} if left_out else {}
            seat.actor = self._actor.options(**options).remote()
        seat.asked_at = now
        self._asked[seat.actor.look.remote(self._terms, self._archive)] = seat

    def _take_answers(self) -> None:
        answered, waiting = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for reference in waiting:
            seat = self._asked[reference]
            if self._left_out and time.monotonic() - seat.asked_at > LEFT_OUT_SECONDS:
                del self._asked[reference]
                self._drop_actor(seat)  # it waits for a place: a new one may have one that was left out
                self._ask(seat)
        for reference in answered:
            seat = self._asked.pop(reference)
            try:
                self._take_answer(seat, self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                if not isinstance(error, self._ray.exceptions.ActorUnavailableError):  # that one Ray starts again
                    self._drop_actor(seat)
                self._unseated.put((seat, ""))

    def _take_answer(self, seat: Seat, answer: NodeAnswer) -> None:
        seat.answer = answer
        seat.port = _port_of(self._alive_nodes(), answer.node_id)
        if answer.refusal:
            if answer.refusal != self._left_out.get(answer.node_id, ("", 0.0))[0]:
                say(f"node {answer.name} is left out: {answer.refusal}")
            self._unseated.put((seat, answer.refusal))
            return
        self._seats.put(seat)
        if seat.number not in self.devices:
            self.waiting = ""
            self.add_device(seat.number)

    def _drop_actor(self, seat: Seat) -> None:
        self._ray.kill(seat.actor)
        seat.actor = None

    def _alive_nodes(self) -> list[dict]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _check_cluster(self) -> None:
        """Raises UserError where the cluster is gone. (Ray itself would end this process a minute later.)"""
        for _ in range(CONNECT_TRIES):
            if all(_answers(*port) for port in self._ports):
                return
            time.sleep(LOOK_SECONDS)
        raise self._gone()

    def _gone(self) -> UserError:
        return UserError(f"Ray on {self._address} is gone: the same command goes on once it is back")


def _port_of(nodes: list[dict], node_id: str) -> tuple[str, int]:
    ports = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes}
    return ports.get(node_id, ("", 0))


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host, port), CONNECT_SECONDS):
        return True
    return False
