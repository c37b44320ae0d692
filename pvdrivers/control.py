"""What the control thread offers to the devices it leads: timers, long jobs, limits.

Devices are handled on one thread, so that nothing about them needs a lock. What may take long runs elsewhere,
one job a device at a time, and its result comes back to that thread.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from .platform import XenStore

log = logging.getLogger("pvdrivers.control")

Done: TypeAlias = Callable[[Any, BaseException | None], None]
"""Called on the control thread with a job's result, or with what it raised."""


class Timer(Protocol):
    """Something that will be called."""

    def cancel(self) -> None: ...


class Control(Protocol):
    """The control thread, as a device's life sees it. All of it is called on that thread."""

    @property
    def store(self) -> XenStore:
        """The connection to xenstore; another one after it was lost."""

    def now(self) -> float:
        """Seconds, monotonic."""

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        """Run `job` on some other thread, then `done` on this one."""

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, in `seconds`."""

    def store_lost(self) -> None:
        """The store does not answer: connect again, then have every device looked at."""

    def pause(self, life: Any) -> None:
        """Stop watching a frontend that writes without end."""

    def resume(self, life: Any) -> None:
        """Watch it again, which has it looked at."""

    def gone(self, life: Any) -> None:
        """The device is no more."""

    def changed(self, life: Any) -> None:
        """Where the device stands is not what it was: its state, its connection or its troubles."""


class TokenBucket:
    """A limit on how often something is done: `rate` a second, `burst` at once."""

    def __init__(self, rate: float, burst: float, now: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._now = now
        self._tokens = burst
        self._at = now()

    def take(self, count: float = 1) -> bool:
        """True if it may be done now. False takes what there is, so that a storm does not get the rest
        either."""
        now = self._now()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < count:
            self._tokens = 0.0
            return False
        self._tokens -= count
        return True

    def give_back(self, count: float = 1) -> None:
        """What was taken does not count."""
        self._tokens = min(self._burst, self._tokens + count)


class Backoff:
    """One call to be made later; each time it is asked for again it is put off for twice as long."""

    def __init__(self, control: Control, call: Callable[[], None], first: float, longest: float) -> None:
        self._control = control
        self._call = call
        self._first = self._next = first
        self._longest = longest
        self._timer: Timer | None = None

    def after(self, seconds: float) -> None:
        """Call in so many seconds, and not when it was to be called before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._control.later(seconds, self._due)

    def again(self) -> None:
        """Call after the next, longer wait."""
        self.after(self._next)
        self._next = min(self._next * 2, self._longest)

    def reset(self) -> None:
        """Do not call, and begin with the shortest wait."""
        self._next = self._first
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._call()


class _Call:
    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None] | None) -> None:
        self.call = call

    def cancel(self) -> None:
        self.call = None


class Timers:
    """Calls to be made at some time, in order."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._heap: list[tuple[float, int, _Call]] = []
        self._count = itertools.count()

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Have `call` called by run_due() in `seconds`."""
        entry = _Call(call)
        heapq.heappush(self._heap, (self._now() + seconds, next(self._count), entry))
        return entry

    def timeout(self) -> float | None:
        """Seconds until something is due, None if nothing ever is."""
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._now()) if self._heap else None

    def run_due(self) -> None:
        """Call what is due now; not what that adds, or nothing else would get its turn."""
        now = self._now()
        while self._heap and self._heap[0][0] <= now:
            call = heapq.heappop(self._heap)[2].call
            if call is not None:
                call()


class Jobs:
    """Threads for what takes long. More are started while all are busy, up to `most`; they end after idling.

    They are daemon threads: a disk that never answers again must not keep the process from ending. And there may be
    many, as each disk that never answers keeps one.
    """

    IDLE_SECONDS = 10.0

    def __init__(self, wake: Callable[[], None], most: int = 512) -> None:
        self._wake = wake
        self._most = most
        self._todo: queue.SimpleQueue[tuple[Callable[[], Any], Done]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[Done, Any, BaseException | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._open = 0  # jobs that have not finished

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        """Run `job` in some thread; `done` will be called by deliver()."""
        with self._lock:
            self._open += 1
            start = self._open > self._threads and self._threads < self._most
            self._threads += start
            self._todo.put((job, done))  # with the lock held: see where a thread ends
        if start:
            try:
                threading.Thread(target=self._run, name="pvdrivers-job", daemon=True).start()
            except RuntimeError as e:
                self._cannot_start(e)

    def _cannot_start(self, error: RuntimeError) -> None:
        """The system has no thread for us: those that there are do it later, or if there is none it has failed."""
        with self._lock:
            self._threads -= 1
            if self._threads > 0:
                return
            self._open -= 1
            _, done = self._todo.get_nowait()
        self._finished.put((done, None, OSError(errno.EAGAIN, f"{error}: see TasksMax=, ulimit -u")))
        self._wake()

    def deliver(self) -> None:
        """Call `done` of what has finished; called on the control thread."""
        for _ in range(self._finished.qsize()):
            done, result, error = self._finished.get_nowait()
            try:
                done(result, error)
            except Exception:
                log.exception("our own fault")  # one device's trouble is not the others'

    def _run(self) -> None:
        while True:
            try:
                job, done = self._todo.get(timeout=self.IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    # submit() may have counted on this thread just now.
                    if self._todo.empty():
                        self._threads -= 1
                        return
                continue
            result: Any = None
            error: BaseException | None = None
            try:
                result = job()
            except BaseException as e:
                error = e
            with self._lock:
                self._open -= 1
            self._finished.put((done, result, error))
            del job, done, result, error
            self._wake()
