"""Where jobs run: submit(Job) -> Future of an Outcome. Here, on this machine's devices, a thread each."""

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness.bench import Job, Outcome, Place, measure
from harness.environment import Packages
from harness.store import Store


class LocalFleet:
    """The devices of this machine. At most `capacity` jobs run at a time, each on a device of its own."""

    def __init__(
        self, store: Store, devices: list[str], mark: str, packages: Packages, data: dict, stop: threading.Event
    ):
        self.capacity = len(devices)
        self._store = store
        self._mark = mark
        self._packages = packages
        self._data = data  # the training files as they must be
        self._stop = stop
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._threads = ThreadPoolExecutor(self.capacity, "bench")

    def submit(self, job: Job) -> Future:
        """Measure a job on the next free device; the run's folder exists. The future gives an Outcome."""
        return self._threads.submit(self._measure, job, self._store.folder(job.number))

    def _measure(self, job: Job, output: Path) -> Outcome:
        device = self._free.get()
        try:
            place = Place(
                output=output,
                scratch=self._store.bench,
                compile_cache=self._store.compile_cache,
                mark=f"{self._mark}:{job.number}",
                device=device,
                packages=self._packages,
                data=self._data,
            )
            return measure(job, place, self._stop)
        finally:
            self._free.put(device)

    def place(self, number: int) -> str:
        """The node on which a run is; here there is only one, without a name."""
        return ""

    def close(self) -> None:
        """End what runs (the event `stop` is set), and wait for it."""
        self._threads.shutdown(cancel_futures=True)
