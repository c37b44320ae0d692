"""An embedded Xen, a backend process that can be killed, and a guest in the test's own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pvdrivers import daemons
from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.platform import open_platform
from pvdrivers.sim import toolstack

READY_IN = 120.0  # seconds: a cold cache has everything to compile


class Process:
    """A verb of the command line, ready when it has printed a line that starts with "ready"."""

    def __init__(
        self, *words: str, log: Path, group: Path | None = None, before: tuple[str, ...] = (), **extra: str
    ) -> None:
        """`group`: the cgroup.procs to run in; `before`: a command that runs it."""
        self._log = log.open("a")
        enter = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(group)] if group else []
        self.popen = subprocess.Popen(
            [*enter, *before, sys.executable, "-m", "pvdrivers", *words],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **extra},
        )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line.startswith("ready") and not (line == "" and "PVDRIVERS_TEST_KILL" in extra and self._killed()):
            raise AssertionError(f"{words}: {line!r}\n{log.read_text()}")

    def _killed(self) -> bool:
        """By itself, as it was told: a disk is in use again before its process has said that it is ready."""
        return self.popen.wait(30) == -signal.SIGKILL

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(30)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(30)
            raise
        finally:
            assert self.popen.stdout is not None
            self.popen.stdout.close()
            self._log.close()


class Bed:
    """All of it. A context manager; `serve` starts the backend, `kill` ends it as a power cut would."""

    def __init__(self, run_dir: Path, *serve_words: str) -> None:
        self.run_dir = run_dir
        self.words = serve_words
        self.before: tuple[str, ...] = ()
        self.log = run_dir.parent / "serve.log"
        self.xen = Process("sim", "--run-dir", str(run_dir), log=run_dir.parent / "sim.log")
        self.backend: Process | None = None
        self.dom0: Any = open_platform("sim", run_dir=run_dir)
        self.disks: list[Blkfront] = []
        self._guests: list[Any] = []

    def serve(self, group: Path | None = None, **extra: str) -> Process:
        """Start a backend, in a cgroup if one is given; `extra` is its environment."""
        words = ("serve", "--run-dir", str(self.run_dir), *self.words)
        self.backend = Process(*words, log=self.log, group=group, before=self.before, **extra)
        return self.backend

    def kill(self) -> None:
        """SIGKILL."""
        assert self.backend is not None
        self.backend.end(signal.SIGKILL)

    def died(self, timeout: float = 30.0) -> None:
        """Wait for a backend that is to die of itself."""
        assert self.backend is not None
        self.backend.popen.wait(timeout)
        assert self.backend.popen.returncode == -signal.SIGKILL
        self.backend.end()

    def disk(self, params: str, *, mode: str = "w", memory_mib: int = 128, **keywords: Any) -> Blkfront:
        """A new guest with one disk, connected."""
        disk = self.unconnected(params, mode=mode, memory_mib=memory_mib, **keywords)
        disk.connect(timeout=30)
        return disk

    def unconnected(self, params: str, *, mode: str = "w", memory_mib: int = 128, **keywords: Any) -> Blkfront:
        """A new guest with one disk, which has not begun."""
        domain = toolstack.create_domain(self.dom0, name="guest", memory_mib=memory_mib)
        toolstack.attach_vbd(self.dom0.store, domain.domid, "xvda", params, mode=mode)
        guest = open_platform("sim", run_dir=self.run_dir, domid=domain.domid, token=domain.token)
        self._guests.append(guest)
        disk = Blkfront(guest, 51712, **keywords)
        self.disks.append(disk)
        return disk

    def frontend(self, domid: int = 1) -> dict[str, bytes]:
        """What stands in the guest's directory: grefs, ports, state."""
        top = f"/local/domain/{domid}/device/vbd/51712"
        found: dict[str, bytes] = {}

        def read(path: str) -> None:
            for name in self.dom0.store.ls(path) or ():
                below = f"{path}/{name}"
                found[below] = self.dom0.store.read(below) or b""
                read(below)

        read(top)
        return found

    def _end_daemons(self) -> None:
        """Those that daemons have started, and left behind when they ended."""
        for daemon in daemons.running(self.run_dir):
            os.kill(daemon.pid, signal.SIGTERM)
        until(lambda: not daemons.running(self.run_dir), 60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # whatever fails, the processes are ended
            stack.callback(self.xen.end)
            stack.callback(self._end_daemons)
            if self.backend is not None:
                stack.callback(self.backend.end)
            stack.callback(self.dom0.close)
            for guest in self._guests:
                stack.callback(guest.close)
            for disk in self.disks:
                stack.callback(disk.close)


def until(condition: Any, timeout: float = 20.0) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
