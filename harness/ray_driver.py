"""Jobs on Ray, in a process of its own: the loop (ray_fleet.py) writes jobs to its standard input and reads what became
of them from its standard output. Ray ends a driver whose cluster is gone: then only this process ends, not the loop.

This script imports nothing of the package. Ray ships a script's functions by value, so a node needs Ray and the
packages of training, and no checkout: the rooms with which it measures come along as source.

Ray itself, an optional extra, is imported where it is used.
"""

import contextlib
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

REST_SECONDS = 60  # that a node which refused a job is left alone
LOSS_REST_SECONDS = 20  # that a node which lost a worker is left alone: Ray takes as long to see that a node is gone
BUSY_REST_SECONDS = 20  # that a GPU which somebody else uses is left alone
LOOK_SECONDS = 1.0  # between looks at the nodes
POLL_SECONDS = 0.05
CLOSE_SECONDS = 6  # for Ray's own ending, once the loop has gone
OBJECT_STORE_BYTES = 100 * 2**20  # a job carries some MB
RUN = "import sys; sys.path.append(sys.argv[1]); from harness import ray_node; ray_node.main(sys.argv[1])"
SWEEP = "import sys; sys.path.append(sys.argv[1]); from harness.processes import sweep; sweep(sys.argv[2])"


# On the node, in a Ray worker


def carry_out(request: dict) -> dict:
    """Let a process of its own (ray_node.py) measure a job; its reply, or {"killed": True}."""
    if request["takes_gpu"]:
        import ray

        request["device"] = str(ray.get_gpu_ids()[0])
    folder = tempfile.mkdtemp(prefix="autoresearch-run-")
    for name, text in request["source"].items():
        path = os.path.join(folder, "harness", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(text)
    errand = pickle.dumps({key: request[key] for key in ("errand", "known", "device")})
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, folder], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    reply = b""
    try:
        child.stdin.write(errand)
        child.stdin.flush()
        reply = child.stdout.read()  # until that process has ended, though it is our child no more (see _detach there)
    except BrokenPipeError:
        pass
    finally:
        child.wait()
        child.stdin.close()
        if not reply:  # it was killed: we sweep what it ran
            sweep = [sys.executable, "-P", "-c", SWEEP, folder, request["mark"]]
            subprocess.run(sweep, stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)
    if reply:
        return pickle.loads(reply)
    if child.returncode:  # it failed before it left us
        raise RuntimeError("the process that measures did not start")
    return {"killed": True}


def hold(device: str, seconds: float) -> None:
    """Keep a GPU from the jobs: while this task has it, Ray gives it to no other. Ray chooses, the lowest free one."""
    import ray

    if str(ray.get_gpu_ids()[0]) == device:
        time.sleep(seconds)


# Beside the loop


@dataclass
class Node:
    """A node as Ray tells of it, and what it has told us."""

    name: str
    cpus: float
    gpus: int
    known: dict[str, bytes] = field(default_factory=dict)  # device -> its description
    running: dict[int, str] = field(default_factory=dict)  # run -> device, "" where the node chooses
    held: int = 0  # GPUs that are kept from the jobs
    rests_until: float = 0.0  # time.monotonic()
    refusal: str = ""  # the last one

    def is_resting(self) -> bool:
        return time.monotonic() < self.rests_until


@dataclass
class Flight:
    """A job on its way."""

    number: int
    errand: bytes
    mark: str
    node: str = ""  # id, once it is placed


