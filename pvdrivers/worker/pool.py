"""All workers of a process: started and watched together, and a queue is given to one of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from pvdrivers.errors import PlatformError
from pvdrivers.platform import Platform
from pvdrivers.storage.locks import Fence
from pvdrivers.storage.software_pool import JOIN_SECONDS

from .control import HELD_UP_S, INTERRUPT, Worker
from .notices import Notices


class WorkerPool:
    """All workers of a process. Implements pvdrivers.device.Workers."""

    def __init__(self, platform: Platform, count: int = 1, *, spin_us: int = 0, coalesce_us: int = 0,
                 software: bool = False, fence: Fence | None = None) -> None:  # fmt: skip
        if count < 1 or count > 64:
            raise PlatformError(f"{count} workers: from 1 to 64, one a core at the most")
        self.alert_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fence = fence
        keep = -1 if fence is None else fence.fd
        self.workers = [
            Worker(platform, i, self.alert_fd, spin_us=spin_us, coalesce_us=coalesce_us, software=software, keep=keep)
            for i in range(count)
        ]
        self._next = 0
        self._notices = Notices()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start all threads. They are watched only if this is the main thread, which may set a signal's handler."""
        held_up = any(worker.can_be_held_up for worker in self.workers)
        if held_up and threading.current_thread() is threading.main_thread():
            # A handler that does nothing, and no SA_RESTART: the call comes back with -EINTR.
            signal.signal(INTERRUPT, lambda *_: None)
            threading.Thread(target=self._watch, name="worker-watchdog", daemon=True).start()
        for worker in self.workers:
            worker.start()

    def _watch(self) -> None:
        while not self._stopped.wait(HELD_UP_S * 2):
            for worker in self.workers:
                worker.interrupt_if_held_up()

    def stop(self, *, left: bool = False) -> None:
        """Stop all threads; the devices have been disconnected before, or some are `left` as they are (Worker.stop)."""
        self._stopped.set()
        for worker in self.workers:
            worker.leave()
        deadline = time.monotonic() + JOIN_SECONDS
        for worker in self.workers:
            worker.stop(deadline, left=left)
        os.close(self.alert_fd)

    def alive(self) -> bool:
        """Whether every worker has gone round its loop since the last call; has them go round it again."""
        return all([worker.went_round() for worker in self.workers])

    def choose(self, queues: int) -> list[Worker]:
        """A worker for each queue of a device: the queues are spread, the devices start at different workers."""
        first = self._next
        self._next += queues
        return [self.workers[(first + q) % len(self.workers)] for q in range(queues)]

    def alerts(self) -> Sequence[tuple[Any, str]]:
        """Devices whose rings died since the last call, with the violation."""
        try:
            os.eventfd_read(self.alert_fd)
        except BlockingIOError:
            pass
        found: list[tuple[Any, str]] = []
        for worker in self.workers:
            found += worker.alerts()
            if worker.failed:
                raise PlatformError(worker.failed)
        return found

    def notices(self) -> Sequence[tuple[Any, str, str, int]]:
        """What happened to devices that go on, since the last call, and what is over (see Notices)."""
        return list(self._notices.look([ring for worker in self.workers for ring in worker.attached()]))