class Driver:
    """Places jobs on nodes, one a device, and tells what came of them."""

    def __init__(self, ray, config: dict, tell):
        self.ray = ray
        self.config = config
        self.tell = tell
        self.takes_gpu = config["takes_gpu"]
        self.commands: queue.SimpleQueue = queue.SimpleQueue()
        self.nodes: dict[str, Node] = {}  # alive, by id
        self.waiting: deque[Flight] = deque()
        self.flights: dict = {}  # Ray's reference -> Flight
        self.holds: dict = {}  # Ray's reference -> id of the node that keeps a GPU from the jobs
        self.tried: dict[int, set[str]] = {}  # run -> nodes that had it: when it is made again, others come first
        self.looked_at = 0.0
        self.told_slots = None  # number of slots that the loop was last told
        self.carry_out = ray.remote(max_retries=0)(carry_out)
        self.hold = ray.remote(max_retries=0)(hold)

    def run(self) -> None:
        """Until the loop closes its end."""
        threading.Thread(target=self.read_commands, daemon=True).start()
        self.look_at_nodes()
        self.tell("ready", len(self.nodes), self.slots_in_all())
        while self.take_commands():
            if time.monotonic() - self.looked_at > LOOK_SECONDS:
                self.look_at_nodes()
            self.place()
            self.take_results()
            self.tell_slots()
        for reference in [*self.flights, *self.holds]:
            with contextlib.suppress(Exception):
                self.ray.cancel(reference, force=True)

    def read_commands(self) -> None:
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self.commands.put(pickle.load(sys.stdin.buffer))
        self.commands.put(None)
        # The loop has ended, or was killed: nothing of Ray may keep this process, whose end is that of every run.
        time.sleep(CLOSE_SECONDS)
        os._exit(1)

    def take_commands(self) -> bool:
        """Take what the loop sent; return whether the loop is still there."""
        wait_seconds = 0.0 if self.flights else POLL_SECONDS
        with contextlib.suppress(queue.Empty):
            while True:
                command = self.commands.get(timeout=wait_seconds) if wait_seconds else self.commands.get_nowait()
                wait_seconds = 0.0
                if command is None:
                    return False
                self.waiting.append(Flight(**command))
        return True

    # Nodes

    def look_at_nodes(self) -> None:
        """Nodes that joined, nodes that went, and GPUs that have rested."""
        self.looked_at = time.monotonic()
        alive = {entry["NodeID"]: entry for entry in self.ray.nodes() if entry["Alive"]}
        for node_id in [node_id for node_id in self.nodes if node_id not in alive]:
            del self.nodes[node_id]
        for node_id, entry in alive.items():
            if node_id in self.nodes:
                continue
            name = f"{entry['NodeManagerHostname']} ({entry['NodeManagerAddress']}, {node_id[:6]})"
            resources = entry["Resources"]
            node = Node(name, resources.get("CPU", 0.0), int(resources.get("GPU", 0)))
            node.known = dict(self.config["known"])
            self.nodes[node_id] = node
        if self.holds:
            ended, _ = self.ray.wait(list(self.holds), num_returns=len(self.holds), timeout=0)
            for reference in ended:
                node = self.nodes.get(self.holds.pop(reference))
                if node is not None:
                    node.held -= 1

    def slots(self, node: Node) -> int:
        """How many jobs the node runs at a time: one a GPU; without GPUs one a device of its judge."""
        if self.takes_gpu:
            return node.gpus - node.held
        if node.cpus < 1:
            return 0
        return len(node.known) or 1

    def slots_in_all(self) -> int:
        return sum(self.slots(node) for node in self.nodes.values() if not node.is_resting())

    def tell_slots(self) -> None:
        slots = self.slots_in_all()
        if slots != self.told_slots:
            self.tell("slots", slots, len(self.nodes))
        self.told_slots = slots

    # Jobs

    def place(self) -> None:
        """Send the waiting jobs to free devices; give those back that no node can run."""
        if not self.waiting:
            return
        usable = {node_id: node for node_id, node in self.nodes.items() if self.slots(node) and not node.is_resting()}
        if not usable:
            reasons = {f"node {node.name}: {node.refusal}" for node in self.nodes.values() if node.refusal}
            kind = "GPU" if self.takes_gpu else "CPU"
            reason = "; ".join(sorted(reasons)[:3]) or f"no node of the cluster has a {kind}"
            while self.waiting:
                self.tell("lost", self.waiting.popleft().number, reason, False)
            return
        while self.waiting:
            free = {node_id: self.slots(node) - len(node.running) for node_id, node in usable.items()}
            free = {node_id: slots for node_id, slots in free.items() if slots > 0}
            if not free:
                return
            flight = self.waiting.popleft()
            tried = self.tried.setdefault(flight.number, set())
            fresh = {node_id: slots for node_id, slots in free.items() if node_id not in tried}
            candidates = fresh or free
            node_id = max(candidates, key=candidates.get)
            tried.add(node_id)
            self.send(flight, node_id, usable[node_id])

    def send(self, flight: Flight, node_id: str, node: Node) -> None:
        device = ""
        if self.takes_gpu:
            share = {"num_cpus": 0, "num_gpus": 1}
        else:
            cpus = node.cpus / self.slots(node)
            share = {"num_cpus": int(cpus) if cpus >= 1 else cpus}
            taken = node.running.values()
            device = next((name for name in node.known if name not in taken), "")
        request = {
            "errand": flight.errand,
            "mark": flight.mark,
            "known": node.known,
            "device": device,
            "takes_gpu": self.takes_gpu,
            "source": self.config["source"],
        }
        reference = self.submit(self.carry_out, request, node=node_id, **share)
        flight.node = node_id
        node.running[flight.number] = device
        self.flights[reference] = flight
        self.tell("placed", flight.number, node.name)

    def submit(self, task, *args, node: str, **share):
        """Start a task on a node; Ray's reference."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return task.options(scheduling_strategy=strategy, **share).remote(*args)

    def take_results(self) -> None:
        if not self.flights:
            return
        done, _ = self.ray.wait(list(self.flights), num_returns=len(self.flights), timeout=POLL_SECONDS)
        for reference in done:
            flight = self.flights.pop(reference)
            node = self.nodes.get(flight.node)
            if node is not None:
                node.running.pop(flight.number, None)
            try:
                reply = self.ray.get(reference)
            except Exception as error:
                self.take_loss(flight, node, error)
                continue
            if reply.get("killed"):  # by the job itself, if it happens again and again
                self.take_lost_worker(flight, node, "the process that measures was killed")
            else:
                self.take_reply(flight, node, reply)

    def take_reply(self, flight: Flight, node: Node | None, reply: dict) -> None:
        if node is not None:
            node.known |= reply["known"]
        if reply["busy"]:
            self.rest_device(flight, node, reply["busy"], reply["refused"])
            return
        is_alone = len(self.nodes) == 1  # no other node could try: the loop weighs what this one lacks
        if reply["answer"] and (not reply["refused"] or is_alone):
            self.tell("done", flight.number, reply["answer"])
        else:
            self.refuse(flight, node, reply["refused"])

    def refuse(self, flight: Flight, node: Node | None, reason: str) -> None:
        """The node rests, and the job goes elsewhere."""
        if node is not None:
            if reason != node.refusal:
                self.tell("say", f"node {node.name} is left out: {reason}")
            node.refusal = reason
            node.known = {}  # it is asked anew
            node.rests_until = time.monotonic() + REST_SECONDS
        self.waiting.appendleft(flight)

    def rest_device(self, flight: Flight, node: Node | None, device: str, reason: str) -> None:
        """Somebody else uses the device: it rests, the node's others do not, and the job is made again."""
        name = node.name if node else "that ran it"
        if node is not None:
            node.refusal = reason
            if self.takes_gpu:
                reference = self.submit(self.hold, device, BUSY_REST_SECONDS, node=flight.node, num_cpus=0, num_gpus=1)
                self.holds[reference] = flight.node
                node.held += 1
        self.tell("lost", flight.number, f"node {name}: {reason}", False)

    def take_loss(self, flight: Flight, node: Node | None, error: Exception) -> None:
        """A worker or a node was lost, or Ray could not start the task there."""
        name = node.name if node else "that ran it"
        self.look_at_nodes()
        node = self.nodes.get(flight.node)
        if node is None:
            self.tell("lost", flight.number, f"node {name} is gone", False)
        elif isinstance(error, self.ray.exceptions.RayTaskError):
            last_line = str(error).strip().splitlines()[-1]
            self.refuse(flight, node, f"the worker there failed: {last_line[:300]}")
        else:
            self.take_lost_worker(flight, node, type(error).__name__)

    def take_lost_worker(self, flight: Flight, node: Node | None, reason: str) -> None:
        name = node.name if node else "that ran it"
        reason = f"the worker on node {name} was lost ({reason})"
        if node is not None:
            node.refusal = reason
            node.rests_until = time.monotonic() + LOSS_REST_SECONDS
        self.tell("lost", flight.number, reason, True)


# The start


def join(config: dict):
    """Start Ray on this machine, or join the cluster at an address; the module."""
    import ray

    quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": None}
    if config["address"]:
        ray.init(address=config["address"], **quiet)
        return ray
    quiet["include_dashboard"] = False
    ray.init(
        address="local",
        num_cpus=config["workers"],
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=config["short_folder"],
        **quiet,
    )
    return ray


def main() -> None:
    # Ray writes to standard output: the loop's answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(*message) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            pickle.dump(message, answers)
            answers.flush()

    config = pickle.load(sys.stdin.buffer)
    sys.argv = [""]  # Ray would put the script's folder on the workers' path
    folder = Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's sockets lie below this folder, and a socket's path has at most 107 characters.
    link = Path(tempfile.mkdtemp(prefix="ar-", dir="/tmp"), "r")
    link.symlink_to(folder)
    config["short_folder"] = str(link)
    try:
        try:
            ray = join(config)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            tell("error", lines[0][:400])
            return
        Driver(ray, config, tell).run()
        ray.shutdown()
    finally:
        shutil.rmtree(link.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
